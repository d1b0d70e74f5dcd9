"""LoRAs to files, in the names of diffusers and PEFT, or of kohya's scripts and LyCORIS."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmix.types import InputError
from jaxmix.weights import lora_names
from jaxmix.weights.lora_files import BLOCKS, METADATA
from jaxmix.weights.names import to_torch_layout
from jaxmix.weights.single_file_names import TEXT_MODEL
from jaxmix.weights.store import save_tree

FORMATS = ("diffusers", "kohya")
_TABLE = "_embedding"  # modules of this ending hold tables, which have one layout everywhere

Parts = Mapping[str, Mapping[str, Mapping[str, Any]]]


def write_lora(
    path: str | os.PathLike[str],
    parts: Parts,
    layout: str = "diffusers",
    dtype: Any = None,
    original_unet: Mapping[str, Any] | None = None,
    blocks: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA as one safetensors file, which appears whole or not at all.

    "diffusers": PEFT's names with ranks and alphas in the metadata, like `save_lora_weights` of diffusers; plain LoRA,
    and DoRA of it if all modules of a part have it. "kohya": underscores and alpha tensors, for every form; with the
    config ``original_unet`` the names of the UNet are those of the original layout, like kohya's scripts for SDXL.
    ``dtype`` casts the factors; ``blocks`` are kept in the metadata, see `read_blocks`.
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
            if layout == "diffusers":
                _check_peft(path, part, module, f, modules)
                down, up = (f[role] if dtype is None else jnp.asarray(f[role], dtype) for role in ("down", "up"))
                # diffusers accepts PEFT names for a text encoder only if some are of its attention, but these always.
                endings = ("lora_A", "lora_B") if part == "unet" else ("lora_linear_layer.down", "lora_linear_layer.up")
                tree[f"{part}.{module}.{endings[0]}"] = {"kernel": down}
                tree[f"{part}.{module}.{endings[1]}"] = {"kernel": up}
                if "magnitude" in f:  # (o,), of a convolution (1, o, 1, 1)
                    g = np.asarray(f["magnitude"] if dtype is None else jnp.asarray(f["magnitude"], dtype))
                    shape = (-1,) if g.ndim == 2 else (1, -1, *[1] * (g.ndim - 2))
                    # transformers 5 finds a text encoder's magnitude under PEFT's name of its module alone.
                    name, leaf = f"{part}.{module}", "lora_magnitude_vector"
                    if part != "unet":
                        name, leaf = f"{name}.{leaf}", "scale"  # which torch calls weight
                    tree[name] = {leaf: g.reshape(shape)}
            else:
                theirs = original.get(module, module) if part == "unet" else module
                name = prefixes[part] + lora_names.flat(theirs)
                cast = {role: x if dtype is None or role == "alpha" else jnp.asarray(x, dtype) for role, x in f.items()}
                _put(tree, name, module, cast)
        if layout == "diffusers" and modules:
            config |= {f"{part}.{key}": value for key, value in _peft_config(modules).items()}
    metadata = {METADATA: json.dumps(config, indent=2, sort_keys=True)} if config else {}
    if blocks:
        metadata[BLOCKS] = json.dumps(dict(blocks))
    save_tree(tree, path, metadata=metadata)


def _check_peft(path: Any, part: str, module: str, f: Mapping[str, Any], modules: Mapping[str, Any]) -> None:
    """Raise `InputError` for what PEFT's names cannot hold; its files have DoRA everywhere or nowhere."""
    roles = set(f) - {"magnitude"}
    if roles != {"down", "up", "alpha"} or ("magnitude" in f and f["magnitude"].shape[-2] != 1):
        raise InputError(
            f"{path}: {part} {module} has {', '.join(sorted(f))}: PEFT's names hold plain LoRA, and DoRA of it with a "
            'magnitude of each output, expected format="kohya"'
        )
    if "magnitude" in f and (without := sorted(name for name, g in modules.items() if "magnitude" not in g)):
        raise InputError(
            f"{path}: {part} {module} has a magnitude and {without[0]} has none: PEFT's names hold DoRA of all modules "
            'or none, expected format="kohya"'
        )


def _put(tree: dict[str, Any], name: str, module: str, f: Mapping[str, Any]) -> None:
    """Add a module's arrays under kohya's and LyCORIS's names."""
    here = tree.setdefault(name, {})
    for role, x in f.items():
        if role in ("down", "up", "mid"):
            tree[f"{name}.lora_{role}"] = {"kernel": x}
        elif role == "magnitude":
            here["dora_scale"] = to_torch_layout(("kernel",), np.asarray(x))
        elif role == "diff":
            here["diff"] = np.asarray(x) if module.endswith(_TABLE) else to_torch_layout(("kernel",), np.asarray(x))
        else:
            here[role] = x


def _peft_config(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return PEFT's configuration of one part: the commonest rank and alpha, and the modules with other ones."""
    # A pattern may leave out a prefix: without `text_model.` it fits old and new transformers.
    ranks = {module.removeprefix(TEXT_MODEL): int(f["down"].shape[-1]) for module, f in modules.items()}
    alphas = {module.removeprefix(TEXT_MODEL): _whole(float(f["alpha"])) for module, f in modules.items()}
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    return {
        **({"use_dora": True} if any("magnitude" in f for f in modules.values()) else {}),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
    }


def _whole(number: float) -> int | float:
    return int(number) if number.is_integer() else number
