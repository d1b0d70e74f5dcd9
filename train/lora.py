"""Train a LoRA (arXiv 2106.09685) of the UNet and the text encoders of Stable Diffusion 1.x, 2.x or XL.

What learns: two factors beside each targeted kernel, with DoRA (arXiv 2402.09353) also the norms of its outputs. The
base is an argument of the step and is held once. The files are those of diffusers and PEFT, and of kohya's scripts.

    python -m train.lora --config configs/lora_mini.yaml --output_dir runs/lora
    python -m train.lora --config configs/lora_sd15.yaml --output_dir runs/lora --train_data_dir pictures
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxmix import command
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.types import InputError
from train.adapters import AdapterConfig, check_scenes, freeze, make_captioned, on_host, open_base
from train.data import LatentCache, Regular, open_batches
from train.diffusion import make_predict, make_tokenize, train_denoiser
from train.grid import make_grid
from train.low_rank import (
    FILE,
    KOHYA_FILE,
    LowRankConfig,
    Trained,
    beside_base,
    make_plan,
    make_weigh,
    note_ordinary,
    start_lora,
    text_rates,
)
from train.scenes import Scenes


@dataclasses.dataclass
class Config(LowRankConfig, AdapterConfig):
    """The LoRA trainer's keys, after those of every trainer of an adapter.

    Attributes:
        trigger_word: given to pictures without a caption, and put before captions that do not have it.
        reg_data_dir: regularisation pictures, as in kohya's scripts: a pass shows as many of them as of the others.
        class_prompt: the caption of regularisation pictures without one.
        prior_loss_weight: weight of their rows in the loss; the mean is over all rows.
        validation_scales: strengths at which validation pictures are drawn, beside the base.
    """

    trigger_word: str = ""
    reg_data_dir: str = ""
    class_prompt: str = ""
    prior_loss_weight: float = 1.0
    validation_scales: list[float] = dataclasses.field(default_factory=lambda: [1.0])

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        super().__post_init__()
        if self.rank is None:
            raise InputError("rank: found null, expected a rank of 1 or more")
        self.check_low_rank()
        if self.prior_loss_weight < 0:
            raise InputError(f"prior_loss_weight: found {self.prior_loss_weight}, expected 0 or more")
        for key in ("trigger_word", "reg_data_dir"):
            if self.scenes and getattr(self, key):
                raise InputError(f"{key}: found it with scenes, which have captions, expected train_data_dir")


class CaptionedScenes:
    """Scenes as rows of captioned pictures."""

    def __init__(self, scenes: Scenes):
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scenes[index]
        return {"image": scene["image"], "text": scene["text"], "id": f"scene {index}"}


def open_rows(cfg: Config, pipe: Pipeline) -> Any:
    """Return the source of rows that the config names, and say what there is."""
    if cfg.scenes:
        check_scenes(pipe)
        return CaptionedScenes(Scenes(**cfg.scenes))
    if cfg.trigger_word:
        note_ordinary(pipe, "trigger_word", cfg.trigger_word.split())
    rows = open_batches(
        cfg.train_data_dir,
        cfg,
        pipe,
        None,
        cfg.text_column,
        cfg.image_column,
        trigger_word=cfg.trigger_word,
        regular=Regular(cfg.reg_data_dir, cfg.class_prompt),
    )
    if isinstance(rows, LatentCache) and cfg.train_text_encoder:
        raise InputError(f"train_text_encoder: found it with a cache of text states, {rows.folder}, expected pictures")
    if jax.process_index() == 0:
        print(rows.describe(), flush=True)
    return rows


def make_rows(
    tokenize: Callable[[str], dict[str, np.ndarray]], cfg: Config
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, Any]]:
    """Return the transform from a source's row to `make_captioned`'s arrays, and "loss_weight" () float32."""
    captioned = make_captioned(tokenize)

    def row(source: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        weight = cfg.prior_loss_weight if source.get("regular") else 1.0
        return {**captioned(source, rng.random() < cfg.caption_dropout_rate), "loss_weight": np.float32(weight)}

    return row


def draw_grid(pipe: Pipeline, trained: Trained, learns: Mapping[str, Any], cfg: Config) -> np.ndarray:
    """Return a sheet with one row per prompt: the base, and the LoRA at each strength."""
    prompts, made = cfg.validation_prompts, trained.lora(learns)
    options: dict[str, Any] = {
        "guidance_scale": cfg.validation_guidance_scale,
        "batch_size": cfg.validation_batch_size,
    }
    columns = [pipe.generate(prompts, range(len(prompts)), **options)]
    columns += [
        pipe.generate(prompts, range(len(prompts)), methods=(made.on(scale),), **options)
        for scale in cfg.validation_scales
    ]
    titles = ["base", *(f"x{scale:g}" for scale in cfg.validation_scales)]
    return make_grid(beside_base(columns[0], columns[1:]), len(titles), max(1, 128 // columns[0].shape[1]), titles)


def main(cfg: Config) -> int:
    """Train, draw on the way, export."""
    pipe = open_base(cfg)
    trained, plan = start_lora(pipe, cfg, cfg.seed), make_plan(pipe, cfg)
    pipe = on_host(pipe)
    rows = open_rows(cfg, pipe)
    return train_denoiser(
        cfg,
        pipe,
        trained.learns,
        freeze(pipe, rows),
        rows,
        make_rows(make_tokenize(pipe), cfg),
        make_predict(pipe, cfg),
        lambda learns, folder: trained.save(learns, folder, pipe, cfg.lora_format),
        lambda learns: draw_grid(pipe, trained, learns, cfg),
        KOHYA_FILE if cfg.lora_format == "kohya" else FILE,
        weigh=make_weigh(trained, cfg),
        rates=text_rates(cfg),
        plan=plan,
    )


if __name__ == "__main__":
    command.run(main)
