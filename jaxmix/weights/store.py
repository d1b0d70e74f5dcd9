"""Parameter trees to safetensors files and configs that torch diffusers and transformers can open."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.weights import names
from jaxmix.weights.files import path_here
from jaxmix.weights.safetensors import DTYPE_NAMES, encode_header


def save_tree(
    params: Mapping[str, Any],
    path: str | os.PathLike[str],
    dtype: Any = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save a tree of arrays as a safetensors file, in torch's names and layouts.

    Floating-point leaves are cast to `dtype` if it is given. `metadata` (strings) is added to the `{"format": "pt"}`
    that transformers requires. The file appears whole or not at all; host memory holds one tensor at a time.
    """
    leaves: dict[str, tuple[names.Path, Any, np.dtype]] = {}
    for leaf_path, leaf in names.flatten(params):
        key = names.to_torch_key(leaf_path)
        if key in leaves:
            raise ValueError(f"{'.'.join(leaves[key][0])} and {'.'.join(leaf_path)} both have the torch name {key}")
        stored = np.dtype(leaf.dtype)
        if dtype is not None and jnp.issubdtype(stored, jnp.floating):
            stored = np.dtype(dtype)
        if stored not in DTYPE_NAMES:
            raise ValueError(f"{'.'.join(leaf_path)}: safetensors has no dtype for {stored}")
        leaves[key] = leaf_path, leaf, stored
    metadata = {"format": "pt"} | dict(metadata or {})
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ValueError(f"metadata {key!r} is {value!r}, expected a string")

    # Wider dtypes first, so that every tensor is aligned to its item size.
    order = sorted(leaves, key=lambda key: (-leaves[key][2].itemsize, key))
    entries = {
        key: (leaves[key][2], names.to_torch_shape(leaves[key][0], tuple(leaves[key][1].shape))) for key in order
    }
    with _replacing(path_here(path)) as file:
        file.write(encode_header(entries, metadata))
        for key in order:
            leaf_path, leaf, stored = leaves[key]
            array = names.to_torch_layout(leaf_path, np.asarray(jax.device_get(leaf)))
            array = np.ascontiguousarray(array.astype(stored, copy=False))
            file.write(array.reshape(-1).view(np.uint8).data)


def save_arrays(arrays: Mapping[str, np.ndarray], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Save arrays under their own names as a safetensors file, with metadata (strings).

    The file appears whole or not at all.
    """
    order = sorted(arrays, key=lambda key: (-arrays[key].dtype.itemsize, key))
    entries = {key: (arrays[key].dtype, tuple(arrays[key].shape)) for key in order}
    with _replacing(path_here(path)) as file:
        file.write(encode_header(entries, {"format": "pt"} | dict(metadata)))
        for key in order:
            file.write(np.ascontiguousarray(arrays[key]).reshape(-1).view(np.uint8).data)


def write_config(config: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a config as JSON, sorted and indented as diffusers does; the file appears whole or not at all."""
    with _replacing(path_here(path)) as file:
        file.write((json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` and rename it to `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
