"""Checkpoints of every kind to a `Pipeline`: the one place that finds out what a folder or file is."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmix.models import AutoencoderKL, CLIPTextConfig, CLIPTextModel, UNet2DConditionModel, UNetConfig, VAEConfig
from jaxmix.paths import url_of
from jaxmix.pipeline.folders import PARTS, own_defaults, pipeline_family, what_folder
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.released import RELEASED
from jaxmix.samplers import default_sampler, differences, known_sampler
from jaxmix.schedule import NoiseSchedule
from jaxmix.types import CheckpointWarning, InputError, Params, in_one_line, shown
from jaxmix.weights import FlaxTree, Source, load_tree, open_source, read_config, stored_dtype
from jaxmix.weights.files import ASSETS, exists, user_path
from jaxmix.weights.hub import download
from jaxmix.weights.part_files import open_part
from jaxmix.weights.single_file import CLIP_TOKENIZER, open_single_file
from jaxmix.weights.single_file_extras import Extras

_TOKENIZERS = {"sd": ("tokenizer",), "sdxl": ("tokenizer", "tokenizer_2")}
_GUIDANCE_SCALE = {"sd": 7.5, "sdxl": 5.0}
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
_HUB_URL = re.compile(rf"hf://({_HUB_ID.pattern})")
_KNOWN = "'mini', a diffusers folder, a .safetensors file, a hub id 'owner/name', or one in gs://, s3:// or hf://"
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


@dataclasses.dataclass(frozen=True)
class _Told:
    """What a caller says about a model, over what its files say."""

    sampler: str | None = None
    prediction_type: str | None = None
    zero_snr: bool | None = None
    vae: Path | None = None
    unet: Path | None = None


def load(
    name: str | Path = "mini",
    dtype: Any = None,
    *,
    sampler: str | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
    vae: str | Path | None = None,
    base: str | Path | None = None,
) -> Pipeline:
    """Load a Stable Diffusion 1.x, 2.x or XL pipeline, in whichever form it comes.

    ``name`` is "mini" (the model in this package), a diffusers folder (safetensors, sharded or not, or Flax msgpack),
    a single ``.safetensors`` file in the original layout, a hub id "owner/name", or the address of such a folder or
    file in a bucket (gs://, s3://) or on the hub (hf://owner/name/file.safetensors).
    ``dtype`` is the type of weights and computation: float32 (if None), bfloat16, float16, or "auto" for the widest
    type in which each part is stored. A VAE that overflows in float16 (``force_upcast``) is still computed in float32.
    ``sampler``, ``prediction_type`` ("epsilon", "v_prediction", "sample") and ``rescale_betas_zero_snr`` (arXiv
    2305.08891, with trailing timesteps) override the checkpoint's.
    ``vae`` is a VAE to use instead: its folder, its file, or a model that has it. With ``base``, a model as above,
    only the UNet is taken from ``name``, which may then be a UNet's folder or file, and the rest from the base.

    A `CheckpointWarning` per file says what is ignored or replaced in it. Raises `InputError` for anything missing,
    damaged or not supported.
    """
    kind = _dtype(dtype)
    sampler = None if sampler is None else known_sampler(sampler)
    if rescale_betas_zero_snr not in (None, True, False):
        raise InputError(f"rescale_betas_zero_snr: found {rescale_betas_zero_snr!r}, expected True or False")
    told = _Told(sampler, prediction_type, rescale_betas_zero_snr, None if vae is None else _found("vae", vae))
    if base is not None:
        told, name = dataclasses.replace(told, unet=_found("unet", name)), base
    path = _found("model" if base is None else "base", name)
    if path.is_dir():
        pipe = _load_folder(path, kind, told)
    elif path.suffix.lower() == ".safetensors":
        pipe = _load_single_file(path, kind, told)
    else:
        what = _OTHER_FILES.get(path.suffix.lower(), "a file of another kind")
        raise InputError(f"{path}: found {what}, expected {_KNOWN}")
    return pipe if sampler is None else dataclasses.replace(pipe, sampler=sampler)


def _found(what: str, name: str | Path) -> Path:
    """Return the path of a model that is named in any way; what is only on the hub is downloaded."""
    if found := _HUB_URL.fullmatch(url_of(name) or ""):
        return download(found[1], PARTS["sdxl"], alone=what in ("unet", "vae"))
    path = ASSETS / "mini" if str(name) == "mini" else user_path(name)
    if exists(path):
        return path
    if not _HUB_ID.fullmatch(str(name)):
        where = "" if what in ("model", "unet") else f"{what}: "
        raise InputError(f"{where}{shown(str(name), 200)[1:-1]}: found no such folder or file, expected {_KNOWN}")
    return download(str(name), PARTS["sdxl"], alone=what in ("unet", "vae"))


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
    with _naming(found) as notes:
        ours = _MODELS[part](_read(part, module.config, notes), jnp.dtype(module.dtype))
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
def _naming(where: Any) -> Iterator[list[str]]:
    """Name the file in every `InputError` raised in this block, and in one warning of the notes that it makes."""
    notes: list[str] = []
    try:
        yield notes
    except InputError as e:
        raise InputError(f"{where}: {e}") from None
    if notes:
        warnings.warn(in_one_line(f"{where}: {'; '.join(notes)}"), CheckpointWarning, stacklevel=5)


def _load_folder(folder: Path, kind: np.dtype | None, told: _Told) -> Pipeline:
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: found {what_folder(folder)}, expected a diffusers pipeline (model_index.json)")
    index = read_config(folder / "model_index.json")
    with _naming(folder / "model_index.json") as notes:
        family, named = pipeline_family(index, notes)
        defaults = own_defaults(index)
    replaced = {part for part in ("unet", "vae") if getattr(told, part) is not None}
    folders = (*PARTS[family], *_TOKENIZERS[family], "scheduler")
    for part in folders:
        if not (folder / part).is_dir() and part not in replaced:
            raise InputError(f"{folder}: found no {part} folder in this {named}, expected {', '.join(folders)}")
    configs = {}
    for part in PARTS[family]:
        where = folder / part / "config.json"
        if part not in replaced or where.is_file():
            found = read_config(where)
            with _naming(where) as notes:
                configs[part] = _read(part, found, notes)
    sources = {part: open_source(folder / part) for part in configs if part not in replaced}
    scheduler = read_config(folder / "scheduler" / "scheduler_config.json")
    scheduler = scheduler | _replace_parts(told, family, configs, sources)
    with _naming(folder / "scheduler" / "scheduler_config.json") as notes:
        schedule = _schedule(scheduler, told, notes, defaults.get("sampler"))
    _check_channels(folder, configs)
    return _assemble(
        folder,
        configs,
        sources,
        kind,
        schedule=schedule,
        tokenizer=folder / "tokenizer",
        tokenizer_2=folder / "tokenizer_2" if family == "sdxl" else None,
        **_defaults(family, schedule, configs["unet"], defaults),
        zeros_for_empty_prompt=family == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True)),
        extras=Extras.open(folder) if not replaced else None,
    )


def _load_single_file(path: Path, kind: np.dtype | None, told: _Told) -> Pipeline:
    from transformers import CLIPTokenizer  # here, because importing it takes longer than everything else

    with _naming(path) as notes:
        try:
            file = open_single_file(path, None, told.prediction_type, told.vae is None, notes)
        except InputError as e:
            raise InputError(str(e).removeprefix(f"{path}: ")) from None
        configs = {part: _read(part, config, notes) for part, config in file.configs.items()}
        sources = {part: source for part, source in file.sources.items() if getattr(told, part, None) is None}
        family = "sdxl" if "text_encoder_2" in configs else "sd"
        scheduler = file.scheduler | _replace_parts(told, family, configs, sources)
        schedule = _schedule(scheduler, told, notes)
    _check_channels(path, configs)
    tokenizers: dict[str, Any] = {
        name: CLIPTokenizer.from_pretrained(str(CLIP_TOKENIZER), pad_token=pad) for name, pad in file.pad_tokens.items()
    }
    return _assemble(
        path,
        configs,
        sources,
        kind,
        schedule=schedule,
        **tokenizers,
        **_defaults(family, schedule, configs["unet"]),
        zeros_for_empty_prompt=family == "sdxl",
        extras=file.extras if told.unet is None and told.vae is None else None,
    )


def _defaults(family: str, schedule: NoiseSchedule, unet: Any, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the steps, guidance scale and sampler of a model; `own` holds what it says itself."""
    own = own or {}
    sampler, scale = default_sampler(schedule), _GUIDANCE_SCALE[family]
    steps = 4 if sampler in ("lcm", "tcd") else 25
    if unet.time_cond_proj_dim is not None:
        scale = 8.5  # of diffusers' pipeline for latent consistency models
    elif sampler in ("lcm", "tcd"):
        scale = 1.0  # guidance is distilled into it
    return {
        "default_steps": own.get("steps", steps),
        "default_guidance_scale": own.get("guidance_scale", scale),
        "sampler": own.get("sampler", sampler),
    }


def _replace_parts(told: _Told, family: str, configs: dict[str, Any], sources: dict[str, Source]) -> dict[str, Any]:
    """Open the parts that the caller names into `configs` and `sources`; return what they say about the schedule."""
    scheduler: dict[str, Any] = {}
    for part in ("unet", "vae"):
        if (path := getattr(told, part)) is None:
            continue
        of_base = configs.get(part) or _read(part, RELEASED["sdxl" if family == "sdxl" else "sd15"][part], [])
        with _naming(path) as notes:
            try:
                opened = open_part(path, part, of_base.to_dict(), notes)
            except InputError as e:
                raise InputError(str(e).removeprefix(f"{path}: ")) from None
            configs[part] = of_base if opened.config is None else _read(part, opened.config, notes)
        sources[part] = opened.source
        scheduler |= opened.scheduler
    return scheduler


def _assemble(
    where: Path, configs: Mapping[str, Any], sources: Mapping[str, Source], kind: np.dtype | None, **fields: Any
) -> Pipeline:
    """Load the weights of all parts into a pipeline; a `kind` of None keeps the widest precision of each part."""
    models: dict[str, Any] = {}
    params: dict[str, Params] = {}
    for part, config in configs.items():
        if kind is None:
            with _naming(sources[part].where) as notes:
                kept = stored_dtype(sources[part], notes)
        else:
            kept = kind
        # float16 can hold the weights, but not the activations.
        overflows = part == "vae" and kept == np.float16 and config.force_upcast
        models[part] = _MODELS[part](config, np.dtype(np.float32) if overflows else kept)
        try:
            target = models[part].abstract_params()
        except (TypeError, ValueError, IndexError, ArithmeticError) as error:
            said = shown(str(error), 200)[1:-1]
            raise InputError(
                f"{where}: the config of its {part} describes no model that can be built: {said}"
            ) from None
        params[part] = load_tree(sources[part], target, kept)
    with _naming(where):
        return Pipeline(**models, params=params, **fields)


def _read(part: str, config: Mapping[str, Any], notes: list[str]) -> Any:
    return _CONFIGS[part].from_dict(_without_flax(config), notes)


def _schedule(config: Mapping[str, Any], told: _Told, notes: list[str], stored: str | None = None) -> NoiseSchedule:
    """Return the schedule of a scheduler config; `stored` is the sampler that a folder of ours names."""
    config = dict(config)
    if isinstance(named := config.get("_class_name"), str):
        config["_class_name"] = named.removeprefix("Flax")
    if told.prediction_type is not None:
        config["prediction_type"] = told.prediction_type
    if told.zero_snr is not None:
        config["rescale_betas_zero_snr"] = told.zero_snr
    if config.get("rescale_betas_zero_snr") is True and (told.zero_snr or not config.get("timestep_spacing")):
        config["timestep_spacing"] = "trailing"  # the last timestep, where there is no signal, must be visited
    schedule = dataclasses.replace(NoiseSchedule.from_config(config, notes), lenient=True)
    if told.sampler is None and stored is None and (said := differences(schedule)):
        notes.append(said)
    return schedule


def _check_channels(where: Path, configs: Mapping[str, Any]) -> None:
    """Refuse a UNet that takes more than latents, and a VAE of other pictures, before their weights are read."""
    found, expected = configs["unet"].in_channels, configs["vae"].latent_channels
    if found != expected:
        kind = "an inpainting model: its UNet" if found == 2 * expected + 1 else "its UNet"
        raise InputError(f"{where}: {kind} has {found} input channels, expected {expected} (text-to-image)")
    for channels in (configs["vae"].in_channels, configs["vae"].out_channels):
        if channels != 3:
            raise InputError(f"{where}: its VAE has pictures of {channels} channels, expected 3 (red, green, blue)")
