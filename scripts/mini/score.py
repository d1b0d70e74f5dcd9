"""Score what a model draws from prompts with known answers, by judges that have never seen a generator.

First the judges' own accuracy on fresh real scenes, as they are and after a round trip through the model's
autoencoder, then that of the pictures, each share with a 95 % Wilson interval: objects, style and background; and for
models that have learnt places (`--arrangement anywhere`), whether objects are where the prompt says.

    python -m scripts.mini.score --model mini --prompts 288 --out scores.json
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.types import InputError
from train.grid import save_grid
from train.scenes import ARRANGEMENT, Scenes, eval_prompts, told
from train.scenes.scenes import Arrangement
from train.scorer import HEADS, Scorer, judge, load_scorer
from train.scorer import WEIGHTS as SCORER
from train.segmenter import WEIGHTS as SEGMENTER
from train.segmenter import Segmenter, load_segmenter, stands

Name = Literal["seen", "held_out", "two", "three", "places", "held_out_relations"]


class Kind(NamedTuple):
    """Prompts of a kind: their split, how many objects they have, and the share that says where these are."""

    title: str
    split: str
    count: int
    place_words: float
    anywhere: bool = False


KINDS: dict[str, Kind] = {
    "seen": Kind("one object, seen combinations", "train", 1, 0.0),
    "held_out": Kind("one object, held-out style x object", "held_out_pairs", 1, 0.0),
    "two": Kind("two objects, seen combinations", "train", 2, 1.0),
    "three": Kind("three objects", "train", 3, 0.5, True),
    "places": Kind("one object where the prompt says", "train", 1, 1.0, True),
    "held_out_relations": Kind("two objects, held-out relations", "held_out_relations", 2, 1.0),
}
DEFAULT_KINDS = ("seen", "held_out", "two", "three", "places")
NUMBERS = ("one object", "two objects", "three objects")


@dataclasses.dataclass
class Config:
    """What to score.

    Attributes:
        model: "mini" or a diffusers folder whose pictures have the judges' size.
        prompts: pictures of each kind.
        kinds: which to score: seen, held_out, two, three, places, held_out_relations; null: the first five, without
            three and places under "centred".
        arrangement: the scenes that the model was trained on, see train.scenes.Scenes: centred or anywhere.
        scorer: weights of the judge of objects, styles and backgrounds.
        segmenter: weights of the judge of places, trained with by_name; read only under "anywhere".
        objects: number of objects that the model was trained on.
        steps: sampling steps; the model's own default if null.
        guidance_scale: guidance; the model's own default if null.
        batch_size: pictures drawn at a time.
        seed: of the prompts, and of the first picture; picture i of a kind is drawn from seed + i.
        real_scenes: fresh real scenes of each number of objects that the judges are tried on.
        round_trip: how many of these pass through the autoencoder too.
        out: file for the scores, ending in .json; beside it one grid of pictures per kind. Nothing is written if empty.
    """

    model: str = "mini"
    prompts: int = 288
    kinds: list[Name] | None = None
    arrangement: Arrangement = ARRANGEMENT
    scorer: str = str(SCORER)
    segmenter: str = str(SEGMENTER)
    objects: int = 24
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 32
    seed: int = 5
    real_scenes: int = 2000
    round_trip: int = 512
    out: str = ""

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        for name in ("prompts", "batch_size", "real_scenes", "round_trip"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: found {getattr(self, name)}, expected 1 or more")
        if self.out and not self.out.endswith(".json"):
            raise InputError(f"out: found {self.out}, expected a file that ends in .json")
        lost = [name for name in self.kinds or () if KINDS[name].anywhere and self.arrangement != "anywhere"]
        if lost:
            raise InputError(
                f"kinds: found {', '.join(lost)} under arrangement 'centred', expected 'anywhere' with them"
            )

    @property
    def named_kinds(self) -> dict[str, Kind]:
        """The kinds to score."""
        if self.kinds is not None:
            return {name: KINDS[name] for name in self.kinds}
        return {n: KINDS[n] for n in DEFAULT_KINDS if self.arrangement == "anywhere" or not KINDS[n].anywhere}


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share seen in n trials."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def share(right: np.ndarray) -> dict[str, float | int]:
    """Return the share of what is right (n,), with its interval and n."""
    found = float(np.mean(right))
    low, high = wilson(found, len(right))
    return {"share": found, "low": max(low, 0.0), "high": min(high, 1.0), "n": len(right)}


def score(
    images: np.ndarray, rows: Sequence[Mapping[str, Any]], scorer: Scorer, segmenter: Segmenter | None
) -> dict[str, Any]:
    """Return the shares of pictures that are right about each thing that their rows say.

    `relation` is of all whose prompt names a relation, `relation_of_right` of those among them with the right objects,
    and likewise for `place`.
    """
    right, by_name = judge(scorer, images, rows)
    found: dict[str, Any] = {head: share(values) for head, values in right.items()}
    if len(rows[0]["object_names"]) == 1:
        del found["any_object"]
    for name, values in (stands(segmenter, images, rows) if segmenter else {}).items():
        said = np.isfinite(values)
        if said.any():
            found[name] = share(values[said])
        if (said & right["object"]).any():
            found[f"{name}_of_right"] = share(values[said & right["object"]])
    found["by_name"] = {
        head: {name: float(np.mean(values)) for name, values in sorted(classes.items())}
        for head, classes in by_name.items()
    }
    return found


TITLES = {
    **{head: head for head in (*HEADS, "all")},
    "any_object": "at least one object",
    "place": "place",
    "relation": "relation",
    "relation_of_right": "relation where the objects are right",
}


def line(title: str, result: Mapping[str, Any]) -> str:
    """Return one printed row: each share with its interval, in per cent."""
    cells = []
    for name, words in TITLES.items():
        if name in result:
            found = result[name]
            few = f" of {found['n']}" if found["n"] < result["object"]["n"] else ""
            cells.append(
                f"{words} {100 * found['share']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]{few}"
            )
    return f"{title} (n={result['object']['n']}): " + ", ".join(cells)


def real_rows(cfg: Config, scorer: Scorer, count: int) -> list[dict[str, Any]]:
    """Return fresh real scenes of `count` objects with what their captions say about places."""
    shares = {"two_objects": float(count == 2), "three_objects": float(count == 3), "labelled": 0.0, "counts": 0.0}
    scenes = Scenes(
        scorer.size,
        cfg.objects,
        seed=880_001,
        split="all",
        arrangement=cfg.arrangement,
        place_words=1.0,
        **shares,
    )
    rows = [scenes[i] for i in range(cfg.real_scenes)]
    return [{**row, "facts": told(row["relation"], row["places"], count)} for row in rows]


def round_trip(pipe: jaxmix.Pipeline, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Encode and decode uint8 images: what the judge says of the result is the most that a model can score."""
    parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    return np.concatenate([pipe.decode(pipe.encode_images(part)) for part in parts])


def draw(pipe: jaxmix.Pipeline, cfg: Config, title: str, captions: Sequence[str]) -> np.ndarray:
    """Draw a picture for every caption."""
    parts = []
    with command.progress(len(captions), title, "images") as bar:
        for start in range(0, len(captions), cfg.batch_size):
            batch = captions[start : start + cfg.batch_size]
            seeds = list(range(cfg.seed + start, cfg.seed + start + len(batch)))
            parts.append(pipe.generate(batch, seeds, cfg.steps, cfg.guidance_scale, batch_size=cfg.batch_size))
            bar.update(len(batch))
    return np.concatenate(parts)


def open_judges(cfg: Config, pipe: jaxmix.Pipeline) -> tuple[Scorer, Segmenter | None]:
    """Return the judges, which must see the model's size and know its objects."""
    scorer, segmenter = load_scorer(cfg.scorer), None
    side = pipe.latent_shape[0] * pipe.vae.config.factor
    if scorer.size != side:
        raise InputError(f"{cfg.model}: found pictures of {side} px, expected {scorer.size} px as {cfg.scorer} sees")
    if len(scorer.objects) < cfg.objects:
        raise InputError(
            f"objects: found {cfg.objects}, expected at most {len(scorer.objects)}, which {cfg.scorer} knows"
        )
    if cfg.arrangement == "anywhere":
        segmenter = load_segmenter(cfg.segmenter)
        if segmenter.size != side or len(segmenter.names) < cfg.objects:
            raise InputError(
                f"{cfg.segmenter}: found a segmenter of {segmenter.size} px that names {len(segmenter.names)} objects, "
                f"expected one of {side} px that names {cfg.objects}"
            )
    return scorer, segmenter


def command_line(cfg: Config) -> str:
    """Return the command that reproduces these scores."""
    words = ["python", "-m", "scripts.mini.score"]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        default = field.default
        if value != default:
            words += [f"--{field.name}", json.dumps(value) if isinstance(value, list) else str(value)]
    return shlex.join(words)


def main(cfg: Config) -> int:
    """Print the scores; write them if asked."""
    command.enable_compilation_cache()
    pipe = jaxmix.load(cfg.model)
    scorer, segmenter = open_judges(cfg, pipe)
    scores: dict[str, Any] = {}
    for count in (1, 2, 3) if cfg.arrangement == "anywhere" else (1,):
        rows = real_rows(cfg, scorer, count)
        images, what = np.stack([row["image"] for row in rows]), NUMBERS[count - 1]
        scores[f"real scenes, {what}"] = score(images, rows, scorer, segmenter)
        print(line(f"the judges themselves, fresh real scenes, {what}", scores[f"real scenes, {what}"]), flush=True)
        images, rows = images[: cfg.round_trip], rows[: cfg.round_trip]
        scores[f"round trip, {what}"] = score(round_trip(pipe, images, cfg.batch_size), rows, scorer, segmenter)
        print(line(f"real scenes through the autoencoder, {what}", scores[f"round trip, {what}"]), flush=True)
    for name, kind in cfg.named_kinds.items():
        words = {"arrangement": cfg.arrangement, "place_words": kind.place_words}
        prompts = eval_prompts(kind.split, cfg.prompts, cfg.seed, count=kind.count, objects=cfg.objects, **words)
        images = draw(pipe, cfg, kind.title, [row["caption"] for row in prompts])
        scores[name] = {"title": kind.title, **score(images, prompts, scorer, segmenter)}
        print(line(kind.title, scores[name]), flush=True)
        if cfg.out:
            save_grid(Path(cfg.out).with_name(f"{Path(cfg.out).stem}-{name}.png"), images[:96], min(12, len(images)), 2)
    if cfg.out:
        found = {"command": command_line(cfg), "config": dataclasses.asdict(cfg), "scores": scores}
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {cfg.out}")
    return 0


if __name__ == "__main__":
    command.run(main)
