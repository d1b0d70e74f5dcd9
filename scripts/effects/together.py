"""Measure four methods in one row: VMix for colours, a picture for the background, a ControlNet for the place, a LoRA.

The prompt names an object, and a style that the model never saw and the LoRA learnt; the mask says where it is, the
picture what is behind it, and the label that colours are vivid. Each is drawn alone and all of them together.

    python -m train.lora --config configs/lora_mini.yaml --output_dir runs/lora
    python -m scripts.effects.together --lora runs/lora/pytorch_lora_weights.safetensors --steps 10 --out runs/together
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxmix
from jaxmix import command
from scripts.effects.controlnets import make_map
from scripts.effects.draw import digest
from scripts.effects.image_prompts import Case, Judges, make_cases
from scripts.effects.pictures import labelled_grid
from scripts.effects.studio import Studio, check_counts, filled, means, table
from scripts.effects.vmix import load_model
from train.scenes import measure
from train.scenes.captions import STYLE_WORDS, with_article

STYLE = "pixel"  # held out of every training
NAMES = ("VMix", "IP-Adapter", "ControlNet", "LoRA")


@dataclasses.dataclass
class Config:
    """What to measure.

    Attributes:
        lora: a LoRA for the model that has learnt the held-out style.
        model: "mini" or a diffusers folder whose images have the judges' size.
        vmix: "mini-vmix" or the file of a VMix adapter for it.
        adapter: "mini-ip" or the file of an IP-Adapter for it.
        masks: "mini-masks" or the folder of a ControlNet that was trained on masks.
        image_encoder: the CLIP that the IP-Adapter reads with.
        ip_scale: strength of the picture.
        vmix_scale: strength of the label.
        cases: prompts, each drawn once under every condition.
        steps: of each run.
        grid_rows: cases on the picture.
        batch_size: pictures drawn at a time.
        seed: of the cases and of the first picture.
        out: folder for effects.json, effects.md, the picture and what is kept between runs.
    """

    lora: str = ""
    model: str = "mini"
    vmix: str = "mini-vmix"
    adapter: str = "mini-ip"
    masks: str = "mini-masks"
    image_encoder: str = "mini-clip"
    ip_scale: float = 0.6
    vmix_scale: float = 1.5
    cases: int = 100
    steps: int = 25
    grid_rows: int = 4
    batch_size: int = 20
    seed: int = 23
    out: str = "runs/together"

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        check_counts(self, cases=2, steps=2, grid_rows=1, batch_size=1)
        if not self.lora:
            raise jaxmix.InputError("lora: not given, expected a file by train.lora")


def main(cfg: Config) -> int:
    """Draw, measure, print; write effects.json, effects.md and the picture."""
    command.enable_compilation_cache()
    pipe, out = load_model(cfg.model), Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    encoder = jaxmix.ImageEncoder.load(cfg.image_encoder)
    judges, studio = Judges(encoder), Studio(out, pipe, cfg.seed)
    scenes = make_cases(2 * cfg.cases, cfg.seed)
    placed, seen = scenes[: cfg.cases], scenes[cfg.cases :]
    captions = [f"{STYLE_WORDS[STYLE]} of {with_article(case.object)}" for case in placed]
    maps = [make_map("masks", case) for case in placed]
    vmix, lora = jaxmix.VMix.load(cfg.vmix, pipe), jaxmix.LoRA.load(cfg.lora, pipe)
    adapter, net = jaxmix.IPAdapter.load(cfg.adapter, pipe, encoder), jaxmix.ControlNet.load(cfg.masks, pipe)

    def methods(names: Sequence[str], index: Sequence[int]) -> tuple[Any, ...]:
        made = {
            "VMix": lambda: vmix.on("color", cfg.vmix_scale),
            "IP-Adapter": lambda: adapter.on([[seen[i].image] for i in index], cfg.ip_scale),
            "ControlNet": lambda: net.on([maps[i] for i in index], 1.0),
            "LoRA": lambda: lora.on(1.0),
        }
        return tuple(made[name]() for name in names)

    mark = [digest(lora.parts), cfg.ip_scale, cfg.vmix_scale, digest([case.image for case in scenes]), cfg.steps]
    drawn: dict[str, np.ndarray] = {}
    for title, names in {"prompt alone": (), **{name: (name,) for name in NAMES}, "all four": NAMES}.items():

        def each(index: list[int], seeds: list[int], names: Sequence[str] = names) -> np.ndarray:
            return pipe.generate([captions[i] for i in index], seeds, cfg.steps, methods=methods(names, index))

        some = filled(each, cfg.batch_size)
        drawn[title] = studio.draw(["together", title, *mark], cfg.cases, some, cfg.batch_size, title)
    measured = {title: _measure(judges, images, placed, seen) for title, images in drawn.items()}
    rows = slice(0, cfg.grid_rows)
    shown = [("mask", np.stack(maps)[rows]), ("picture", np.stack([case.image for case in seen])[rows])]
    shown += [(title, images[rows]) for title, images in drawn.items()]
    path = labelled_grid(out / "together.png", shown, captions[rows], 2)
    told = table("Four methods in one row", measured, "prompt alone", {})
    print(f"wrote {path}, {path.stat().st_size / 1e3:.0f} kB\n\n{told}")
    numbers = {"found": means(measured), "config": dataclasses.asdict(cfg)}
    (out / "effects.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (out / "effects.md").write_text(told + "\n", encoding="utf-8")
    return 0


def _measure(judges: Judges, images: np.ndarray, placed: list[Case], seen: list[Case]) -> dict[str, np.ndarray]:
    """Measure what each method brings, and whether the prompt's object is there."""
    here, behind = judges.follow(images, placed), judges.follow(images, seen)
    styles = judges.scorer(images)["style"].argmax(-1)
    return {
        "saturation": np.asarray([measure(image)["color"] for image in images]),
        "picture's background": behind["background"],
        "masks IoU": here["layout IoU"],
        "pixel art": np.asarray([judges.scorer.styles[k] == STYLE for k in styles], float),
        "object": here["object"],
        "leaked object": behind["object"],
    }


if __name__ == "__main__":
    command.run(main)
