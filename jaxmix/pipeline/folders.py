"""What a diffusers folder says that it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmix.pipeline.saving import DEFAULTS
from jaxmix.samplers import SAMPLERS, is_sampler
from jaxmix.types import InputError, shown
from jaxmix.weights import read_config

PARTS = {"sd": ("unet", "vae", "text_encoder"), "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2")}
_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "CLIPTextModel"),
}
_BESIDE = ("tokenizer", "tokenizer_2", "scheduler", "feature_extractor", "safety_checker", "image_encoder")
_OWN = ("steps", "guidance_scale", "sampler")


def pipeline_family(index: Mapping[str, Any], notes: list[str]) -> tuple[str, str]:
    """Return "sd" or "sdxl" and the name of a pipeline's class, by the classes of its components.

    So the classes for ControlNet, PAG, image-to-image and so on open as what they hold.
    """
    named = index.get("_class_name")
    named = named[-1] if isinstance(named, list) and named else named
    named = str(named).removeprefix("Flax")
    held = {key: value for key, value in index.items() if isinstance(value, list) and len(value) == 2}
    classes = {key: str(value[1]).removeprefix("Flax") for key, value in held.items() if value[1] is not None}
    family = "sdxl" if "text_encoder_2" in classes or named.startswith("StableDiffusionXL") else "sd"
    if family == "sdxl" and classes and "text_encoder" not in classes:
        raise InputError("this is an SDXL refiner, expected a StableDiffusionPipeline or a StableDiffusionXLPipeline")
    wrong = [
        f"its {part} is {classes.get(part, 'missing')}"
        for part in PARTS[family]
        if classes.get(part) not in _CLASSES[part] and (classes or not named.startswith("StableDiffusion"))
    ]
    if wrong:
        raise InputError(
            f"found a {shown(named)[1:-1]} ({', '.join(wrong)}), expected a StableDiffusionPipeline or a "
            "StableDiffusionXLPipeline, or another with the same parts"
        )
    if other := [key for key in classes if not (key.startswith("_") or key in (*_CLASSES, *_BESIDE))]:
        notes.append(f"a {named}, of which the {' and the '.join(other)} are left out")
    return family, named


def own_defaults(index: Mapping[str, Any]) -> dict[str, Any]:
    """Return this library's own defaults in a model_index.json, checked."""
    found = index.get(DEFAULTS) or {}
    steps, scale, sampler = (found.get(key) if isinstance(found, dict) else found for key in _OWN)
    for key, value, fits, expected in (
        ("steps", steps, isinstance(steps, int) and not isinstance(steps, bool) and steps > 0, "1 or more"),
        ("guidance_scale", scale, isinstance(scale, (int, float)) and 0 <= scale < 1e6, "a number"),
        ("sampler", sampler, is_sampler(sampler), f"one of {', '.join(SAMPLERS)}"),
    ):
        if value is not None and not fits:
            raise InputError(f"{DEFAULTS}: {key} is {shown(value)}, expected {expected}")
    return {key: found[key] for key in _OWN if found.get(key) is not None}


def what_folder(folder: Path) -> str:
    """Say what is in a folder without a model_index.json."""
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names or any(name.startswith("pytorch_lora_weights") for name in names):
        return "a LoRA, which changes a model but is not one"
    if "config.json" in names:
        config = read_config(folder / "config.json")
        named = config.get("_class_name") or next(iter(config.get("architectures") or ()), "a model")
        return f"a single model, {named}"
    if files := [name for name in names if name.endswith(".safetensors")]:
        return f"no model_index.json (to load a single file give its path, such as {folder / files[0]})"
    return "no model_index.json"
