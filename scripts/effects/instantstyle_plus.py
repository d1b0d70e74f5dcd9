"""Measure InstantStyle-Plus: contents drawn again in the style of others, beside other methods, and without its parts.

Contents and styles are real scenes of objects in styles that nothing was trained on; captions name the content's object
and background, never a style. Pictures are kept under `out`.

    python -m scripts.effects.instantstyle_plus --steps 10 --out runs/effects_instantstyle_plus
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
from scripts.effects import styles
from scripts.effects.controlnets import edges_f1
from scripts.effects.draw import digest
from scripts.effects.image_prompts import Case, Judges, make_cases
from scripts.effects.measures import round_trip
from scripts.effects.pictures import labelled_grid
from scripts.effects.studio import Measured, Studio, check_counts, check_parts, filled, means, table
from scripts.effects.vmix import load_model

PLAIN = jaxmix.ReNoise(0, regularise=False)
ALONE = "InstantStyle-Plus"


@dataclasses.dataclass
class Config:
    """What to measure.

    Attributes:
        parts: which of methods (beside others) and ablations.
        model: "mini" or a diffusers folder whose images have the judges' size.
        adapter: "mini-ip" or the file of an IP-Adapter for it, which shows content and style.
        tile: "mini-tile" or the folder of a tile ControlNet for it.
        image_encoder: the CLIP that it reads with, that guides, and that judges pictures.
        style_guidance: weight of guidance by the style where it is on.
        content_guidance: weight of guidance by the content there.
        cases: pairs of content and style, each drawn once by every method.
        ablations: of these, how many are drawn without each part.
        steps: steps of inversions and runs.
        guidance_scale: of the caption.
        grid_rows: cases on the pictures.
        batch_size: pictures drawn at a time.
        seed: of the cases and of the first picture.
        out: folder for effects.json, effects.md, the pictures and what is kept between runs.
    """

    parts: str = "methods,ablations"
    model: str = "mini"
    adapter: str = "mini-ip"
    tile: str = "mini-tile"
    image_encoder: str = "mini-clip"
    style_guidance: float = 0.1
    content_guidance: float = 0.1
    cases: int = 200
    ablations: int = 60
    steps: int = 50
    guidance_scale: float = 3.0
    grid_rows: int = 5
    batch_size: int = 20
    seed: int = 21
    out: str = "runs/effects_instantstyle_plus"

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        check_counts(self, cases=2, ablations=2, steps=2, grid_rows=1, batch_size=1)
        check_parts(self.parts, ("methods", "ablations"))


@dataclasses.dataclass(frozen=True)
class Pair:
    """A content and a style of another kind, and a caption of the content that names no style."""

    content: Case
    style: Case
    caption: str


def make_pairs(n: int, seed: int) -> list[Pair]:
    """Return n pairs; pair i does not change when n grows."""
    scenes = make_cases(2 * n + 40, seed)
    found = []
    for i in range(n):
        content, further = scenes[2 * i], scenes[2 * i + 1 :]
        style = next(x for x in further if x.style != content.style and x.object != content.object)
        found.append(Pair(content, style, content.caption.split(" of ", 1)[1]))
    return found


Draw = Callable[[Sequence[Pair], list[int]], np.ndarray]


def methods(cfg: Config, pipe: jaxmix.Pipeline, encoder: Any) -> tuple[dict[str, Draw], dict[str, Draw]]:
    """Return what draws pairs with given seeds: by other methods, and without each part of this one."""
    adapter = jaxmix.IPAdapter.load(cfg.adapter, pipe, encoder)
    tile = jaxmix.ControlNet.load(cfg.tile, pipe)
    whole = {"content_adapter": adapter, "style_adapter": adapter, "tile": tile, "tile_map": "tile:8"}

    def plus(guidance_scale: float = cfg.guidance_scale, **changes: Any) -> Draw:
        options = {**whole, **changes}
        styled = options["style_adapter"] is not None or "guide" in options

        def draw(some: Sequence[Pair], seeds: list[int]) -> np.ndarray:
            pictures: dict[str, Any] = {"content": [p.content.image for p in some]}
            if styled:
                pictures["style"] = [p.style.image for p in some]
            method = jaxmix.InstantStylePlus(**pictures, **options)
            captions = [p.caption for p in some]
            return pipe.generate(captions, seeds, cfg.steps, guidance_scale, methods=(method,), sampler="ddim")

        return draw

    def instantstyle(some: Sequence[Pair], seeds: list[int]) -> np.ndarray:
        method = adapter.on([[p.style.image] for p in some], 1.0, blocks="style")
        return pipe.generate([p.caption for p in some], seeds, cfg.steps, cfg.guidance_scale, methods=(method,))

    def style_id(some: Sequence[Pair], seeds: list[int]) -> np.ndarray:
        method = jaxmix.StyleID([p.content.image for p in some], [p.style.image for p in some])
        return pipe.generate([""] * len(some), seeds, cfg.steps, methods=(method,), sampler="ddim")

    def aligned(some: Sequence[Pair], seeds: list[int]) -> np.ndarray:
        prompts = [x for p in some for x in (p.style.caption, p.caption)]
        method = jaxmix.StyleAligned([2] * len(some), pictures={k: p.style.image for k, p in enumerate(some)})
        each = [x for seed in seeds for x in (seed, seed)]
        return pipe.generate(prompts, each, cfg.steps, cfg.guidance_scale, methods=(method,), sampler="ddim")[1::2]

    guided = {"guide": encoder, "style_guidance": cfg.style_guidance, "content_guidance": cfg.content_guidance}
    off = {"content_adapter": None, "style_adapter": None, "tile": None}
    return (
        {ALONE: plus(), "StyleID": style_id, "StyleAligned": aligned, "InstantStyle": instantstyle},
        {
            ALONE: plus(),
            "without ReNoise": plus(renoise=PLAIN),
            "without the tile net": plus(tile=None),
            "without the content adapter": plus(content_adapter=None),
            "without the style adapter": plus(style_adapter=None),
            "the style in all blocks": plus(style_blocks=None),
            "with guidance by CLIP": plus(**guided),
            "all off, guidance 1": plus(1.0, renoise=PLAIN, **off),
            "ReNoise alone, guidance 1": plus(1.0, **off),
        },
    )


def measure(judges: Judges, images: np.ndarray, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """Measure what was kept of the contents, and what came of the styles."""
    contents, given = [p.content for p in pairs], [p.style for p in pairs]
    kept, came = judges.follow(images, contents), judges.follow(images, given)
    real = np.stack([c.image for c in contents])
    return {
        "edges F1": edges_f1(images, real),
        "layout IoU": kept["layout IoU"],
        "object": kept["object"],
        "background": kept["background"],
        "CLIP-I content": kept["CLIP-I"],
        "PSNR content": styles.psnr(images, real),
        "style": came["style"],
        "gram style": styles.gram_distance(images, np.stack([g.image for g in given])),
    }


def main(cfg: Config) -> int:
    """Draw, measure, time, print; write effects.json, effects.md and the pictures."""
    command.enable_compilation_cache()
    pipe, out = load_model(cfg.model), Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    encoder = jaxmix.ImageEncoder.load(cfg.image_encoder)
    judges, studio, every = Judges(encoder), Studio(out, pipe, cfg.seed), make_pairs(cfg.cases, cfg.seed)
    adapter, net = jaxmix.IPAdapter.load(cfg.adapter, pipe, encoder), jaxmix.ControlNet.load(cfg.tile, pipe)
    mark = [digest({"p": adapter.projection, "l": dict(adapter.layers)}), digest(net.params)]
    seconds: dict[str, float] = {}

    def table_of(title: str, conditions: Mapping[str, Draw], pairs: Sequence[Pair], file: str) -> dict[str, Any]:
        seen = digest([p.content.image for p in pairs] + [p.style.image for p in pairs])
        drawn: dict[str, np.ndarray] = {}
        for name, draw in conditions.items():

            def each(index: list[int], seeds: list[int], draw: Draw = draw) -> np.ndarray:
                return draw([pairs[i] for i in index], seeds)

            some = filled(each, cfg.batch_size)
            guided = (cfg.style_guidance, cfg.content_guidance) if "guidance by" in name else ()
            key = ["instantstyle plus", name, cfg.steps, cfg.guidance_scale, *guided, seen, mark]
            drawn[name] = studio.draw(key, len(pairs), some, cfg.batch_size, f"{title}: {name}")
            if name not in seconds:
                first = slice(0, min(cfg.batch_size, len(pairs)))
                for _ in range(2):  # the first call may compile
                    began = time.perf_counter()
                    some(first, [cfg.seed + i for i in range(first.stop)])
                    seconds[name] = (time.perf_counter() - began) / cfg.batch_size
        real = np.stack([p.content.image for p in pairs])
        drawn["the content after the autoencoder"] = round_trip(pipe, real, min(cfg.batch_size, len(pairs)))
        rows = cfg.grid_rows
        columns = [("content", real), ("style", np.stack([p.style.image for p in pairs])), *list(drawn.items())[:-1]]
        shown = [(name, images[:rows]) for name, images in columns]
        path = labelled_grid(out / file, shown, [p.caption for p in pairs[:rows]], 2)
        print(f"wrote {path}, {path.stat().st_size / 1e3:.0f} kB", flush=True)
        return {title: ({name: measure(judges, images, pairs) for name, images in drawn.items()}, ALONE)}

    beside, without = methods(cfg, pipe, encoder)
    found: dict[str, tuple[Measured, str]] = {}
    if "methods" in cfg.parts.split(","):
        found |= table_of("A content in the style of another picture", beside, every, "methods.png")
    if "ablations" in cfg.parts.split(","):
        found |= table_of("Without its parts", without, every[: cfg.ablations], "ablations.png")
    told = "\n\n".join(table(title, measured, base, {}) for title, (measured, base) in found.items())
    told += "\n\nSeconds a picture, of one batch: " + ", ".join(f"{name} {x:.3f}" for name, x in seconds.items())
    print(told)
    numbers = {title: means(measured) for title, (measured, _) in found.items()}
    numbers |= {"config": dataclasses.asdict(cfg), "seconds": seconds}  # type: ignore[dict-item]
    (out / "effects.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (out / "effects.md").write_text(told + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    command.run(main)
