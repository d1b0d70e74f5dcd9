"""Pipelines to the folders and files that torch diffusers opens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmix.weights import save_tree, write_config

if TYPE_CHECKING:
    from jaxmix.pipeline import Pipeline

DEFAULTS = "_jaxmix"
"""Key of model_index.json for this library's own defaults; diffusers skips keys with an underscore."""


def save_folder(pipe: Pipeline, folder: str | Path, dtype: Any = None) -> None:
    """Write a diffusers folder; ``dtype`` casts the floating weights on the way."""
    folder = Path(folder)
    for part, file in (
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
    ):
        save_tree(pipe.params[part], folder / part / file, dtype=dtype)
        write_config(getattr(pipe, part).config.to_dict(), folder / part / "config.json")
    write_config(pipe.schedule.to_config(), folder / "scheduler" / "scheduler_config.json")
    if isinstance(pipe.tokenizer, (str, Path)):
        if Path(pipe.tokenizer).resolve() != (folder / "tokenizer").resolve():
            shutil.copytree(pipe.tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    else:
        pipe.tokenizer.save_pretrained(str(folder / "tokenizer"))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        DEFAULTS: {"steps": pipe.default_steps, "guidance_scale": pipe.default_guidance_scale},
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", pipe.schedule.to_config()["_class_name"]],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }
    write_config(index, folder / "model_index.json")
