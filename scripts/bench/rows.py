"""What is timed: the models as diffusers configurations, the rows of the table, and the presets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmix.command import near_misses
from jaxmix.released import RELEASED
from jaxmix.types import InputError

ASSETS = Path(__file__).resolve().parents[2] / "jaxmix" / "assets" / "mini"
MODELS = ("mini", "sd15", "sdxl")
TASKS = ("unet", "sample", "decode")
PEERS = ("ours", "flax", "torch", "torch-compile")
# Our sampler with a training-free method.
METHODS = (
    "ours-dense",
    "ours-paint",
    "ours-structured",
    "ours-aligned",
    "ours-styleid",
    "ours-fusion",
    "ours-composable",
)
# Our sampler with an adapter; those that read pictures with the number of tokens that one of them becomes. What a
# StyleAdapter does in the UNet is an IP-Adapter's part with eight.
PICTURES = {"ours-ip": 4, "ours-ip-plus": 16, "ours-style-adapter": 8}
# And ControlNets with their number.
NETS = {"ours-controlnet": 1, "ours-controlnet-2": 2}
# VMix, a picture, a ControlNet and a LoRA in one.
TOGETHER = "ours-together"
ADAPTERS = ("ours-vmix", *PICTURES, "ours-deadiff", "ours-layers", *NETS, TOGETHER, "ours-instantstyle-plus")
ENGINES = (*PEERS, *ADAPTERS, *METHODS)  # those after the peers: for their ratio to our plain sampler
DTYPES = ("float32", "bfloat16")
PARAMETERS = {"mini": 1.5e7, "sd15": 9.1e8, "sdxl": 2.65e9}  # UNet and decoder, to the nearest few percent

# Shrunk, for `--tiny`: the fixed 32 groups of diffusers' Flax norms need at least 32 channels.
_TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "norm_num_groups": 32,
}
_TINY_VAE = {
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "sample_size": 16,
}
_TINY_PLAIN = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
}
_TINY = {
    "mini": _TINY_PLAIN,
    "sd15": _TINY_PLAIN,
    "sd21_base": _TINY_PLAIN,
    "sdxl": {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [1, 2],
        "transformer_layers_per_block": [1, 2],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    },
}


@dataclasses.dataclass(frozen=True)
class BenchRow:
    """One row of the table. ``batch`` counts images; under guidance the UNet sees two rows per image."""

    model: str
    task: str
    latents: int  # side, in latents
    batch: int
    dtype: str
    steps: int  # of the sampler; 0 elsewhere
    tiny: bool = False

    @property
    def name(self) -> str:
        """The row in words, for progress lines and errors."""
        steps = f", {self.steps} steps" if self.steps else ""
        tiny = " (tiny)" if self.tiny else ""
        return f"{self.model}{tiny} {self.task} {self.latents}x{self.latents} x{self.batch} {self.dtype}{steps}"


@dataclasses.dataclass(frozen=True)
class Preset:
    """The defaults of a kind of run; every flag overrides them."""

    models: str
    latents: dict[str, tuple[int, ...]]
    batch: dict[str, tuple[int, ...]]
    dtype: str
    rounds: int
    steps: int
    max_seconds: float  # 0: no limit
    row_seconds: float
    engines: str = ",".join(PEERS)
    tasks: str = ",".join(TASKS)


PRESETS = {
    # Four images of mini are 8 rows of its UNet, one image of the others 2.
    "quick": Preset("mini", {"mini": (16,), "sd15": (32,), "sdxl": (32,)}, {"mini": (4,)}, "float32", 3, 25, 0, 900),
    "cpu": Preset(
        "mini,sd15,sdxl", {"mini": (16,), "sd15": (32, 64), "sdxl": (32,)}, {"mini": (4,)}, "float32", 5, 25, 0, 900
    ),
    "gpu": Preset(
        "sd15,sdxl",
        {"mini": (16,), "sd15": (64,), "sdxl": (128,)},
        {"mini": (4,), "sd15": (1, 8), "sdxl": (1, 8)},
        "bfloat16",
        5,
        25,
        560,
        10,
    ),
}


def names(flag: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Split a comma list and check every name of it; raises InputError with near misses."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise InputError(f"--{flag}: found nothing, expected one or more of {', '.join(known)}")
    for name in found:
        if name not in known:
            raise InputError(f"--{flag}: {name!r} is not known{near_misses(name, known)}")
    return tuple(dict.fromkeys(found))


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """Split a comma list of positive integers; raises InputError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"--{flag}: found {text!r}, expected positive integers separated by commas")
    return tuple(int(part) for part in parts)


def check(steps: int, rounds: int, out: str) -> None:
    """Raise InputError for a number below one, or an output file in a missing folder."""
    if steps < 1 or rounds < 1:
        raise InputError(f"--steps, --rounds: found {steps} and {rounds}, expected at least 1")
    if out and not Path(out).absolute().parent.is_dir():
        raise InputError(f"--out {out}: no such folder")


def plan(
    preset: Preset,
    models: Sequence[str],
    tasks: Sequence[str],
    latents: Sequence[int],
    batch: Sequence[int],
    dtype: str,
    steps: int,
    tiny: bool,
) -> list[BenchRow]:
    """List the rows, the most important first; empty ``latents`` and ``batch`` take the preset's of each model.

    Small before large and the UNet before programs that contain it, decoding last: an interrupted run loses the least.
    """
    rows = []
    for model in models:
        # The shrunk models have latents of 8, whatever the real ones have.
        sides = tuple(latents) or ((8,) if tiny else preset.latents[model])
        for side in sides:
            for n in tuple(batch) or preset.batch.get(model, (1,)):
                for task in tasks:
                    rows.append(BenchRow(model, task, side, n, dtype, steps if task == "sample" else 0, tiny))
    # Stable: models and sides keep their order.
    return sorted(rows, key=lambda row: (row.task == "decode", row.batch if row.model != "mini" else 0))


def configs(model: str, tiny: bool = False) -> dict[str, Any]:
    """Return the diffusers configurations "unet", "vae", "scheduler" of a model, and its "text_length" in tokens.

    The model is mini or one of `jaxmix.released`.
    """
    if model == "mini":
        parts = {name: json.loads((ASSETS / name / "config.json").read_text()) for name in ("unet", "vae")}
        parts["scheduler"] = json.loads((ASSETS / "scheduler" / "scheduler_config.json").read_text())
        text = json.loads((ASSETS / "text_encoder" / "config.json").read_text())
        found: dict[str, Any] = {**parts, "text_length": text["max_position_embeddings"]}
    else:
        found = {name: RELEASED[model][name] for name in ("unet", "vae")}
        found["scheduler"] = RELEASED["sd15"]["scheduler"]  # the sampler that is timed is DDIM, SDXL's too
        found["text_length"] = RELEASED[model]["text_encoder"]["max_position_embeddings"]
    if tiny:
        found = {
            **found,
            "unet": {**found["unet"], **_TINY_UNET, **_TINY[model]},
            "vae": {**found["vae"], **_TINY_VAE},
            "text_length": 8,
        }
    return found


def added_width(unet: dict[str, Any]) -> int:
    """Return the width of the pooled text that a UNet configuration needs (0: none)."""
    if unet.get("addition_embed_type") is None:
        return 0
    return unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
