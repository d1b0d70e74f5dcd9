"""LoRA files of every kind to ``{part: {module: {role: array}}}``; see `jaxmix.lora_forms` for the roles.

Parts are "unet", "text_encoder" and "text_encoder_2"; modules have our (diffusers') dotted names. A dense layer has
down (i, r) and up (r, o); a convolution down (h, w, i, r) and up (1, 1, r, o). alpha is () float32.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix import lora_forms as forms
from jaxmix.types import CheckpointWarning, InputError, in_one_line, shown
from jaxmix.weights import lora_names, names
from jaxmix.weights.finite import all_finite
from jaxmix.weights.load import find_weights
from jaxmix.weights.lora_names import BUNDLED, Index, Meaning
from jaxmix.weights.lora_peft import METADATA, peft_alpha, peft_configs
from jaxmix.weights.safetensors import SafetensorsFile

__all__ = ["BLOCKS", "METADATA", "Shapes", "read_blocks", "read_lora"]

BLOCKS = "b_lora_blocks"
"""Where a B-LoRA's file says in its metadata, as JSON, which modules hold style and which content."""

_LISTED = 3
_NEEDS_KERNEL = ("down", "up", "mid", "dora_scale", "magnitude")

Leaves = Mapping[str, tuple[int, ...]]
Shapes = Mapping[str, Mapping[str, Leaves]]
"""``{part: {module: {leaf: shape}}}``: what a LoRA can change in a model."""

Keys = dict[tuple[str, str], dict[str, str]]
"""``{(part, module): {role: key of the file}}``."""


def read_lora(
    path: str | os.PathLike[str], shapes: Shapes, unet_config: Mapping[str, Any], part: str | None = None
) -> dict[str, dict[str, dict[str, jax.Array]]]:
    """Read a LoRA file for a model, in float32.

    ``shapes`` are those of the model, ``unet_config`` the UNet's diffusers config, for the names of the original
    layout; ``part`` is the one that names without a part are of, found out if None. alpha is taken from the file's
    tensors, else from PEFT's configuration, else it is the rank. Tensors that belong to no LoRA or to no module of the
    model are left out with one `CheckpointWarning`. Raises `InputError` with one line for a file of which nothing is
    left, other forms of change, modules of which a factor is missing, and shapes of another base.
    """
    source = SafetensorsFile(find_weights(path))
    configs = peft_configs(source)
    notes: list[str] = []
    keys, alone = _keys_by_module(source, shapes, unet_config, part, notes)
    parts: dict[str, dict[str, dict[str, jax.Array]]] = {}
    wrong = []
    for (part, module), found in sorted(keys.items()):
        leaves = shapes[part][module]
        arrays = {role: _read(source, key) for role, key in found.items()}
        f = _in_our_layout(arrays, leaves)
        held = None if f is None else {role: tuple(x.shape) for role, x in f.items()}
        if f is None or held is None or not forms.fits({r: s for r, s in held.items() if r != "alpha"}, leaves):
            said = " ".join(f"{role} {list(x.shape)}" for role, x in arrays.items() if role != "alpha")
            main = next((leaf for leaf in forms.WEIGHTS if leaf in leaves), "bias")
            expected = list(names.to_torch_shape((main,), leaves[main]))
            wrong.append(f"{part} {module} found {said} for weights {expected}")
            continue
        if (rank := forms.rank(held)) is not None:
            if "alpha" in found:
                alpha = _one_number(source, found["alpha"], arrays["alpha"])
            else:
                alpha = peft_alpha(source.where, configs.get(None if part in alone else part, {}), module, rank)
            f["alpha"] = np.asarray(alpha, np.float32)
            if "up_bias" in arrays:  # it is scaled as the product beside it
                f["diff_b"] = f.get("diff_b", 0) + np.float32(alpha / rank) * arrays["up_bias"]
        if "diff_b" in f and f["diff_b"].shape != leaves.get("bias"):
            wrong.append(f"{part} {module} found a bias {list(f['diff_b'].shape)}, expected {leaves.get('bias')}")
            continue
        parts.setdefault(part, {})[module] = {role: jnp.asarray(x, jnp.float32) for role, x in f.items()}
    if wrong:
        raise InputError(
            f"{source.where}: {len(wrong)} of {len(keys)} modules have other shapes than this model: "
            f"{_listing(wrong)}; a LoRA for another base?"
        )
    if notes:
        warnings.warn(in_one_line(f"{source.where}: {'; '.join(notes)}"), CheckpointWarning, stacklevel=3)
    return parts


def read_blocks(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the names that a LoRA file gives to some of its modules, each with a regular expression; {} for none.

    Raises `InputError` for metadata of that name that hold anything else.
    """
    source = SafetensorsFile(find_weights(path))
    if BLOCKS not in source.metadata:
        return {}
    try:
        found = json.loads(source.metadata[BLOCKS])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(pattern, str) for pattern in found.values()):
        raise InputError(
            f"{source.where}: the metadata {BLOCKS} are {shown(source.metadata[BLOCKS])}, expected a JSON object of "
            "names and patterns"
        )
    return found


def _keys_by_module(
    source: SafetensorsFile,
    shapes: Shapes,
    unet_config: Mapping[str, Any],
    forced: str | None,
    notes: list[str],
) -> tuple[Keys, set[str]]:
    """Return the keys of every module's arrays, which are whole, and the parts that names alone did not tell."""
    where, keys = source.where, [key for key in source.entries if not key.startswith(BUNDLED)]
    if bundled := len(source.entries) - len(keys):
        notes.append(f"{bundled} tensors of bundled textual inversions are left out")
    lora_names.refuse_other_forms(where, keys)
    parsed = {key: meaning for key in keys if (meaning := lora_names.parse(key)) is not None}
    strange = [key for key in keys if key not in parsed]
    if not parsed:
        such = f", such as {keys[0]}" if keys else ""
        raise InputError(
            f"{where}: no LoRA in it: found {len(keys)} tensors{such}, expected names like "
            "unet.MODULE.lora_A.weight or lora_unet_MODULE.lora_down.weight"
        )
    indices = {part: Index(part, modules, unet_config) for part, modules in shapes.items()}
    untold = [(key, meaning) for key, meaning in parsed.items() if meaning.part is None]
    told = forced or _part_of(source, untold, indices, shapes)
    found: Keys = {}
    missing: dict[str, tuple[str, str]] = {}  # as the file calls them: part and module
    for key, meaning in parsed.items():
        part = meaning.part or told
        index = indices.get(part)
        module = None if index is None else index.find(meaning.module)
        if module is None:
            missing[f"{part} {meaning.module}"] = part, meaning.module
            continue
        if meaning.role in ("diff_b", "up_bias") and "bias" not in shapes[part][module]:
            strange.append(key)
            continue
        known = found.setdefault((part, module), {})
        if meaning.role in known:
            raise InputError(f"{where}: {part} {module} is set twice, by {known[meaning.role]} and {key}")
        known[meaning.role] = key
    if strange:
        notes.append(f"{len(strange)} of {len(keys)} tensors belong to no LoRA and are left out: {_listing(strange)}")
    if missing:
        listed = []
        for name, (part, module) in sorted(missing.items())[:_LISTED]:
            near = indices[part].near(module) if part in indices else None
            listed.append(f"{name} (near: {near})" if near else name)
        more = len(missing) - len(listed)
        said = f"{', '.join(listed)}{f', ... and {more} more' if more else ''}; a LoRA for another base?"
        count = f"{len(missing)} of {len(missing) + len(found)} modules are not in this model"
        if not found:
            raise InputError(f"{where}: {count}: {said}")
        notes.append(f"{count} and are left out: {said}")
    if not found:
        raise InputError(f"{where}: no LoRA in it: {'; '.join(notes)}")
    for (part, module), known in found.items():
        roles = {"magnitude" if role == "dora_scale" else role for role in known} - {"up_bias", "alpha"}
        lacking = forms.lacking(roles) or ([] if roles else ["down", "up"])
        if "up_bias" in known and "up" not in roles:
            lacking = ["down", "up"]
        if lacking:
            said = " and ".join(known)
            raise InputError(f"{where}: {part} {module} has {said} but no {' and no '.join(dict.fromkeys(lacking))}")
        if forms.too_many(roles):
            raise InputError(f"{where}: {part} {module} has {', '.join(known)}, expected one form of LoRA")
    return found, {told} if untold else set()


def _part_of(
    source: SafetensorsFile, untold: list[tuple[str, Meaning]], indices: Mapping[str, Index], shapes: Shapes
) -> str:
    """Return the part in which most modules of names without one are found, with the widths that their factors have."""

    def fits(part: str, key: str, meaning: Meaning) -> bool:
        module, entry = indices[part].find(meaning.module), source.entries[key].shape
        if module is None or not entry:
            return False
        leaves = shapes[part][module]
        kernel = leaves.get("kernel", ())
        if meaning.role == "down" and len(kernel) >= 2:
            return entry[1:2] == (kernel[-2],)
        if meaning.role == "up" and len(kernel) >= 2:
            return entry[0] == kernel[-1]
        return True

    counts = {part: sum(fits(part, key, meaning) for key, meaning in untold) for part in indices}
    return max(counts, key=lambda part: counts[part], default="unet")


def _in_our_layout(arrays: Mapping[str, np.ndarray], leaves: Leaves) -> dict[str, np.ndarray] | None:
    """Return a module's arrays by the roles of `jaxmix.lora_forms`, without alpha; None if one cannot be that."""
    kernel = leaves.get("kernel", ())
    space = kernel[:-2]
    if len(kernel) < 2 and any(role in arrays for role in _NEEDS_KERNEL):
        return None
    f: dict[str, np.ndarray] = {}
    ones = (1,) * len(space)
    for role, x in arrays.items():
        if role in ("alpha", "up_bias"):
            continue
        if role in ("down", "up", "mid"):
            around = space if role == "mid" or (role == "down" and "mid" not in arrays) else ones
            if x.ndim < 2 or (x.shape[2:] or (1, 1)) != (around or (1, 1)):
                return None
            turned = names.from_torch_layout(("kernel",), x)
            f[role] = np.ascontiguousarray(turned.reshape(*around, *turned.shape[-2:]))
        elif role == "magnitude":  # of PEFT: always one for each output
            f[role] = x.reshape(*ones, 1, -1)
        elif role == "dora_scale":
            by_input = x.ndim >= 2 and x.shape[0] == 1 and x.shape[1] == x.size and kernel[-2] == x.size != 1
            f["magnitude"] = x.reshape(*ones, -1, 1) if by_input else x.reshape(*ones, 1, -1)
        elif role == "diff":
            leaf = next((leaf for leaf in forms.WEIGHTS if leaf in leaves), None)
            if leaf is None or x.size != np.prod(leaves[leaf], dtype=int) or x.ndim < min(len(leaves[leaf]), 2):
                return None
            turned = names.from_torch_layout(("kernel",), x) if leaf == "kernel" else x
            f[role] = np.ascontiguousarray(turned).reshape(leaves[leaf])
        else:
            f[role] = x
    return f


def _one_number(source: SafetensorsFile, key: str, array: np.ndarray) -> float:
    values = array.reshape(-1)
    if not values.size or (values != values[0]).any():
        raise InputError(f"{source.where}: {key} has {values.size} values, expected one number")
    return float(values[0])


def _read(source: SafetensorsFile, key: str) -> np.ndarray:
    array = source.read(key).astype(np.float32)
    if not all_finite(array):
        raise InputError(f"{source.where}: tensor {key!r} has NaN or infinite values, expected finite numbers")
    return array


def _listing(items: list[str]) -> str:
    more = f", ... and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(sorted(items)[:_LISTED]) + more
