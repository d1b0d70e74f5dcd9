"""Checkpoints of every kind to a `Pipeline`: the one place that tells what a folder or a file is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp

from jaxmix.models import AutoencoderKL, CLIPTextConfig, CLIPTextModel, UNet2DConditionModel, UNetConfig, VAEConfig
from jaxmix.pipeline import Pipeline
from jaxmix.saving import DEFAULTS
from jaxmix.schedule import NoiseSchedule
from jaxmix.types import InputError
from jaxmix.weights import load_tree, read_config

ASSETS = Path(__file__).parent / "assets"
_PARTS = ("unet", "vae", "text_encoder")
T = TypeVar("T")


def load(name_or_folder: str | Path = "mini", dtype: Any = None) -> Pipeline:
    """Load a pipeline: "mini", the model in this package, or a diffusers folder of Stable Diffusion 1.x.

    ``dtype`` is the type of weights and computation, float32 if None; "bfloat16" and "float16" work too. Raises
    `InputError` for anything that is missing, damaged or not supported.
    """
    folder = ASSETS / "mini" if str(name_or_folder) == "mini" else Path(name_or_folder)
    if not folder.is_dir():
        raise InputError(f"{name_or_folder}: no such folder, expected 'mini' or a diffusers folder")
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: no model_index.json in this folder, expected a diffusers pipeline")
    index = read_config(folder / "model_index.json")
    found = index.get("_class_name")
    if found != "StableDiffusionPipeline":
        raise InputError(f"{folder}/model_index.json: _class_name is {found!r}, expected 'StableDiffusionPipeline'")
    try:
        kind = jnp.dtype(dtype or jnp.float32)
    except TypeError:
        kind = None
    if kind not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise InputError(f"dtype={dtype!r}: expected float32, bfloat16 or float16")

    for part in (*_PARTS, "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise InputError(f"{folder}: no folder {part}, expected {', '.join(_PARTS)}, tokenizer and scheduler")

    def config(read: Callable[[dict[str, Any]], T], file: str) -> T:
        """Read one JSON file; whatever is wrong with it, the file is named."""
        found = read_config(folder / file)
        try:
            return read(found)
        except InputError as e:
            raise InputError(f"{folder / file}: {e}") from None

    unet = UNet2DConditionModel(config(UNetConfig.from_dict, "unet/config.json"), kind)
    vae = AutoencoderKL(config(VAEConfig.from_dict, "vae/config.json"), kind)
    text_encoder = CLIPTextModel(config(CLIPTextConfig.from_dict, "text_encoder/config.json"), kind)
    schedule = config(NoiseSchedule.from_config, "scheduler/scheduler_config.json")
    targets = {
        "unet": unet.abstract_params(),
        "vae": vae.abstract_params(),
        "text_encoder": text_encoder.abstract_params(),
    }
    defaults = index.get(DEFAULTS, {})
    return Pipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        params={part: load_tree(folder / part, target, kind) for part, target in targets.items()},
        schedule=schedule,
        tokenizer=folder / "tokenizer",
        default_steps=defaults.get("steps", 25),
        default_guidance_scale=defaults.get("guidance_scale", 7.5),
    )
