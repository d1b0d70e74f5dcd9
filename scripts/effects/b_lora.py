"""Measure B-LoRA: which blocks of the model hold style and content, and what each half of a trained file moves.

`blocks` is the paper's way to find them, training nothing: one block alone is told another object in another style
(P+), and the judge says which of both it drew. `pairs` tells each block another object and each other block another
style, and the judge says whether both were drawn. `halves` draws with both halves of a B-LoRA and with each alone,
under prompts that give the picture's style to known objects, and the picture's content to known styles. Pictures are
kept under `out`.

    python -m train.b_lora --config configs/b_lora_mini.yaml --output_dir runs/b_lora
    python -m scripts.effects.b_lora --parts blocks --steps 10
    python -m scripts.effects.b_lora --parts pairs --steps 10 --cases 50
    python -m scripts.effects.b_lora --parts halves --steps 10 --loras runs/b_lora/pytorch_lora_weights.safetensors
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.pipeline.blocks import HALVES, layer_names
from scripts.effects.draw import digest
from scripts.effects.image_prompts import Judges
from scripts.effects.pictures import labelled_grid
from scripts.effects.studio import Studio, check_counts, check_parts, filled, means, table
from scripts.effects.subjects import Asked, prompts_of
from scripts.effects.vmix import load_model
from train.scenes import Scenes
from train.scenes.captions import BACKGROUND_WORDS, STYLE_WORDS, with_article
from train.subjects import SubjectScenes

PARTS = ("blocks", "pairs", "halves")
BASE = "the model itself"
BINS = 4  # of each colour, for the palette


@dataclasses.dataclass
class Config:
    """What to measure.

    Attributes:
        parts: some of blocks, pairs, halves, separated by commas.
        model: "mini" or a diffusers folder whose images have the judges' size.
        image_encoder: the CLIP that compares pictures.
        loras: B-LoRA files of one picture each; halves are measured of the first, mixtures of all.
        subject: the object of their picture.
        subject_style: its style.
        word: what stands for it in prompts.
        adapter: an image prompt beside the style half, at InstantStyle's blocks, of the same picture; none if empty.
        cases: prompts of each table.
        steps: of each run.
        inversion_steps: of StyleAligned, which inverts the picture and follows it from the sixth on.
        grid_rows: cases on the pictures.
        batch_size: pictures drawn at a time.
        seed: of the cases and of the first picture.
        out: folder for effects.json, effects.md, the pictures and what is kept between runs.
    """

    parts: str = ",".join(PARTS)
    model: str = "mini"
    image_encoder: str = "mini-clip"
    loras: list[str] = dataclasses.field(default_factory=list)
    subject: str = "duck"
    subject_style: str = "pixel"
    word: str = "[v]"
    adapter: str = "mini-ip"
    cases: int = 200
    steps: int = 25
    inversion_steps: int = 25
    grid_rows: int = 5
    batch_size: int = 20
    seed: int = 31
    out: str = "runs/effects_b_lora"

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        check_parts(self.parts, PARTS)
        check_counts(self, cases=4, steps=2, inversion_steps=6, grid_rows=1, batch_size=2)


def told_otherwise(some: Sequence[Asked], seed: int) -> list[Asked]:
    """Return for each prompt another one, of another object in another style before the same background."""
    others = prompts_of("", 4 * len(some), seed)
    found, at = [], 0
    for one in some:
        while others[at].object == one.object or others[at].style == one.style:
            at += 1
        x = others[at]
        text = f"{with_article(STYLE_WORDS[x.style])} of {with_article(x.object)} {BACKGROUND_WORDS[one.background]}"
        found.append(dataclasses.replace(x, prompt=text, background=one.background))
        at += 1
    return found


def answers(judges: Judges, images: np.ndarray) -> dict[str, list[str]]:
    """Return what the judge sees in pictures, by kind."""
    said = judges.scorer(images)
    return {kind: [getattr(judges.scorer, f"{kind}s")[k] for k in said[kind].argmax(-1)] for kind in
            ("object", "style", "background")}  # fmt: skip


def share(seen: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """Return 1 where the judge saw what was wanted."""
    return np.asarray([a == b for a, b in zip(seen, wanted, strict=True)], float)


def palette(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return the histograms (n, bins) of the colours of uint8 pictures within masks (n, h, w), which sum to 1."""
    cells = ((images.astype(int) * BINS) // 256 * [BINS * BINS, BINS, 1]).sum(-1)
    return np.stack([np.bincount(x[m], minlength=BINS**3) / max(m.sum(), 1) for x, m in zip(cells, masks, strict=True)])


def overlap(masks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the intersections of masks (n, h, w) with others over their unions."""
    return (masks & others).sum((1, 2)) / np.maximum((masks | others).sum((1, 2)), 1)


class Bench:
    """Draws prompts under conditions, `cases` of them each."""

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.out = cfg, Path(cfg.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.pipe = load_model(cfg.model)
        self.judges = Judges(jaxmix.ImageEncoder.load(cfg.image_encoder))
        self.studio = Studio(self.out, self.pipe, cfg.seed)

    def draw(self, title: str, prompts: Sequence[str], methods: Any = lambda index: (), key: Any = "") -> np.ndarray:
        """Return a picture of each prompt; `methods(index)` are those for the cases of an index."""

        def each(index: list[int], seeds: list[int]) -> np.ndarray:
            return self.pipe.generate([prompts[i] for i in index], seeds, self.cfg.steps, methods=methods(index))

        full = ["b_lora", key, self.cfg.steps, list(prompts)]
        return self.studio.draw(full, len(prompts), filled(each, self.cfg.batch_size), self.cfg.batch_size, title)

    def show(self, name: str, drawn: dict[str, np.ndarray], captions: Sequence[str]) -> None:
        """Write a sheet of the first cases under all conditions."""
        rows = slice(0, self.cfg.grid_rows)
        path = labelled_grid(self.out / name, [(k, x[rows]) for k, x in drawn.items()], captions[rows], 2)
        print(f"wrote {path}, {path.stat().st_size / 1e3:.0f} kB", flush=True)


def pattern_of(block: str) -> str:
    """Return the pattern of a block's layers."""
    return f"^{re.escape(block)}\\."


def blocks_of(pipe: jaxmix.Pipeline) -> list[str]:
    """Return the names of the blocks with cross-attention, in the order in which they run."""
    return list(dict.fromkeys(name.split(".transformer_blocks")[0] for name in layer_names(pipe).values()))


def measure_pairs(bench: Bench) -> dict[str, dict[str, np.ndarray]]:
    """Tell each block another object and each other block another style, and measure whether both are drawn."""
    some = prompts_of("", bench.cfg.cases, bench.cfg.seed)
    other = told_otherwise(some, bench.cfg.seed + 1)

    def said(style: Asked, thing: Asked) -> str:
        where = BACKGROUND_WORDS[thing.background]
        return f"{with_article(STYLE_WORDS[style.style])} of {with_article(thing.object)} {where}"

    prompts = [x.prompt for x in some]
    objects = [said(x, y) for x, y in zip(some, other, strict=True)]
    styles = [said(y, x) for x, y in zip(some, other, strict=True)]
    plain = bench.draw(f"blocks: {BASE}", prompts)
    found = {BASE: _both(answers(bench.judges, plain), other)}
    for content, style in itertools.permutations(blocks_of(bench.pipe), 2):
        at = {pattern_of(content): objects, pattern_of(style): styles}

        def told(index: list[int], at: Any = at) -> tuple[Any, ...]:
            return (jaxmix.LayerPrompts([{".": prompts[i], **{k: v[i] for k, v in at.items()}} for i in index]),)

        name = f"object: {content}, style: {style}"
        found[name] = _both(answers(bench.judges, bench.draw(f"pairs: {name}", prompts, told, at)), other)
    return found


def _both(seen: dict[str, list[str]], other: Sequence[Asked]) -> dict[str, np.ndarray]:
    right = {f"{kind} told": share(seen[kind], [getattr(x, kind) for x in other]) for kind in ("object", "style")}
    return {**right, "both": right["object told"] * right["style told"]}


def measure_blocks(bench: Bench) -> dict[str, dict[str, np.ndarray]]:
    """Tell each block alone another prompt, and measure which object and which style is drawn."""
    some = prompts_of("", bench.cfg.cases, bench.cfg.seed)
    other = told_otherwise(some, bench.cfg.seed + 1)
    prompts, drawn = [x.prompt for x in some], {}
    drawn[BASE] = bench.draw(f"blocks: {BASE}", prompts)
    for block in blocks_of(bench.pipe):
        pattern = pattern_of(block)

        def told(index: list[int], pattern: str = pattern) -> tuple[Any, ...]:
            # All layers are named, the others by the prompt itself, so that one program serves every block.
            return (jaxmix.LayerPrompts([{".": prompts[i], pattern: other[i].prompt} for i in index]),)

        drawn[block] = bench.draw(f"blocks: {block}", prompts, told, [pattern, [x.prompt for x in other]])
    found = {}
    for name, images in drawn.items():
        seen = answers(bench.judges, images)
        found[name] = {
            "object told": share(seen["object"], [x.object for x in other]),
            "style told": share(seen["style"], [x.style for x in other]),
            "object kept": share(seen["object"], [x.object for x in some]),
            "style kept": share(seen["style"], [x.style for x in some]),
        }
    captions = [f"{x.prompt} | told: {y.prompt}" for x, y in zip(some, other, strict=True)]
    bench.show("blocks.png", drawn, captions)
    return found


def measure_halves(bench: Bench) -> dict[str, Any]:
    """Draw with the whole B-LoRA, each half, and mixtures, where the style is asked for and where the content is."""
    cfg = bench.cfg
    files = [jaxmix.LoRA.load(path, bench.pipe) for path in cfg.loras]
    plain: dict[str, Any] = {"two_objects": 0.0, "three_objects": 0.0, "labelled": 0.0, "styles": (cfg.subject_style,)}
    (row,) = SubjectScenes(Scenes(split="held_out_objects", **plain), cfg.subject, 1).rows
    shown = row["image"]
    told = f"a {cfg.word} of {row['template'].partition(' of ')[2].format(cfg.subject)}"

    def masks_of(images: np.ndarray) -> np.ndarray:
        return bench.judges.segmenter(images, min(128, len(images))) > 0.5

    picture, colours = bench.judges.see(shown[None])[0], palette(shown[None], masks_of(shown[None]))[0]
    some = prompts_of("", cfg.cases, cfg.seed + 2)
    asked = {
        "The picture's style for known objects": [
            f"a {cfg.word} of {with_article(x.object)} {BACKGROUND_WORDS[x.background]}" for x in some
        ],
        "The picture's content in known styles": [
            f"{with_article(STYLE_WORDS[x.style])} of a {cfg.word} {BACKGROUND_WORDS[x.background]}" for x in some
        ],
    }
    whole = files[0]
    conditions: dict[str, tuple[Any, ...]] = {BASE: (), "both halves": (whole.on(),)}
    conditions |= {f"{name} half": (whole.only(name).on(),) for name in HALVES}
    conditions |= {
        f"style of picture {i}, content of 1": (other.only("style").on(), whole.only("content").on())
        for i, other in enumerate(files[1:], 2)
    }
    found: dict[str, Any] = {}
    for title, prompts in asked.items():
        drawn = {}
        for name, methods in conditions.items():
            key = [digest(m.lora.parts) for m in methods]
            drawn[name] = bench.draw(f"{title}: {name}", prompts, lambda index, m=methods: m, key)
        if cfg.adapter and title.startswith("The picture's style"):
            adapter = jaxmix.IPAdapter.load(cfg.adapter, bench.pipe)

            def follow(index: list[int], adapter: Any = adapter) -> tuple[Any, ...]:
                return (adapter.on([shown] * len(index), scale=1.0, blocks="style"),)

            drawn["InstantStyle"] = bench.draw(f"{title}: InstantStyle", prompts, follow, [cfg.adapter, "style"])
        if title.startswith("The picture's style"):

            def aligned(index: list[int], seeds: list[int], prompts: list[str] = prompts) -> np.ndarray:
                texts, both = (
                    [x for i in index for x in (told, prompts[i])],
                    [x for seed in seeds for x in (seed, seed)],
                )
                method = jaxmix.StyleAligned([2] * len(index), pictures=dict.fromkeys(range(len(index)), shown))
                return bench.pipe.generate(texts, both, cfg.inversion_steps, methods=(method,), sampler="ddim")[1::2]

            key = ["b_lora", "StyleAligned", cfg.inversion_steps, told, digest(shown), prompts]
            each = filled(aligned, cfg.batch_size // 2)
            drawn["StyleAligned"] = bench.studio.draw(
                key, len(prompts), each, cfg.batch_size // 2, f"{title}: StyleAligned"
            )
        found[title] = {}
        own = masks_of(drawn[BASE])
        for name, images in drawn.items():
            seen, masks = answers(bench.judges, images), masks_of(images)
            found[title][name] = {
                "CLIP-I picture": bench.judges.see(images) @ picture,
                "colours": np.minimum(palette(images, masks), colours).sum(-1),
                "shape kept": overlap(masks, own),
                "picture's style": share(seen["style"], [cfg.subject_style] * len(some)),
                **{k: share(seen[k], [getattr(x, k) for x in some]) for k in ("object", "style", "background")},
            }
            del found[title][name]["style" if title.startswith("The picture's style") else "object"]
        drawn = {"the picture": np.repeat(shown[None], len(some), 0), **drawn}
        bench.show(f"{title.split()[2]}.png", drawn, prompts)
    return found


def main(cfg: Config) -> int:
    """Draw, measure, print; write effects.json, effects.md and the pictures."""
    command.enable_compilation_cache()
    bench, found = Bench(cfg), dict[str, Any]()
    if "blocks" in cfg.parts:
        found["One block is told another object in another style"] = measure_blocks(bench)
    if "pairs" in cfg.parts:
        found["One block is told another object, and one another style"] = measure_pairs(bench)
    if "halves" in cfg.parts and cfg.loras:
        found |= measure_halves(bench)
    told = "\n\n".join(table(title, measured, BASE, {}) for title, measured in found.items())
    print(told)
    numbers = {title: means(measured) for title, measured in found.items()}
    (bench.out / "effects.json").write_text(json.dumps(numbers | {"config": dataclasses.asdict(cfg)}, indent=1) + "\n")
    (bench.out / "effects.md").write_text(told + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    command.run(main)
