"""LoRA files, diffusers/PEFT and kohya, to ``{part: {module: {"down", "up", "alpha"}}}`` and back.

Parts are "unet", "text_encoder" and "text_encoder_2"; modules have our (diffusers') dotted names. A dense layer has
down (i, r) and up (r, o); a convolution down (h, w, i, r) and up (1, 1, r, o). alpha is () float32.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.types import InputError
from jaxmix.weights import lora_names, names
from jaxmix.weights.finite import all_finite
from jaxmix.weights.load import find_weights, read_config
from jaxmix.weights.lora_names import Index, Role
from jaxmix.weights.safetensors import SafetensorsFile
from jaxmix.weights.single_file_names import TEXT_MODEL
from jaxmix.weights.store import save_tree

FORMATS = ("diffusers", "kohya")
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's configuration, as JSON, in the metadata of the safetensors file."""

_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_LISTED = 3

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""``{part: {module: shape of its kernel}}``: what a LoRA can change in a model."""

Parts = Mapping[str, Mapping[str, Mapping[str, Any]]]


def read_lora(
    path: str | os.PathLike[str], shapes: Shapes, unet_config: Mapping[str, Any]
) -> dict[str, dict[str, dict[str, jax.Array]]]:
    """Read a LoRA file for a model, in float32.

    ``shapes`` are those of the model's kernels, ``unet_config`` the UNet's diffusers config, for the names of the
    original layout. alpha is taken from the file's tensors, else from PEFT's metadata, else it is the rank.
    Raises `InputError` with one line for a file without a LoRA, another form of it (DoRA, LoHa, LoKr, Tucker ...),
    modules that the model lacks, with near misses, and shapes of another base.
    """
    source = SafetensorsFile(find_weights(path))
    keys = _keys_by_module(source, shapes, unet_config)
    configs = _peft_configs(source)
    _check_shapes(source, keys, shapes)
    parts: dict[str, dict[str, dict[str, jax.Array]]] = {}
    for (part, module), found in sorted(keys.items()):
        kernel = shapes[part][module]
        space = kernel[:-2]
        down, up = _factor(source, found["down"], space), _factor(source, found["up"], (1,) * len(space))
        rank = down.shape[-1]
        if "alpha" in found:
            alpha = float(_read(source, found["alpha"]).reshape(()))
        else:
            alpha = _peft_alpha(configs.get(part, {}), module, rank)
        parts.setdefault(part, {})[module] = {
            "down": jnp.asarray(down),
            "up": jnp.asarray(up),
            "alpha": jnp.asarray(alpha, jnp.float32),
        }
    return parts


def write_lora(
    path: str | os.PathLike[str],
    parts: Parts,
    layout: str = "diffusers",
    dtype: Any = None,
    original_unet: Mapping[str, Any] | None = None,
) -> None:
    """Write a LoRA as one safetensors file, which appears whole or not at all.

    "diffusers": PEFT's names with ranks and alphas in the metadata, like `save_lora_weights` of diffusers.
    "kohya": underscores and alpha tensors; with the config ``original_unet`` the names of the UNet are those of the
    original layout, like kohya's scripts for SDXL. ``dtype`` casts the factors.
    """
    if layout not in FORMATS:
        raise InputError(f"lora format: found {layout!r}, expected one of {', '.join(FORMATS)}")
    if not any(parts.values()):
        raise InputError(f"{path}: the LoRA has no modules, expected at least one")
    tree: dict[str, dict[str, Any]] = {}
    config: dict[str, Any] = {}
    original: dict[str, str] = {}
    if layout == "kohya" and original_unet is not None:
        original = lora_names.original_names(parts.get("unet", {}), original_unet)
    prefixes = lora_names.KOHYA if original_unet is None else lora_names.KOHYA_XL
    for part, modules in parts.items():
        for module, f in modules.items():
            down, up = (f[role] if dtype is None else jnp.asarray(f[role], dtype) for role in ("down", "up"))
            if layout == "diffusers":
                # diffusers accepts PEFT names for a text encoder only if some are of its attention, but these always.
                endings = ("lora_A", "lora_B") if part == "unet" else ("lora_linear_layer.down", "lora_linear_layer.up")
                tree[f"{part}.{module}.{endings[0]}"] = {"kernel": down}
                tree[f"{part}.{module}.{endings[1]}"] = {"kernel": up}
            else:
                theirs = original.get(module, module) if part == "unet" else module
                name = prefixes[part] + lora_names.flat(theirs)
                tree[f"{name}.lora_down"], tree[f"{name}.lora_up"] = {"kernel": down}, {"kernel": up}
                tree[name] = {"alpha": f["alpha"]}
        if layout == "diffusers" and modules:
            config |= {f"{part}.{key}": value for key, value in _peft_config(modules).items()}
    metadata = {METADATA: json.dumps(config, indent=2, sort_keys=True)} if config else {}
    save_tree(tree, path, metadata=metadata)


def _keys_by_module(
    source: SafetensorsFile, shapes: Shapes, unet_config: Mapping[str, Any]
) -> dict[tuple[str, str], dict[Role, str]]:
    """Return the keys of every module's arrays, checked to be complete and to belong to the model."""
    where, keys = source.where, list(source.entries)
    lora_names.refuse_other_forms(where, keys)
    parsed = {key: lora_names.parse(key) for key in keys}
    strange = [key for key, meaning in parsed.items() if meaning is None]
    if len(strange) == len(keys):
        such = f", such as {keys[0]}" if keys else ""
        raise InputError(
            f"{where}: no LoRA in it: found {len(keys)} tensors{such}, expected names like "
            "unet.MODULE.lora_A.weight or lora_unet_MODULE.lora_down.weight"
        )
    if strange:
        raise InputError(
            f"{where}: {len(strange)} of {len(keys)} tensors belong to no LoRA: {_listing(strange)}; "
            "expected factors and alphas only"
        )
    indices = {part: Index(part, modules, unet_config) for part, modules in shapes.items()}
    found: dict[tuple[str, str], dict[Role, str]] = {}
    missing: dict[str, tuple[str, str]] = {}  # as the file calls them: part and module
    for key, meaning in parsed.items():
        assert meaning is not None
        index = indices.get(meaning.part)
        module = None if index is None else index.find(meaning.module)
        if module is None:
            missing[f"{meaning.part} {meaning.module}"] = meaning.part, meaning.module
            continue
        known = found.setdefault((meaning.part, module), {})
        if meaning.role in known:
            raise InputError(f"{where}: {meaning.part} {module} is set twice, by {known[meaning.role]} and {key}")
        known[meaning.role] = key
    if missing:
        listed = []
        for name, (part, module) in sorted(missing.items())[:_LISTED]:
            near = indices[part].near(module) if part in indices else None
            listed.append(f"{name} (near: {near})" if near else name)
        more = len(missing) - len(listed)
        raise InputError(
            f"{where}: {len(missing)} of {len(missing) + len(found)} modules are not in this model: "
            f"{', '.join(listed)}{f', ... and {more} more' if more else ''}; a LoRA for another base?"
        )
    for (part, module), known in found.items():
        lacking = [role for role in ("down", "up") if role not in known]
        if lacking:
            raise InputError(f"{where}: {part} {module} has {' and '.join(known)} but no {' and no '.join(lacking)}")
    return found


def _check_shapes(source: SafetensorsFile, keys: Mapping[tuple[str, str], Mapping[Role, str]], shapes: Shapes) -> None:
    wrong = []
    for (part, module), found in keys.items():
        kernel = shapes[part][module]
        down, up = (source.entries[found[role]].shape for role in ("down", "up"))
        expected = names.to_torch_shape(("kernel",), kernel)
        space = expected[2:]
        fits = (
            min(len(down), len(up)) >= 2
            and (up[0], *down[1:2]) == expected[:2]
            and up[1] == down[0] > 0
            and _same_space(down[2:], space)
            and _same_space(up[2:], ())
        )
        alpha = source.entries[found["alpha"]].shape if "alpha" in found else ()
        if not fits or alpha not in ((), (1,)):
            wrong.append(f"{part} {module} found down {list(down)} up {list(up)} for weights {list(expected)}")
    if wrong:
        raise InputError(
            f"{source.where}: {len(wrong)} of {len(keys)} modules have other shapes than this model: "
            f"{_listing(wrong)}; a LoRA for another base?"
        )


def _same_space(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether two kernels have the same spatial extent, which is (1, 1) for a dense layer, too."""
    return (found or (1, 1)) == (expected or (1, 1))


def _factor(source: SafetensorsFile, key: str, space: tuple[int, ...]) -> np.ndarray:
    """Return a factor in our layout and float32, with the spatial axes ``space`` (none for a dense layer)."""
    array = names.from_torch_layout(("kernel",), _read(source, key))
    return np.ascontiguousarray(array.reshape(*space, *array.shape[-2:]))


def _read(source: SafetensorsFile, key: str) -> np.ndarray:
    array = source.read(key).astype(np.float32)
    if not all_finite(array):
        raise InputError(f"{source.where}: tensor {key!r} has NaN or infinite values, expected finite numbers")
    return array


def _peft_configs(source: SafetensorsFile) -> dict[str, dict[str, Any]]:
    """Return PEFT's configuration of each part, from the metadata or from the file that PEFT writes beside it."""
    config_file = Path(source.where).parent / _PEFT_CONFIG
    if METADATA in source.metadata:
        try:
            flat = json.loads(source.metadata[METADATA])
        except json.JSONDecodeError as error:
            raise InputError(f"{source.where}: the metadata {METADATA} is not JSON: {error.msg}") from None
        configs: dict[str, dict[str, Any]] = {}
        for key, value in flat.items() if isinstance(flat, Mapping) else ():
            part, _, name = key.partition(".")
            configs.setdefault(part, {})[name] = value
    elif Path(source.where).name == _PEFT_FILE and config_file.is_file():
        configs = {"unet": read_config(config_file)}
    else:
        configs = {}
    return configs


def _peft_alpha(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the alpha that PEFT would use; where it scales by the root of the rank, converted to scale by the rank."""
    alpha = config.get("lora_alpha") or rank
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) * (rank**0.5 if config.get("use_rslora") else 1.0)


def _peft_config(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return PEFT's configuration of one part: the commonest rank and alpha, and the modules with other ones."""
    # A pattern may leave out a prefix: without `text_model.` it fits old and new transformers.
    ranks = {module.removeprefix(TEXT_MODEL): int(f["down"].shape[-1]) for module, f in modules.items()}
    alphas = {module.removeprefix(TEXT_MODEL): _whole(float(f["alpha"])) for module, f in modules.items()}
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
    }


def _whole(number: float) -> int | float:
    return int(number) if number.is_integer() else number


def _listing(items: list[str]) -> str:
    more = f", ... and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(sorted(items)[:_LISTED]) + more
