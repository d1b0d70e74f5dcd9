"""Score what a model draws from prompts with known answers, by a judge that has never seen a generator.

First the judge's own accuracy on fresh real scenes, as they are and after a round trip through the model's
autoencoder, then that of the pictures: object, style and background, each with
a 95 % Wilson interval, for combinations that the model was trained on, for held-out style x object pairs, and for two
objects.

    python -m scripts.mini.score --model mini --prompts 288
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.types import InputError
from train.grid import save_grid
from train.scenes import Scenes, eval_prompts
from train.scorer import HEADS, SIZE, accuracy, load_scorer

ROUND_TRIP = 512  # real scenes through the autoencoder
KINDS = {
    "seen": ("one object, seen combinations", "train", 1),
    "held_out": ("one object, held-out style x object", "held_out_pairs", 1),
    "two": ("two objects, seen combinations", "train", 2),
}


@dataclasses.dataclass
class Config:
    """What to score.

    Attributes:
        model: "mini" or a diffusers folder of 64 px images.
        prompts: pictures of each kind.
        kinds: which to score: seen, held_out, two.
        objects: number of objects that the model was trained on.
        steps: sampling steps; the model's own default if null.
        guidance_scale: guidance; the model's own default if null.
        batch_size: pictures drawn at a time.
        seed: of the prompts, and of the first picture.
        out: folder for scores.json and one grid of pictures a kind; nothing is written if empty.
    """

    model: str = "mini"
    prompts: int = 288
    kinds: list[Literal["seen", "held_out", "two"]] = dataclasses.field(
        default_factory=lambda: ["seen", "held_out", "two"]
    )
    objects: int = 24
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 32
    seed: int = 5
    out: str = ""


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share seen in n trials."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def line(kind: str, result: dict[str, Any], n: int) -> str:
    """Return one printed row: each share with its interval, in per cent."""
    cells = []
    for head in (*HEADS, "all"):
        low, high = wilson(result[head], n)
        cells.append(f"{head} {100 * result[head]:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
    if result["any_object"] > result["object"]:
        cells.append(f"at least one object {100 * result['any_object']:.1f}")
    return f"{kind} (n={n}): " + ", ".join(cells)


def round_trip(pipe: jaxmix.Pipeline, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Encode and decode uint8 images: what the judge says of the result is the most that a model can score."""

    @jax.jit
    def encode(params: Any, images: jax.Array) -> jax.Array:
        mean, _ = pipe.vae.apply({"params": params}, images / 127.5 - 1.0, method="encode")
        return mean * pipe.vae.config.scaling_factor

    parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    return np.concatenate([pipe.decode(encode(pipe.params["vae"], part)) for part in parts])


def main(cfg: Config) -> int:
    """Print the scores; write them if asked."""
    if cfg.prompts < 1:
        raise InputError(f"prompts: found {cfg.prompts}, expected 1 or more")
    command.enable_compilation_cache()
    pipe, scorer = jaxmix.load(cfg.model), load_scorer()
    side = pipe.latent_shape[0] * pipe.vae.config.factor
    if side != SIZE:
        raise InputError(f"{cfg.model}: draws {side} px images, the scorer expects {SIZE} px")
    neutral = {"two_objects": 0.0, "three_objects": 0.0, "labelled": 0.0}
    scenes = Scenes(SIZE, len(scorer.objects), seed=880_001, split="all", **neutral)
    rows = [scenes[i] for i in range(2000)]
    scores: dict[str, Any] = {"real scenes": accuracy(scorer, np.stack([r["image"] for r in rows]), rows)}
    print(line("the judge itself, fresh real scenes", scores["real scenes"], len(rows)), flush=True)
    images = np.stack([r["image"] for r in rows[:ROUND_TRIP]])
    scores["round trip"] = accuracy(scorer, round_trip(pipe, images, cfg.batch_size), rows[:ROUND_TRIP])
    print(line("real scenes through the autoencoder", scores["round trip"], ROUND_TRIP), flush=True)
    for kind, split, count in (KINDS[name] for name in cfg.kinds):
        rows = eval_prompts(split, cfg.prompts, cfg.seed, count=count, objects=cfg.objects)
        parts = []
        with command.progress(len(rows), kind, "images") as bar:
            for start in range(0, len(rows), cfg.batch_size):
                batch = rows[start : start + cfg.batch_size]
                seeds = list(range(cfg.seed + start, cfg.seed + start + len(batch)))
                captions = [r["caption"] for r in batch]
                parts.append(pipe.generate(captions, seeds, cfg.steps, cfg.guidance_scale, batch_size=cfg.batch_size))
                bar.update(len(batch))
        images = np.concatenate(parts)
        scores[kind] = accuracy(scorer, images, rows)
        print(line(kind, scores[kind], len(rows)), flush=True)
        if cfg.out:
            save_grid(Path(cfg.out) / f"{split}_{count}.png", images[:96], 12, 2)
    if cfg.out:
        found = {"config": dataclasses.asdict(cfg), "scores": scores}
        (Path(cfg.out) / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {cfg.out}/scores.json")
    return 0


if __name__ == "__main__":
    command.run(main)
