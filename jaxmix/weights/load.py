"""Sources of tensors to parameter trees, driven by the target tree, with nothing skipped silently."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.types import InputError
from jaxmix.weights import names
from jaxmix.weights.files import WEIGHTS, preferred, read_json
from jaxmix.weights.finite import all_finite
from jaxmix.weights.msgpack import open_msgpack
from jaxmix.weights.safetensors import SafetensorsFile, aligned_empty
from jaxmix.weights.sharded import ShardedFiles
from jaxmix.weights.source import Entry, Source, stored_dtype

CONFIG_FILES = ("config.json", "scheduler_config.json", "model_index.json")
IGNORED_KEYS = ("text_model.embeddings.position_ids", "embeddings.position_ids")

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_LISTED = 8  # how many keys of each kind an error spells out


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a `config.json`, or the one in a model's or scheduler's folder.

    Raises InputError naming the file if it is missing or does not hold a JSON object.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in CONFIG_FILES if (path / name).is_file()]
        if not found:
            raise InputError(f"{path}: found no {' or '.join(CONFIG_FILES)} in this folder")
        path = found[0]
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: found a JSON {type(config).__name__}, expected an object")
    return config


def find_weights(folder: str | os.PathLike[str]) -> Path:
    """Return the file in a model's folder that has its weights: safetensors, an index of shards, or Flax msgpack.

    A file is checked and returned as is. Raises InputError if there is none, which says what to do if there are pickles
    instead.
    """
    folder = Path(folder)
    if folder.is_file():
        if folder.suffix.lower() in _PICKLES:
            raise _pickle_error(folder)
        return folder
    if not folder.is_dir():
        raise InputError(f"{folder}: no such file or folder")
    found = sorted(path for path in folder.iterdir() if path.is_file())
    if (name := preferred(path.name for path in found)) is not None:
        return folder / name
    for path in found:
        if path.suffix.lower() in _PICKLES:
            raise _pickle_error(path)
    listing = ", ".join(path.name for path in found[:_LISTED]) or "no files"
    raise InputError(f"{folder}: no weights: found {listing}, expected {WEIGHTS}")


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a model's folder, a safetensors file, an index of shards, or a Flax msgpack file, told by its name.

    Reads tables of contents only. Raises InputError for a path without weights and for damaged files.
    """
    path = find_weights(path)
    if path.suffix.lower() == ".msgpack":
        return open_msgpack(path)
    if path.suffix.lower() == ".json":
        return ShardedFiles(path)
    return SafetensorsFile(path)


def load_tree(
    source: Source | str | os.PathLike[str],
    target: Mapping[str, Any],
    dtype: Any = None,
    ignore: Sequence[str] = IGNORED_KEYS,
) -> dict[str, Any]:
    """Load a source, or the file or folder at a path, into a tree of JAX arrays shaped like `target`.

    `target` holds ShapeDtypeStructs or arrays. Floating-point leaves become `dtype`, by default that of the target
    leaf; "auto" keeps the precision of the source, see `stored_dtype`. Keys in `ignore` may be
    present without being used. All names are compared before any tensor is read; then tensors are read one by one, the
    largest first, so that peak memory is about the size of the tree.
    Raises InputError with one line that counts and lists what is missing, unused, of wrong shape, rank or dtype, or set
    twice, or that names a tensor with NaN, infinities, or numbers that `dtype` cannot hold.
    """
    if not isinstance(source, Source):
        source = open_source(source)
    plan = _plan(source, target, set(ignore))
    if isinstance(dtype, str) and dtype == "auto":
        dtype = stored_dtype(source)

    leaves: dict[names.Path, jax.Array] = {}
    for leaf_path, key, entry, leaf in sorted(plan, key=lambda item: -item[2].nbytes):
        wanted = np.dtype(dtype) if dtype is not None and _is_float(leaf.dtype) else np.dtype(leaf.dtype)
        array = names.from_torch_layout(leaf_path, source.read(key).reshape(entry.shape))
        # Unlike jnp.asarray, device_put keeps aligned host memory instead of copying it.
        leaves[leaf_path] = jax.device_put(_converted(source, key, array, wanted))
    return names.unflatten({leaf_path: leaves[leaf_path] for leaf_path, _ in names.flatten(target)})


def _converted(source: Source, key: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the array contiguous and in `dtype`, refusing numbers that are not finite."""
    converted = array
    if array.dtype != dtype or not array.flags.c_contiguous:
        converted = aligned_empty(array.shape, dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # checked below
            np.copyto(converted, array, casting="unsafe")
    if not all_finite(converted):
        where, bad = f"{source.origin(key)}: tensor {key!r}", ~np.isfinite(array)
        if bad.any():
            raise InputError(
                f"{where} has {np.count_nonzero(bad)} NaN or infinite values of {bad.size}, expected finite numbers"
            )
        raise InputError(f"{where} has values up to {float(np.abs(array).max()):.3g}, which {dtype} cannot hold")
    return converted


def _plan(source: Source, target: Mapping[str, Any], ignore: set[str]) -> list[tuple[names.Path, str, Entry, Any]]:
    """Pair every leaf of the target with its tensor in the source; raises InputError listing every difference."""
    expected: dict[str, tuple[names.Path, Any]] = {}
    for leaf_path, leaf in names.flatten(target):
        key = names.to_torch_key(leaf_path)
        if key in expected:
            raise ValueError(f"{'.'.join(expected[key][0])} and {'.'.join(leaf_path)} both have the torch name {key}")
        expected[key] = leaf_path, leaf

    found: dict[str, list[str]] = {}
    unused = []
    for source_key in source.entries:
        if (key := names.match(source_key, expected)) is not None:
            found.setdefault(key, []).append(source_key)
        elif source_key not in ignore:
            unused.append(source_key)

    plan, shapes, ranks, dtypes = [], [], [], []
    for key, source_keys in found.items():
        (leaf_path, leaf), entry = expected[key], source.entries[source_keys[0]]
        shape = names.to_torch_shape(leaf_path, tuple(leaf.shape))
        entry = Entry(entry.dtype, names.fold_shape(key, entry.shape, shape))
        plan.append((leaf_path, source_keys[0], entry, leaf))
        difference = f"{source_keys[0]} found {list(entry.shape)} expected {list(shape)}"
        if len(entry.shape) != len(shape):
            ranks.append(difference)
        elif entry.shape != shape:
            shapes.append(difference)
        if _is_float(entry.dtype) != _is_float(leaf.dtype):
            dtypes.append(f"{source_keys[0]} found {entry.dtype} expected {leaf.dtype}")

    faults = {
        "missing": [key for key in expected if key not in found],
        "unused": unused,
        "wrong shape": shapes,
        "wrong rank": ranks,
        "wrong dtype": dtypes,
        "set twice": [f"{key} by {' and '.join(keys)}" for key, keys in found.items() if len(keys) > 1],
    }
    faults = {kind: items for kind, items in faults.items() if items}
    if faults:
        counts = ", ".join(f"{len(items)} {kind}" for kind, items in faults.items())
        lists = "; ".join(f"{kind}: {_listing(items)}" for kind, items in faults.items())
        raise InputError(
            f"{source.where}: does not fit the model: {len(source.entries)} tensors found, {len(expected)} expected "
            f"({counts}): {lists}"
        )
    return plan


def _listing(items: list[str]) -> str:
    more = f", ... and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(sorted(items)[:_LISTED]) + more


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(np.dtype(dtype), jnp.floating)


def flat_pickle_error(path: Path, made: str, inner: str = "state_dict") -> InputError:
    """Return the error for a pickle of one flat dictionary of tensors, with the command that writes ``made``."""
    return InputError(
        f"{path}: found a Python pickle, which can run code when it is opened, expected .safetensors; convert it: "
        f"python -c \"import torch, safetensors.torch as s; d = torch.load('{path}', weights_only=True); "
        f"d = d.get('{inner}', d); s.save_file({{k: x.clone() for k, x in d.items() if torch.is_tensor(x)}}, "
        f"'{made}')\""
    )


def _pickle_error(path: Path) -> InputError:
    return InputError(
        f"{path}: found a Python pickle, which can run code when it is opened; if you trust it, convert it, "
        f"e.g. DiffusionPipeline.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)"
    )
