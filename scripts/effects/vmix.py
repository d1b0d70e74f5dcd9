"""Measure what a VMix adapter does to the embedded model's pictures, with intervals, on prompts never trained on.

Each dimension's own measure against the base and against the same words in the prompt; one label at a time beside real
labelled scenes; object and style accuracy; the attention maps; ablations; a fine-tuned model. Pictures are kept under
`out`, so an interrupted run can be resumed, and the tables of a finished one are reprinted at once.

    python -m scripts.effects.vmix --adapter mini-vmix --out runs/effects
    python -m scripts.effects.vmix --adapter runs/vmix/adapter.safetensors --finetuned runs/pixel/pipeline
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.types import InputError
from scripts.effects.draw import Condition, Studio
from scripts.effects.measures import (
    Measures,
    attention_distance,
    effects,
    make_prompts,
    measure_pictures,
    real_scenes,
    round_trip,
)
from scripts.effects.pictures import labelled_grid
from scripts.effects.report import SCORES, Findings, as_json, markdown, report
from scripts.effects.stats import Matrix, paired
from train.scenes import DIMENSIONS, SIZE
from train.scorer import load_scorer
from train.segmenter import load_segmenter

HELD_OUT, FINETUNED = "held_out_pairs", "held_out_style"


@dataclasses.dataclass
class Config:
    """What to measure.

    Attributes:
        adapter: "mini-vmix" or the safetensors file of a VMix adapter for color, light, focus and composition.
        model: "mini" or a diffusers folder that the adapter was trained for; its images have the judges' size.
        lora: strength of the LoRA that was trained along with the adapter; 0, or a file without one, leaves it out.
        scales: strengths (lambda) at which all labels are drawn; 1 is always included.
        lora_only: ablation, a VMix file of which only the LoRA is applied, at strength 1; left out if empty.
        value_only: ablation, a VMix file without LoRA, all labels at scale 1; left out if empty.
        full: ablation, diffusers folder of the model after full fine-tuning; left out if empty.
        finetuned: diffusers folder of the model after a fine-tune on the held-out style; left out if empty.
        prompts: held-out prompts, each drawn once per condition.
        scenes: real scenes of the same prompts for the reference.
        negative: share of the real scenes without a label that have its opposite, by dimension, as in training.
        map_prompts: prompts for the distance of the attention maps.
        grid_rows: prompts on the pictures, the first ones.
        steps: sampling steps; the model's own default if null.
        guidance_scale: guidance; the model's own default if null.
        batch_size: pictures drawn at a time.
        seed: of the prompts, the scenes and the first picture.
        markdown: also print the small table for a README.
        out: folder for effects.json, effects.md, the pictures and what is kept between runs.
    """

    adapter: str = "mini-vmix"
    model: str = "mini"
    lora: float = 1.0
    scales: list[float] = dataclasses.field(default_factory=lambda: [0.5, 1.0, 1.5, 2.0])
    lora_only: str = ""
    value_only: str = ""
    full: str = ""
    finetuned: str = ""
    prompts: int = 240
    scenes: int = 480
    negative: dict[str, float] = dataclasses.field(default_factory=lambda: {"focus": 0.5, "composition": 0.5})
    map_prompts: int = 16
    grid_rows: int = 6
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 32
    seed: int = 5
    markdown: bool = False
    out: str = "runs/effects"

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        for name, least in (("prompts", 2), ("scenes", 2), ("map_prompts", 1), ("grid_rows", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: found {getattr(self, name)}, expected {least} or more")
        if unknown := [name for name in self.negative if name not in DIMENSIONS]:
            raise InputError(f"negative: found {unknown[0]!r}, expected some of {', '.join(DIMENSIONS)}")
        if any(scale <= 0 for scale in self.scales):
            raise InputError(f"scales: found {self.scales}, expected numbers above 0 (the base is drawn anyhow)")


def load_model(path: str) -> jaxmix.Pipeline:
    """Load a pipeline, refusing one whose pictures the judges cannot read."""
    pipe = jaxmix.load(path)
    side = pipe.latent_shape[0] * pipe.vae.config.factor
    if side != SIZE:
        raise InputError(f"{path}: found images of {side} px, expected {SIZE} px for the judges")
    return pipe


def load_adapter(path: str) -> jaxmix.VMix:
    """Load an adapter, refusing one for other dimensions than those measured here."""
    vmix = jaxmix.VMix.load(path)
    if set(vmix.config.dimensions) != set(DIMENSIONS):
        raise InputError(
            f"{path}: found an adapter for {', '.join(vmix.config.dimensions)}, expected {', '.join(DIMENSIONS)}"
        )
    return vmix


def conditions(cfg: Config, adapters: Mapping[str, jaxmix.VMix]) -> dict[str, Condition]:
    """Return the conditions to draw for the held-out prompts, under the names that the tables show."""
    lora = cfg.lora if adapters["main"].lora is not None else 0.0
    found = {"base": Condition()}
    for scale in sorted({*cfg.scales, 1.0}):
        found[f"all {scale:g}"] = Condition(adapter="main", scale=scale, lora=lora)
    for labels in ("none", *DIMENSIONS):
        name = "none" if labels == "none" else f"{labels} alone"
        found[name] = Condition(adapter="main", labels=labels, scale=1.0, lora=lora)
    found["words"] = Condition(words=DIMENSIONS)
    found |= {f"words of {d}": Condition(words=(d,)) for d in DIMENSIONS}
    if lora:
        found["all 1, LoRA dropped"] = Condition(adapter="main", scale=1.0)
        found["its LoRA alone"] = Condition(adapter="main", lora=lora)
    if "lora_only" in adapters:
        found["trained: LoRA only"] = Condition(adapter="lora_only", lora=1.0)
    if "value_only" in adapters:
        found["trained: value mixing only"] = Condition(adapter="value_only", scale=1.0)
    if cfg.full:
        found["trained: full fine-tuning"] = Condition(model="full")
    return found


def reference(
    cfg: Config, pipe: jaxmix.Pipeline, rows: Sequence[Mapping[str, Any]], judges: Any
) -> tuple[dict[str, Matrix], Measures, dict[str, Measures]]:
    """Return the effects of labels on real scenes of the prompts, as they are and after the autoencoder.

    Both are in standard deviations of the scenes without labels as they are, whose measures come next. Last are the
    measures of all sets after the autoencoder: no adapter can draw what the judge can no longer recognise there.
    """
    scenes = real_scenes(rows, cfg.scenes, cfg.seed, DIMENSIONS, cfg.negative)
    answers = [rows[i % len(rows)] for i in range(cfg.scenes)]
    found = {}
    unit: Measures = {}
    measures: dict[str, Measures] = {}
    for name in ("", "autoencoder"):
        pictures = {k: round_trip(pipe, x, cfg.batch_size) if name else x for k, x in scenes.items()}
        measures = {k: measure_pictures(x, answers, *judges) for k, x in pictures.items()}
        unit = unit or measures[""]
        found[name] = effects({k: m for k, m in measures.items() if k}, measures[""], unit)
    return found, unit, measures


def by_style(rows: Sequence[Mapping[str, Any]], right: np.ndarray) -> dict[str, float]:
    """Return the share judged right of each style, over pictures of the prompts in turn."""
    names = [rows[i % len(rows)]["style_name"] for i in range(len(right))]
    return {style: float(right[[name == style for name in names]].mean()) for style in sorted(set(names))}


def attention(
    cfg: Config, studio: Studio, wanted: Mapping[str, Condition], rows: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Return the distances of the attn2 maps from the base's, with and without the LoRA."""
    some = rows[: min(cfg.map_prompts, cfg.batch_size)]
    x0, captions = studio.latents(some), [row["caption"] for row in some]
    found = {}
    for name in ("all 1", "all 1, LoRA dropped"):
        if name in wanted:
            pipe = studio.pipeline(wanted[name])
            controls = studio.control(wanted[name], pipe)
            found[name] = attention_distance(studio.models["base"], pipe, controls, captions, x0)
    return found


def pictures(cfg: Config, drawn: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the grids: over the strength of all labels, and over the labels."""
    captions = [row["caption"] for row in rows[: cfg.grid_rows]]
    scales = [(name.removeprefix("all "), name) for name in drawn if name.startswith("all ") and "," not in name]
    over = [("0 (base)", "base"), *scales]
    labels = [("base", "base"), ("no label", "none"), *((d, f"{d} alone") for d in DIMENSIONS), ("all", "all 1")]
    for file, columns in (("scales.png", over), ("labels.png", labels)):
        path = labelled_grid(Path(cfg.out) / file, [(head, drawn[name]) for head, name in columns], captions)
        print(f"wrote {path}, {path.stat().st_size / 1e3:.0f} kB", flush=True)


def main(cfg: Config) -> int:
    """Draw, measure, print; write effects.json, effects.md and the pictures."""
    command.enable_compilation_cache()
    models = {"base": load_model(cfg.model)}
    models |= {name: load_model(path) for name in ("full", "finetuned") if (path := getattr(cfg, name))}
    adapters = {"main": load_adapter(cfg.adapter)}
    adapters |= {name: load_adapter(path) for name in ("lora_only", "value_only") if (path := getattr(cfg, name))}
    judges = load_segmenter(), load_scorer()
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    studio = Studio(models, adapters, out / "drawn", cfg.steps, cfg.guidance_scale, cfg.batch_size, cfg.seed)
    wanted, rows = conditions(cfg, adapters), make_prompts(HELD_OUT, cfg.prompts, cfg.seed)
    distinct = len({row["caption"] for row in rows})
    print(f"{cfg.adapter}: {len(rows)} prompts ({distinct} distinct), {len(wanted)} conditions", flush=True)
    drawn = {name: studio.draw(name, condition, rows) for name, condition in wanted.items()}
    measures = {name: measure_pictures(images, rows, *judges) for name, images in drawn.items()}
    pictures(cfg, drawn, rows)
    alone: dict[str, Measures] = {d: measures[f"{d} alone"] for d in DIMENSIONS}
    finetuned: dict[str, Measures] = {}
    if cfg.finetuned:
        styled = make_prompts(FINETUNED, cfg.prompts, cfg.seed)
        for name in ("base", "all 1"):
            condition = dataclasses.replace(wanted[name], model="finetuned")
            finetuned[name] = measure_pictures(studio.draw(f"fine-tuned, {name}", condition, styled), styled, *judges)
    scenes, unit, after = reference(cfg, models["base"], rows, judges)
    judged = {k: {s: paired(m[s], after[""][s]) for s in SCORES} for k, m in after.items() if k}
    style = {name: measures[name]["style"] for name in ("base", "all 1")}
    style["real scenes after the autoencoder"] = after[""]["style"]
    style["the same with all labels"] = after["all"]["style"]
    found = Findings(
        measures,
        effects(alone, measures["none"], unit),
        scenes,
        judged,
        {name: by_style(rows, right) for name, right in style.items()},
        attention(cfg, studio, wanted, rows),
        finetuned,
    )
    print(report(found))
    if cfg.markdown:
        print(f"\n{markdown(found)}")
    (out / "effects.json").write_text(
        json.dumps({"config": dataclasses.asdict(cfg), **as_json(found)}, indent=1) + "\n", encoding="utf-8"
    )
    (out / "effects.md").write_text(markdown(found) + "\n", encoding="utf-8")
    print(f"wrote {out}/effects.json and {out}/effects.md")
    return 0


if __name__ == "__main__":
    command.run(main)
