"""Checkpoints of every kind to a `Pipeline`: the one place that finds out what a folder or file is."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmix.models import AutoencoderKL, CLIPTextConfig, CLIPTextModel, UNet2DConditionModel, UNetConfig, VAEConfig
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.saving import DEFAULTS
from jaxmix.samplers import SAMPLERS, default_sampler
from jaxmix.schedule import NoiseSchedule
from jaxmix.types import InputError, Params
from jaxmix.weights import FlaxTree, Source, load_tree, open_source, read_config, stored_dtype
from jaxmix.weights.hub import download
from jaxmix.weights.single_file import CLIP_TOKENIZER, open_single_file
from jaxmix.weights.single_file_extras import Extras

ASSETS = Path(__file__).parents[1] / "assets"

_PARTS = {"sd": ("unet", "vae", "text_encoder"), "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2")}
_TOKENIZERS = {"sd": ("tokenizer",), "sdxl": ("tokenizer", "tokenizer_2")}
_GUIDANCE_SCALE = {"sd": 7.5, "sdxl": 5.0}
_PIPELINES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionInpaintPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
}
_CONFIGS: dict[str, Any] = {
    "unet": UNetConfig,
    "vae": VAEConfig,
    "text_encoder": CLIPTextConfig,
    "text_encoder_2": CLIPTextConfig,
}
_MODELS: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModel,
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_KNOWN = "'mini', a diffusers folder, a .safetensors file, or a hub id 'owner/name'"
_OTHER_FILES = {
    ".bin": "a Python pickle, which can run code when it is opened",
    ".ckpt": "a Python pickle, which can run code when it is opened",
    ".pt": "a Python pickle, which can run code when it is opened",
    ".pth": "a Python pickle, which can run code when it is opened",
    ".gguf": "a GGUF file of quantised weights",
    ".msgpack": "the Flax weights of one model",
    ".onnx": "an ONNX model",
    ".json": "a JSON file",
}


def load(
    name: str | Path = "mini",
    dtype: Any = None,
    *,
    sampler: str | None = None,
    prediction_type: str | None = None,
) -> Pipeline:
    """Load a Stable Diffusion 1.x, 2.x or XL pipeline, in whichever form it comes.

    ``name`` is "mini" (the model in this package), a diffusers folder (safetensors, sharded or not, or Flax msgpack),
    a single ``.safetensors`` file in the original layout, or a hub id "owner/name".
    ``dtype`` is the type of weights and computation: float32 (if None), bfloat16, float16, or "auto" for the type in
    which each part is stored. A VAE that overflows in float16 (``force_upcast``) is still computed in float32.
    ``sampler`` and ``prediction_type`` ("epsilon", "v_prediction", "sample") override the checkpoint's.
    Raises `InputError` for anything missing, damaged or not supported.
    """
    kind = _dtype(dtype)
    if sampler is not None and sampler not in SAMPLERS:
        raise InputError(f"sampler: found {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    path = ASSETS / "mini" if str(name) == "mini" else Path(name).expanduser()
    if not path.exists():
        if not _HUB_ID.fullmatch(str(name)):
            raise InputError(f"{name}: found no such folder or file, expected {_KNOWN}")
        path = download(str(name), _PARTS["sdxl"])
    if path.is_dir():
        pipe = _load_folder(path, kind, prediction_type)
    elif path.suffix == ".safetensors":
        pipe = _load_single_file(path, kind, prediction_type)
    else:
        what = _OTHER_FILES.get(path.suffix, "a file of another kind")
        raise InputError(f"{path}: found {what}, expected {_KNOWN}")
    return pipe if sampler is None else dataclasses.replace(pipe, sampler=sampler)


def from_flax(module: Any, params: Mapping[str, Any]) -> tuple[Any, Params]:
    """Adopt a live Flax model of diffusers 0.36 to 0.39: return our module and its parameters.

    ``module`` is a ``FlaxUNet2DConditionModel`` or a ``FlaxAutoencoderKL``, ``params`` its parameters with or without
    {"params": ...} around them; they keep their precision, and computation stays in ``module.dtype``. Our modules take
    and return images and latents as (b, h, w, c).

    Two things differ from the Flax UNet on purpose, because the checkpoints were trained with torch: GELU is exact
    here (Flax has the tanh approximation), and the norms before the attention have epsilon 1e-6 (Flax: 1e-5). Raises
    `InputError` for any other class, and for unsupported settings that change what is computed.
    """
    found = type(module).__name__
    part = {"FlaxUNet2DConditionModel": "unet", "FlaxAutoencoderKL": "vae"}.get(found)
    if part is None:
        raise InputError(f"from_flax: found a {found}, expected a FlaxUNet2DConditionModel or a FlaxAutoencoderKL")
    if not isinstance(params, Mapping):
        raise InputError(f"from_flax: found {type(params).__name__} params, expected a nested mapping of arrays")
    with _naming(found):
        ours = _MODELS[part](_read(part, module.config), jnp.dtype(module.dtype))
    tree = FlaxTree(params, f"{found} params")
    return ours, load_tree(tree, ours.abstract_params(), _kept(tree))


def _kept(source: Source) -> Any:
    """Return the widest precision in a source, which holds all its numbers."""
    floats = [e.dtype for e in source.entries.values() if jnp.issubdtype(e.dtype, jnp.floating)]
    return np.dtype(jnp.result_type(*floats)) if floats else None


def _dtype(dtype: Any) -> np.dtype | None:
    """Return the dtype that a user asked for, None for "auto"."""
    if isinstance(dtype, str) and dtype == "auto":
        return None
    try:
        kind: Any = jnp.dtype(dtype or jnp.float32)
    except TypeError:
        kind = None
    if kind not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise InputError(f"dtype: found {dtype!r}, expected float32, bfloat16, float16 or 'auto'")
    return kind


def _without_flax(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as torch would write it: without "Flax" in the class name and keys that change no result."""
    same = ("dropout", "dtype", "split_head_dim", "use_memory_efficient_attention")
    out = {key: value for key, value in config.items() if key not in same}
    if isinstance(named := out.get("_class_name"), str):
        out["_class_name"] = named.removeprefix("Flax")
    crossed = out.get("only_cross_attention")
    if isinstance(crossed, (list, tuple)) and not any(crossed):
        out["only_cross_attention"] = False
    return out


@contextlib.contextmanager
def _naming(where: Any) -> Iterator[None]:
    """Name the file in every `InputError` raised in this block."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{where}: {e}") from None


def _load_folder(folder: Path, kind: np.dtype | None, prediction_type: str | None) -> Pipeline:
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: found {_what_folder(folder)}, expected a diffusers pipeline (model_index.json)")
    index = read_config(folder / "model_index.json")
    named = str(index.get("_class_name"))
    family = _PIPELINES.get(named.removeprefix("Flax"))
    if family is None:
        raise InputError(
            f"{folder}/model_index.json: found a {named}, expected a StableDiffusionPipeline or a "
            "StableDiffusionXLPipeline"
        )
    folders = (*_PARTS[family], *_TOKENIZERS[family], "scheduler")
    for part in folders:
        if not (folder / part).is_dir():
            raise InputError(f"{folder}: found no {part} folder in this {named}, expected {', '.join(folders)}")
    configs = {}
    for part in _PARTS[family]:
        found = read_config(folder / part / "config.json")
        with _naming(folder / part / "config.json"):
            configs[part] = _read(part, found)
    found = read_config(folder / "scheduler" / "scheduler_config.json")
    with _naming(folder / "scheduler" / "scheduler_config.json"):
        schedule = _schedule(found, prediction_type)
    _check_channels(folder, configs)
    defaults = index.get(DEFAULTS, {})
    return _assemble(
        folder,
        configs,
        {part: open_source(folder / part) for part in configs},
        kind,
        schedule=schedule,
        tokenizer=folder / "tokenizer",
        tokenizer_2=folder / "tokenizer_2" if family == "sdxl" else None,
        default_steps=defaults.get("steps", 25),
        default_guidance_scale=defaults.get("guidance_scale", _GUIDANCE_SCALE[family]),
        sampler=defaults.get("sampler") or default_sampler(schedule),
        zeros_for_empty_prompt=family == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True)),
        extras=Extras.open(folder),
    )


def _load_single_file(path: Path, kind: np.dtype | None, prediction_type: str | None) -> Pipeline:
    from transformers import CLIPTokenizer  # here, because importing it takes longer than everything else

    file = open_single_file(path, prediction_type=prediction_type)
    with _naming(path):
        configs = {part: _read(part, config) for part, config in file.configs.items()}
        schedule = _schedule(file.scheduler, prediction_type)
    _check_channels(path, configs)
    tokenizers: dict[str, Any] = {
        name: CLIPTokenizer.from_pretrained(str(CLIP_TOKENIZER), pad_token=pad) for name, pad in file.pad_tokens.items()
    }
    family = "sdxl" if "text_encoder_2" in configs else "sd"
    return _assemble(
        path,
        configs,
        file.sources,
        kind,
        schedule=schedule,
        **tokenizers,
        default_guidance_scale=_GUIDANCE_SCALE[family],
        sampler=default_sampler(schedule),
        zeros_for_empty_prompt=family == "sdxl",
        extras=file.extras,
    )


def _assemble(
    where: Path, configs: Mapping[str, Any], sources: Mapping[str, Source], kind: np.dtype | None, **fields: Any
) -> Pipeline:
    """Load the weights of all parts into a pipeline; a `kind` of None keeps the precision of each part."""
    models: dict[str, Any] = {}
    params: dict[str, Params] = {}
    for part, config in configs.items():
        kept = stored_dtype(sources[part]) if kind is None else kind
        # float16 can hold the weights, but not the activations.
        overflows = part == "vae" and kept == np.float16 and config.force_upcast
        models[part] = _MODELS[part](config, np.dtype(np.float32) if overflows else kept)
        params[part] = load_tree(sources[part], models[part].abstract_params(), kept)
    with _naming(where):
        return Pipeline(**models, params=params, **fields)


def _read(part: str, config: Mapping[str, Any]) -> Any:
    return _CONFIGS[part].from_dict(_without_flax(config))


def _schedule(config: Mapping[str, Any], prediction_type: str | None) -> NoiseSchedule:
    config = dict(config)
    if isinstance(named := config.get("_class_name"), str):
        config["_class_name"] = named.removeprefix("Flax")
    return NoiseSchedule.from_config(config | ({"prediction_type": prediction_type} if prediction_type else {}))


def _check_channels(where: Path, configs: Mapping[str, Any]) -> None:
    """Refuse a UNet that takes more than latents, before its weights are read."""
    found, expected = configs["unet"].in_channels, configs["vae"].latent_channels
    if found != expected:
        kind = "an inpainting model: its UNet" if found == 2 * expected + 1 else "its UNet"
        raise InputError(f"{where}: {kind} has {found} input channels, expected {expected} (text-to-image)")


def _what_folder(folder: Path) -> str:
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
