"""Measure what DenseDiffusion, StyleAligned, StyleID and MagicFusion do to the embedded model's pictures.

Paired differences with intervals, on cases that training never shows, against plain prompting, the papers' ablations
and other baselines. Pictures are kept under `out`, so an interrupted run can be resumed.

    python -m scripts.effects.training_free --out runs/effects_training_free
    python -m scripts.effects.training_free --methods dense,aligned --cases 40
    python -m scripts.effects.training_free --methods fusion --expert runs/pixel/pipeline
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxmix import command
from jaxmix.types import InputError
from scripts.effects import fusion, layouts, styles
from scripts.effects.draw import digest
from scripts.effects.measures import round_trip
from scripts.effects.pictures import labelled_grid
from scripts.effects.studio import Studio, means, table
from scripts.effects.vmix import load_model
from train.scenes import SIZE
from train.scorer import load_scorer
from train.segmenter import load_segmenter

METHODS = ("dense", "aligned", "styleid", "fusion")


@dataclasses.dataclass
class Config:
    """What to measure.

    Attributes:
        methods: some of dense, aligned, styleid, fusion, separated by commas.
        model: "mini" or a diffusers folder whose images have the judges' size.
        expert: diffusers folder of the expert for fusion (configs/mini_pixel.yaml trains one); left out if empty.
        cases: layouts of each number of objects, sets, pairs of pictures or of prompts; each drawn once per condition.
        steps: steps of StyleID and its inversions; the other methods take the model's own.
        grid_rows: cases on the pictures.
        batch_size: pictures drawn at a time.
        seed: of the cases and of the first picture.
        out: folder for effects.json, effects.md, the pictures and what is kept between runs.
    """

    methods: str = ",".join(METHODS)
    model: str = "mini"
    expert: str = ""
    cases: int = 200
    steps: int = 50
    grid_rows: int = 4
    batch_size: int = 20
    seed: int = 11
    out: str = "runs/effects_training_free"

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        for name, least in (("cases", 2), ("steps", 2), ("grid_rows", 1), ("batch_size", styles.SET)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: found {getattr(self, name)}, expected {least} or more")
        if unknown := [m for m in self.methods.split(",") if m not in METHODS]:
            raise InputError(f"methods: found {unknown[0]!r}, expected some of {', '.join(METHODS)}")
        if "fusion" in self.methods.split(",") and not self.expert and self.methods != Config.methods:
            raise InputError("methods: found fusion, expected also --expert, the folder of a fine-tuned model")


def dense(cfg: Config, studio: Studio, judges: Any) -> dict[str, Any]:
    """Measure layouts of two and of three objects, under captions that name their places and captions that do not.

    The ablations are for two objects under captions that do not: otherwise the words do nearly everything.
    """
    pipe = studio.pipe
    segmenter, scorer = judges
    found: dict[str, Any] = {}
    for count, worded in ((2, False), (3, False), (2, True), (3, True)):
        some = layouts.cases(cfg.cases, cfg.seed, count, worded)
        cases = [(c.caption, c.objects) for c in some]
        real = layouts.real(some)
        drawn = {"real scenes": real, "real scenes after the autoencoder": round_trip(pipe, real, cfg.batch_size)}
        for name, arguments in layouts.conditions(pipe).items():
            if (worded or count > 2) and name not in layouts.MAIN:
                continue

            def draw(rows: slice, seeds: list[int], arguments: layouts.Draw = arguments) -> np.ndarray:
                part = some[rows]  # noqa: B023 - drawn before the next count
                return pipe.generate(**{"prompts": [c.caption for c in part], "seeds": seeds, **arguments(part)})

            drawn[name] = studio.draw(["dense", count, name, cases], len(some), draw, cfg.batch_size)
        measured = {name: layouts.measure(images, some, scorer, segmenter) for name, images in drawn.items()}
        where = "captions say the places" if worded else "captions say no place"
        found[f"DenseDiffusion, {count} objects, {where}"] = (measured, "plain prompt")
        places = np.stack([_layout(case) for case in some[: cfg.grid_rows]])
        columns = [("layout", places), *((name, drawn[name]) for name in layouts.MAIN)]
        picture = Path(cfg.out) / f"dense_{count}{'' if worded else '_unsaid'}.png"
        labelled_grid(picture, columns, [c.caption for c in some[: cfg.grid_rows]])
    return found


def _layout(case: layouts.Case) -> np.ndarray:
    colors = np.asarray([[230, 90, 90], [90, 170, 90], [90, 110, 220]], np.uint8)
    image = np.full((SIZE, SIZE, 3), 245, np.uint8)
    for color, segment in zip(colors, case.segments, strict=False):
        image[np.asarray(segment.mask)] = color
    return image


def aligned(cfg: Config, studio: Studio, judges: Any) -> dict[str, Any]:
    """Measure sets drawn in the style of their first image."""
    pipe = studio.pipe
    some = styles.sets(cfg.cases, cfg.seed)
    drawn = {}
    for name, controls in styles.set_controls(pipe).items():

        def draw(rows: slice, seeds: list[int], name: str = name, controls: Any = controls) -> np.ndarray:
            prompts = styles.prompts_of(name, some[rows])
            each = [seed * styles.SET + i for seed in seeds for i in range(styles.SET)]
            images = pipe.generate(prompts, each, controls=controls(len(seeds)))
            return images.reshape(len(seeds), styles.SET, *images.shape[1:])

        sets = studio.draw(
            ["aligned", name, "", [one.prompts for one in some]], len(some), draw, max(1, cfg.batch_size // styles.SET)
        )
        drawn[name] = sets.reshape(-1, *sets.shape[2:])
    measured = {name: styles.measure_sets(images, some, judges[1]) for name, images in drawn.items()}
    shown = ("plain prompts", "StyleAligned", "swapped (visual style prompting)")
    columns = [(name, styles.strips(drawn[name])) for name in shown]
    captions = ["; ".join(one.prompts) for one in some[: cfg.grid_rows]]
    labelled_grid(Path(cfg.out) / "aligned.png", columns, captions, enlarge=2)
    return {"StyleAligned, sets of four": (measured, "plain prompts")}


def styleid(cfg: Config, studio: Studio, judges: Any) -> dict[str, Any]:
    """Measure real pictures redrawn in the style of others."""
    pipe = studio.pipe
    segmenter, scorer = judges
    some = styles.pairs(cfg.cases, cfg.seed)
    mark = digest([some.content, some.style])
    drawn = {"content after the autoencoder": round_trip(pipe, some.content, cfg.batch_size)}
    for pairing, transfers in styles.by_pairing().items():

        def draw(rows: slice, seeds: list[int], pairing: str = pairing, transfers: Any = transfers) -> np.ndarray:
            return styles.transfer(pipe, some, rows, pairing, transfers.values(), cfg.steps)

        key = ["styleid", "pairing", pairing, cfg.steps, mark, transfers]
        images = studio.draw(key, cfg.cases, draw, cfg.batch_size)
        drawn |= {name: images[:, i] for i, name in enumerate(transfers)}
    measured = {name: styles.measure_transfer(images, some, scorer, segmenter) for name, images in drawn.items()}
    start = drawn["content after the autoencoder"]
    for name, images in drawn.items():
        measured[name] = {**measured[name], "psnr": styles.psnr(images, start)}
    measured["content after the autoencoder"]["psnr"] = np.full((cfg.cases,), np.nan)
    shown = ("StyleID", "without injection", "without AdaIN", "gamma 0.3", "gamma 1")
    columns = [("content", some.content), ("style", some.style), *((name, drawn[name]) for name in shown)]
    labelled_grid(Path(cfg.out) / "styleid.png", columns, [""] * cfg.grid_rows)
    return {"StyleID, real pictures": (measured, "content after the autoencoder")}


def fuse(cfg: Config, studio: Studio, judges: Any) -> dict[str, Any]:
    """Measure two models in one picture."""
    pipe = studio.pipe
    expert = load_model(cfg.expert)
    some = fusion.fused(cfg.cases, cfg.seed)
    mark = [digest(expert.params), [(one.general, one.expert) for one in some]]

    def alone(rows: slice, seeds: list[int]) -> np.ndarray:
        return expert.generate([one.expert for one in some[rows]], seeds)

    def mean(rows: slice, seeds: list[int]) -> np.ndarray:
        return fusion.average(pipe, expert, some[rows], seeds)

    drawn = {
        "expert alone": studio.draw(["fusion", "expert", "", mark], cfg.cases, alone, cfg.batch_size),
        "mean of both": studio.draw(["fusion", "mean", "", mark], cfg.cases, mean, cfg.batch_size),
    }
    for name, options in fusion.SWITCHES.items():

        def draw(rows: slice, seeds: list[int], options: Any = options) -> np.ndarray:
            part = some[rows]
            extra = {} if options is None else fusion.arguments(options, part, expert)
            return pipe.generate([one.general for one in part], seeds, **extra)

        drawn[name] = studio.draw(["fusion", name, options, mark], cfg.cases, draw, cfg.batch_size)
    base = "general model alone"
    drawn = {base: drawn[base], **drawn}
    measured = {name: fusion.measure_fused(images, some, judges[1]) for name, images in drawn.items()}
    for name, measures in measured.items():
        measures["expert's area"] = np.full((cfg.cases,), np.nan)
        if (k := fusion.AREAS.get(name)) is None:
            continue

        def area(rows: slice, seeds: list[int], k: float = k) -> np.ndarray:
            return fusion.areas(pipe, expert, some[rows], seeds, k)

        key = ["fusion", "area", f"k_expert {k:g}", mark]
        measures["expert's area"] = studio.draw(key, cfg.cases, area, cfg.batch_size)
    shown = (
        "general model alone",
        "expert alone",
        "mean of both",
        "MagicFusion, mode 2, switch 600",
        "mode 1, switch 850",
    )
    captions = [f"{one.general}  +  {one.expert}" for one in some[: cfg.grid_rows]]
    labelled_grid(Path(cfg.out) / "fusion.png", [(n.split(", switch")[0], drawn[n]) for n in shown], captions)
    return {"MagicFusion, two models": (measured, base)}


RUN = {"dense": dense, "aligned": aligned, "styleid": styleid, "fusion": fuse}


def main(cfg: Config) -> int:
    """Draw, measure, print; write effects.json, effects.md and the pictures."""
    command.enable_compilation_cache()
    pipe = load_model(cfg.model)
    judges = load_segmenter(), load_scorer()
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    studio, found = Studio(Path(cfg.out), pipe, cfg.seed), {}
    for name in cfg.methods.split(","):
        if name == "fusion" and not cfg.expert:
            print("fusion: left out, --expert names no model", flush=True)
            continue
        found |= RUN[name](cfg, studio, judges)
    text = "\n\n".join(table(title, measured, base, {}) for title, (measured, base) in found.items())
    print(text)
    numbers = {title: means(measured) for title, (measured, _) in found.items()}
    out = Path(cfg.out)
    (out / "effects.json").write_text(json.dumps({"config": dataclasses.asdict(cfg), **numbers}, indent=1) + "\n")
    (out / "effects.md").write_text(text + "\n", encoding="utf-8")
    print(f"wrote {out}/effects.json, effects.md and the pictures")
    return 0


if __name__ == "__main__":
    command.run(main)
