"""B-LoRA: Implicit Style-Content Separation using B-LoRA (arXiv 2403.14572): a LoRA of two blocks, from one picture.

    W' = W + B A   for to_q, to_k, to_v and to_out of both attentions in two blocks of the UNet, trained together on
    |pred(x_t, "A [v]") - target|^2: one block learns what the picture shows, the other how it looks

Afterwards either half serves without the other, and halves of two pictures serve together. The file names the halves:

    python -m train.b_lora --config configs/b_lora_mini.yaml --output_dir runs/b_lora
    python -m train.b_lora --config configs/b_lora_sdxl.yaml --output_dir runs/b_lora --instance_data_dir picture.png
    python -m infer.generate ... --lora runs/b_lora/pytorch_lora_weights.safetensors:style=1.0,content=0

The authors' script multiplies both factors by the strength, which squares it: its 0.5 is 0.25 here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmix import command
from jaxmix.pipeline.blocks import HALVES, halves
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.tuning import lora
from jaxmix.types import InputError
from train.adapters import freeze, on_host, open_base
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
)
from train.subjects import InTurn, SubjectConfig, make_rows, open_instances, words_of


@dataclasses.dataclass
class Config(LowRankConfig, SubjectConfig):
    """The B-LoRA trainer's keys, after those of LoRAs and of every trainer of a subject.

    Attributes:
        rank: rank of the additions.
        instance_prompt: what the picture is told to be.
        style_blocks: regular expression over names of the UNet's modules: where the style is learnt; empty for the
            authors' block for SDXL, and a guess for others, see train/README.md.
        content_blocks: the same for what is shown.
        num_instance_images: with scenes: how many pictures; the paper has one.
    """

    rank: int | None = 64
    instance_prompt: str = "A [v]"
    style_blocks: str = ""
    content_blocks: str = ""
    num_instance_images: int = 1

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        super().__post_init__()
        if self.rank is None:
            raise InputError("rank: found null, expected a rank of 1 or more")
        self.check_low_rank()
        if not self.instance_prompt.strip():
            raise InputError('instance_prompt: not given, expected one, "A [v]"')
        if self.train_text_encoder or self.conv_rank:
            key = "train_text_encoder" if self.train_text_encoder else "conv_rank"
            raise InputError(f"{key}: found it with two blocks of the UNet, beyond which nothing learns, expected none")


def find_blocks(pipe: Pipeline, cfg: Config) -> dict[str, str]:
    """Return the patterns of both halves.

    Raises `InputError` for one that finds no module that `lora_targets` finds, and for halves that share a module.
    """
    usual, known = halves(pipe), lora.targets(pipe.params["unet"])
    among = lora.choose(known, cfg.lora_targets, "lora_targets")
    found, seen = {}, dict[str, str]()
    for name in HALVES:
        found[name] = getattr(cfg, f"{name}_blocks") or usual[name]
        for module in lora.choose(among, found[name], f"{name}_blocks"):
            if module in seen:
                raise InputError(f"style_blocks, content_blocks: both find {module}, expected two blocks apart")
            seen[module] = name
    return found


def within(pipe: Pipeline, cfg: Config, blocks: Mapping[str, str]) -> Config:
    """Return the config with the modules inside the blocks as its targets, each by its name."""
    among = lora.choose(lora.targets(pipe.params["unet"]), cfg.lora_targets, "lora_targets")
    inside = [module for module in among if any(re.search(pattern, module) for pattern in blocks.values())]
    return dataclasses.replace(cfg, lora_targets=f"^({'|'.join(map(re.escape, inside))})$")


def draw_grid(pipe: Pipeline, trained: Trained, learns: Mapping[str, Any], cfg: Config) -> np.ndarray:
    """Return a sheet with one row per prompt: the base, both halves, and each without the other."""
    prompts, made = cfg.validation_prompts, trained.lora(learns)
    options: dict[str, Any] = {
        "guidance_scale": cfg.validation_guidance_scale,
        "batch_size": cfg.validation_batch_size,
    }
    shown = {"base": (), "both": (made.on(),), **{name: (made.only(name).on(),) for name in HALVES}}
    columns = [pipe.generate(prompts, range(len(prompts)), methods=methods, **options) for methods in shown.values()]
    return make_grid(beside_base(columns[0], columns[1:]), len(shown), max(1, 128 // columns[0].shape[1]), list(shown))


def main(cfg: Config) -> int:
    """Train, draw on the way, export."""
    pipe = open_base(cfg)
    blocks = find_blocks(pipe, cfg)
    note_ordinary(pipe, "instance_prompt", words_of(cfg.instance_prompt))
    trained = start_lora(pipe, within(pipe, cfg, blocks), cfg.seed, blocks)
    plan = make_plan(pipe, cfg) | {f"{name}_blocks": pattern for name, pattern in blocks.items()}
    pipe = on_host(pipe)
    rows = InTurn((open_instances(cfg, pipe, cfg.instance_prompt), cfg.instance_prompt))
    return train_denoiser(
        cfg,
        pipe,
        trained.learns,
        freeze(pipe, rows),
        rows,
        make_rows(make_tokenize(pipe), cfg.caption_dropout_rate),
        make_predict(pipe, cfg),
        lambda learns, folder: trained.save(learns, folder, pipe, cfg.lora_format),
        lambda learns: draw_grid(pipe, trained, learns, cfg),
        KOHYA_FILE if cfg.lora_format == "kohya" else FILE,
        weigh=make_weigh(trained, cfg),
        plan=plan,
    )


if __name__ == "__main__":
    command.run(main)
