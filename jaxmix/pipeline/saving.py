"""Pipelines to folders and files that torch diffusers and its users can open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from jaxmix.pipeline.parts import Parts
from jaxmix.weights import save_tree, write_config
from jaxmix.weights.files import path_here
from jaxmix.weights.single_file import family_of_configs, save_single_file
from jaxmix.weights.single_file_extras import save_extras

DEFAULTS = "_jaxmix"
"""Key of model_index.json for this library's defaults; diffusers skips keys that start with an underscore."""

_FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


def save_pipeline(pipe: Parts, path: str | Path, dtype: Any = None) -> None:
    """Write a single file in the original layout if `path` ends in ".safetensors", a diffusers folder otherwise.

    ``dtype`` casts the floating-point weights on the way; None keeps theirs.
    """
    path = path_here(path)
    if path.suffix.lower() == ".safetensors":
        configs = {part: getattr(pipe, part).config.to_dict() for part in _parts(pipe)}
        family = family_of_configs(configs) if pipe.extras is None else pipe.extras.family
        configs["scheduler"] = pipe.schedule.to_config()
        save_single_file(path, family, configs, pipe.params, pipe.extras, dtype)
    else:
        save_folder(pipe, path, dtype)


def save_folder(pipe: Parts, folder: str | Path, dtype: Any = None) -> None:
    """Write a folder that torch diffusers opens; ``dtype`` casts the floating-point weights on the way."""
    folder = Path(folder)
    for part in _parts(pipe):
        save_tree(pipe.params[part], folder / part / _FILES[part], dtype=dtype)
        write_config(getattr(pipe, part).config.to_dict(), folder / part / "config.json")
    write_config(pipe.schedule.to_config(), folder / "scheduler" / "scheduler_config.json")
    _save_tokenizer(pipe.tokenizer, folder / "tokenizer", pipe.text_encoder.config.max_position_embeddings)
    if pipe.text_encoder_2 is not None:
        _save_tokenizer(pipe.tokenizer_2, folder / "tokenizer_2", pipe.text_encoder_2.config.max_position_embeddings)
    save_extras(pipe.extras, folder)
    write_config(_index(pipe), folder / "model_index.json")


def _parts(pipe: Parts) -> list[str]:
    return [part for part in _FILES if getattr(pipe, part) is not None]


def _index(pipe: Parts) -> dict[str, Any]:
    """Return the model_index.json, which tells torch diffusers the class of every part."""
    index: dict[str, Any] = {
        "_diffusers_version": "0.42.1",
        DEFAULTS: {
            "steps": pipe.default_steps,
            "guidance_scale": pipe.default_guidance_scale,
            "sampler": pipe.sampler,
        },
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", pipe.text_encoder.config.to_dict()["architectures"][0]],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", pipe.schedule.to_config()["_class_name"]],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if pipe.text_encoder_2 is None:
        return index | {
            "_class_name": "StableDiffusionPipeline",
            "safety_checker": [None, None],
            "requires_safety_checker": False,
        }
    return index | {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder_2": ["transformers", pipe.text_encoder_2.config.to_dict()["architectures"][0]],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": pipe.zeros_for_empty_prompt,
    }


def _save_tokenizer(tokenizer: Any, folder: Path, length: int) -> None:
    if not isinstance(tokenizer, (str, Path)):
        tokenizer.save_pretrained(str(folder))
    elif Path(tokenizer).resolve() != folder.resolve():
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    config = folder / "tokenizer_config.json"
    found = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    # diffusers pads to this length, not to the encoder's; a tokenizer may have been made for another length.
    if found.get("model_max_length", length) != length:
        config.write_text(json.dumps({**found, "model_max_length": length}, indent=2) + "\n", encoding="utf-8")
