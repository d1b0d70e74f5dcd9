"""Parameter trees of diffusers' and transformers' Flax models under torch names.

Their module names are torch's with an underscore before list indices (`down_blocks_0`, `to_out_0`) where torch has a
dot; their leaves and layouts are Linen's, like ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxmix.types import InputError
from jaxmix.weights import names
from jaxmix.weights.source import Entry, Source

_INDEX = re.compile(r"_(\d+)$")
# Torch uses an underscore here as well: the two layers of a timestep embedding.
_NOT_INDEXED = re.compile(r"^linear_\d+$")
_LEAVES = ("kernel", "bias", "scale", "embedding")


def module_path(path: names.Path) -> names.Path:
    """Return a Flax path with torch's module names: ('down_blocks_0', 'conv') -> ('down_blocks.0', 'conv')."""
    *modules, leaf = path
    return (*(m if _NOT_INDEXED.match(m) else _INDEX.sub(r".\1", m) for m in modules), leaf)


def unwrapped(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what is under "params" if a tree has nothing else, otherwise the tree itself."""
    return tree["params"] if set(tree) == {"params"} and isinstance(tree["params"], Mapping) else tree


class FlaxTree(Source):
    """A live tree of NumPy or JAX arrays from a Flax model, with or without "params" around it."""

    def __init__(self, tree: Mapping[str, Any], where: str) -> None:
        """Name all leaves; `where` is what errors call the tree. Raises InputError for a leaf that is not an array."""
        self.where = where
        self._leaves: dict[str, tuple[names.Path, Any]] = {}
        self._entries: dict[str, Entry] = {}
        for path, leaf in _leaves_of(unwrapped(tree), where):
            key, entry = torch_entry(path, np.dtype(leaf.dtype), tuple(leaf.shape))
            self._leaves[key], self._entries[key] = (path, leaf), entry

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def read(self, key: str) -> np.ndarray:
        path, leaf = self._leaves[key]
        # JAX arrays never change, so their memory can be shared; NumPy's may change.
        array = leaf.copy() if isinstance(leaf, np.ndarray) else np.asarray(leaf)
        return names.to_torch_layout(path, array)


def torch_entry(path: names.Path, dtype: np.dtype, shape: tuple[int, ...]) -> tuple[str, Entry]:
    """Return the torch key and the torch layout of the Flax leaf at `path`."""
    return names.to_torch_key(module_path(path)), Entry(dtype, names.to_torch_shape(path, shape))


def _leaves_of(tree: Mapping[str, Any], where: str) -> Iterator[tuple[names.Path, Any]]:
    for path, leaf in names.flatten(tree):
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise InputError(f"{where}: {'.'.join(path)} is a {type(leaf).__name__}, expected an array")
        yield path, leaf
