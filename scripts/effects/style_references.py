"""Measure every method that takes a style from a picture at one task: a prompt, and a reference for its style.

StyleAdapter with the paper's ablations (the class token, the shuffle, several references), InstantStyle, StyleAligned,
Visual Style Prompting and StyleID, on references of pairs of object and style that nothing was trained on: the style
that comes, the objects of prompt and reference that are drawn, and seconds. Pictures are kept under `out`.

    python -m scripts.effects.style_references --out runs/effects_style_references
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.methods.ip_adapter import EMBEDDED as PICTURES
from jaxmix.methods.style_adapter import EMBEDDED as STYLES
from scripts.effects import styles
from scripts.effects.draw import digest
from scripts.effects.image_prompts import Case, Judges, make_cases
from scripts.effects.pictures import labelled_grid
from scripts.effects.studio import Studio, check_counts, filled, means, table
from scripts.effects.vmix import load_model
from train.scenes import Plan, Scenes
from train.scenes.captions import BACKGROUND_WORDS

SEVERAL = 3  # references of a style
Draw = Callable[[Sequence[int], list[int]], np.ndarray]


@dataclasses.dataclass
class Config:
    """What to measure.

    Attributes:
        model: "mini" or a diffusers folder whose images have the judges' size.
        style: "mini-style" or the file of a StyleAdapter for it; left out if empty.
        adapter: "mini-ip" or the file of an IP-Adapter for it; left out if empty.
        image_encoder: the CLIP that they read with, and that judges pictures.
        style_blocks: preset or pattern of the attn2 that listen to the IP-Adapter in InstantStyle.
        cases: references, each drawn once per condition.
        steps: sampling steps; the model's own default if null.
        inversion_steps: steps of the methods that invert the reference.
        grid_rows: cases on the picture.
        batch_size: pictures drawn at a time.
        seed: of the cases and of the first picture.
        out: folder for effects.json, effects.md, the picture and what is kept between runs.
    """

    model: str = "mini"
    style: str = "mini-style"
    adapter: str = "mini-ip"
    image_encoder: str = "mini-clip"
    style_blocks: str = "style"
    cases: int = 200
    steps: int | None = None
    inversion_steps: int = 50
    grid_rows: int = 5
    batch_size: int = 20
    seed: int = 19
    out: str = "runs/effects_style_references"

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        check_counts(self, cases=2, grid_rows=1, batch_size=1, inversion_steps=2)


def more_references(cases: Sequence[Case], seed: int) -> list[list[np.ndarray]]:
    """Return for each case its reference and further scenes of the same style, of other objects and backgrounds."""
    scenes = Scenes(split="all", seed=seed, two_objects=0.0, three_objects=0.0)
    backgrounds = sorted(BACKGROUND_WORDS)
    found = []
    for i, case in enumerate(cases):
        rng = np.random.Generator(np.random.Philox(key=[seed, (0x57 << 32) + i]))
        pool = [
            o for s, o in scenes.pairs if s == case.style and scenes.atlas.objects[o] not in (case.object, case.other)
        ]
        chosen = rng.choice(pool, SEVERAL - 1, replace=False)
        plans = [Plan(case.style, (int(o),), backgrounds[rng.integers(len(backgrounds))]) for o in chosen]
        found.append([case.image, *(np.asarray(scenes.render(plan, rng)[0]).astype(np.uint8) for plan in plans)])
    return found


def conditions(cfg: Config, pipe: jaxmix.Pipeline, encoder: Any, cases: Sequence[Case]) -> dict[str, Draw]:
    """Return what draws some of the cases with given seeds, by the name of the condition."""
    several = more_references(cases, cfg.seed)

    def plain(index: Sequence[int], seeds: list[int], *methods: Any) -> np.ndarray:
        return pipe.generate([cases[i].prompt for i in index], seeds, cfg.steps, methods=methods)

    made: dict[str, Draw] = {"prompt alone": plain}
    if cfg.style:
        adapter = jaxmix.StyleAdapter.load(cfg.style, pipe, encoder)

        def styled(count: int = 1, **options: Any) -> Draw:
            return lambda index, seeds: plain(index, seeds, adapter.on([several[i][:count] for i in index], **options))

        made |= {
            "StyleAdapter": styled(),
            f"StyleAdapter, {SEVERAL} references": styled(SEVERAL),
            "StyleAdapter, with the class token": styled(class_token=True),
            "StyleAdapter, without the shuffle": styled(shuffle=False),
            "StyleAdapter, neither": styled(class_token=True, shuffle=False),
        }
    if cfg.adapter:
        reader = jaxmix.IPAdapter.load(cfg.adapter, pipe, encoder)

        def read(**options: Any) -> Draw:
            return lambda index, seeds: plain(index, seeds, reader.on([[cases[i].image] for i in index], **options))

        made |= {"IP-Adapter": read(), "InstantStyle": read(blocks=cfg.style_blocks)}

    def aligned(**options: Any) -> Draw:
        def draw(index: Sequence[int], seeds: list[int]) -> np.ndarray:
            prompts = [x for i in index for x in (cases[i].caption, cases[i].prompt)]
            pictures = {k: cases[i].image for k, i in enumerate(index)}
            method = jaxmix.StyleAligned([2] * len(index), pictures=pictures, **options)
            each = [x for seed in seeds for x in (seed, seed)]
            return pipe.generate(prompts, each, cfg.inversion_steps, methods=(method,), sampler="ddim")[1::2]

        return draw

    def transferred(index: Sequence[int], seeds: list[int]) -> np.ndarray:
        content = plain(index, seeds)
        some = styles.Pairs(
            content, np.stack([cases[i].image for i in index]), np.zeros(len(index)), (), np.zeros(content.shape[:3])
        )
        rows = slice(0, len(index))
        return styles.transfer(pipe, some, rows, "reference", [styles.TRANSFERS["StyleID"]], cfg.inversion_steps)[:, 0]

    made |= {
        "StyleAligned": aligned(),
        "Visual Style Prompting": aligned(swap=True),
        "prompt alone, then StyleID": transferred,
    }
    return made


def main(cfg: Config) -> int:
    """Draw, measure, time, print; write effects.json, effects.md and the picture."""
    command.enable_compilation_cache()
    pipe, out = load_model(cfg.model), Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    encoder = jaxmix.ImageEncoder.load(cfg.image_encoder)
    judges, cases, studio = Judges(encoder), make_cases(cfg.cases, cfg.seed), Studio(out, pipe, cfg.seed)
    mark = [digest([c.image for c in cases]), *(digest(_weights(path)) for path in (cfg.style, cfg.adapter))]
    drawn: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    for name, draw in conditions(cfg, pipe, encoder, cases).items():
        key = ["style references", name, cfg.steps, cfg.inversion_steps, cfg.style_blocks, mark]
        drawn[name] = studio.draw(key, len(cases), filled(draw, cfg.batch_size), cfg.batch_size, name)
        first = list(range(min(cfg.batch_size, len(cases))))
        spent = []
        for _ in range(2):  # the first call may compile
            began = time.perf_counter()
            draw(first, [cfg.seed + i for i in first])
            spent.append(time.perf_counter() - began)
        seconds[name] = spent[-1] / len(first)
    measured: dict[str, Mapping[str, np.ndarray]] = {}
    for name, images in drawn.items():
        distance = styles.gram_distance(images, np.stack([c.image for c in cases]))
        measured[name] = {**judges.both(images, cases), "gram": distance}
    columns = [("reference", np.stack([c.image for c in cases])), *drawn.items()]
    rows = [(name, images[: cfg.grid_rows]) for name, images in columns]
    path = labelled_grid(out / "styles.png", rows, [c.prompt for c in cases[: cfg.grid_rows]], 2)
    text = table("A prompt, and a picture for its style", measured, "prompt alone", {})
    told = ", ".join(f"{name} {spent:.3f}" for name, spent in seconds.items())
    text += f"\n\nSeconds a picture, of one batch of {min(cfg.batch_size, len(cases))}: {told}"
    print(f"{text}\nwrote {path}")
    numbers = {"config": dataclasses.asdict(cfg), "A prompt, and a picture for its style": means(measured)}
    numbers["seconds"] = seconds
    (out / "effects.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (out / "effects.md").write_text(text + "\n", encoding="utf-8")
    return 0


def _weights(path: str) -> Any:
    file = {**STYLES, **PICTURES}.get(path, Path(path))
    return {"file": np.frombuffer(file.read_bytes(), np.uint8)} if path else {}


if __name__ == "__main__":
    command.run(main)
