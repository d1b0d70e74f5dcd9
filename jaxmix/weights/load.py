"""Safetensors files to parameter trees, driven by the target tree, with nothing skipped in silence."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.types import InputError
from jaxmix.weights import names
from jaxmix.weights.safetensors import Entry, Header, aligned_empty, read_header, read_tensor

WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
)
CONFIG_FILES = ("config.json", "scheduler_config.json", "model_index.json")
IGNORED_KEYS = ("text_model.embeddings.position_ids", "embeddings.position_ids")

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_LISTED = 8  # how many keys of each kind an error spells out


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a `config.json`, or the one in a model's or scheduler's folder.

    Raises InputError naming the file if it is missing or holds no JSON object.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in CONFIG_FILES if (path / name).is_file()]
        if not found:
            raise InputError(f"{path}: no {' or '.join(CONFIG_FILES)} in this folder")
        path = found[0]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a UTF-8 text file") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON: {error.msg} at line {error.lineno}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: found a JSON {type(config).__name__}, expected an object")
    return config


def find_weights(folder: str | os.PathLike[str]) -> Path:
    """Returns the safetensors file of a diffusers model folder; a file is checked and returned as it is.

    Raises InputError if there is none, and says what to do if there are pickles instead.
    """
    folder = Path(folder)
    if folder.is_file():
        if folder.suffix in _PICKLES:
            raise _pickle_error(folder)
        return folder
    if not folder.is_dir():
        raise InputError(f"{folder}: no such file or folder")
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.is_file())
    for path in found:
        if path.suffix in _PICKLES:
            raise _pickle_error(path)
    listing = ", ".join(path.name for path in found[:_LISTED]) or "no files"
    raise InputError(f"{folder}: no weights: found {listing}, expected one of {', '.join(WEIGHT_FILES)}")


def load_tree(
    path: str | os.PathLike[str],
    target: Mapping[str, Any],
    dtype: Any = None,
    ignore: Sequence[str] = IGNORED_KEYS,
) -> dict[str, Any]:
    """Loads a safetensors file (or the one in a folder) into a tree of JAX arrays shaped like `target`.

    `target` holds ShapeDtypeStructs or arrays. Floating leaves become `dtype`, by default each that of its target
    leaf. Keys in `ignore` may be in the file without being used. The names are compared as a whole before any tensor
    is read; then tensors are read one by one, the largest first, so that the peak is about the size of the tree.
    Raises InputError with one line that counts and lists what is missing, unused, of wrong shape, of wrong rank, of
    wrong dtype, or set twice.
    """
    path = find_weights(path)
    header = read_header(path)
    plan = _plan(path, header, target, set(ignore))

    leaves: dict[names.Path, jax.Array] = {}
    with path.open("rb") as file:
        for leaf_path, entry, leaf in sorted(plan, key=lambda item: -item[1].nbytes):
            array = names.from_torch_layout(leaf_path, read_tensor(file, entry))
            wanted = np.dtype(dtype) if dtype is not None and _is_float(leaf.dtype) else np.dtype(leaf.dtype)
            if array.dtype != wanted or not array.flags.c_contiguous:
                converted = aligned_empty(array.shape, wanted)
                np.copyto(converted, array, casting="unsafe")
                array = converted
            # Unlike jnp.asarray, device_put keeps aligned host memory instead of copying it.
            leaves[leaf_path] = jax.device_put(array)
    return names.unflatten({leaf_path: leaves[leaf_path] for leaf_path, _ in names.flatten(target)})


def _plan(
    path: Path, header: Header, target: Mapping[str, Any], ignore: set[str]
) -> list[tuple[names.Path, Entry, Any]]:
    """Pairs every leaf of the target with its tensor in the file, or raises InputError listing every difference."""
    expected: dict[str, tuple[names.Path, Any]] = {}
    for leaf_path, leaf in names.flatten(target):
        key = names.to_torch_key(leaf_path)
        if key in expected:
            raise ValueError(f"{'.'.join(expected[key][0])} and {'.'.join(leaf_path)} both have the torch name {key}")
        expected[key] = leaf_path, leaf

    sources: dict[str, list[str]] = {}
    unused = []
    for file_key in header.entries:
        if (key := names.match(file_key, expected)) is not None:
            sources.setdefault(key, []).append(file_key)
        elif file_key not in ignore:
            unused.append(file_key)

    plan, shapes, ranks, dtypes = [], [], [], []
    for key, file_keys in sources.items():
        (leaf_path, leaf), entry = expected[key], header.entries[file_keys[0]]
        shape = names.to_torch_shape(leaf_path, tuple(leaf.shape))
        entry = Entry(entry.dtype, names.fold_shape(key, entry.shape, shape), entry.offset)
        plan.append((leaf_path, entry, leaf))
        difference = f"{file_keys[0]} found {list(entry.shape)} expected {list(shape)}"
        if len(entry.shape) != len(shape):
            ranks.append(difference)
        elif entry.shape != shape:
            shapes.append(difference)
        if _is_float(entry.dtype) != _is_float(leaf.dtype):
            dtypes.append(f"{file_keys[0]} found {entry.dtype} expected {leaf.dtype}")

    faults = {
        "missing": [key for key in expected if key not in sources],
        "unused": unused,
        "wrong shape": shapes,
        "wrong rank": ranks,
        "wrong dtype": dtypes,
        "set twice": [f"{key} by {' and '.join(keys)}" for key, keys in sources.items() if len(keys) > 1],
    }
    faults = {kind: items for kind, items in faults.items() if items}
    if faults:
        counts = ", ".join(f"{len(items)} {kind}" for kind, items in faults.items())
        lists = "; ".join(f"{kind}: {_listing(items)}" for kind, items in faults.items())
        raise InputError(
            f"{path}: does not fit the model: {len(header.entries)} tensors found, {len(expected)} expected "
            f"({counts}): {lists}"
        )
    return plan


def _listing(items: list[str]) -> str:
    more = f", ... and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(sorted(items)[:_LISTED]) + more


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(np.dtype(dtype), jnp.floating)


def _pickle_error(path: Path) -> InputError:
    return InputError(
        f"{path}: is a Python pickle, which can run code when it is opened, and is refused; convert it where you trust "
        f"it, e.g. DiffusionPipeline.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)"
    )
