"""The one rule between our parameter names and torch's.

The module path joined with '.' is already the torch name; only leaf names and layouts differ. A `kernel` is
(*spatial, in, out) here and (out, in, *spatial) in torch, for dense layers and convolutions alike.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Path = tuple[str, ...]

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}

# VAE attention as named in Stable Diffusion 1.x and 2.x files, from before diffusers had one Attention class.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_PATTERN = re.compile(r"^(.*\battentions\.\d+\.)(query|key|value|proj_attn)\.(weight|bias)$")
_ATTENTION_WEIGHT = re.compile(r"\battentions\.\d+\.(to_q|to_k|to_v|to_out\.0)\.weight$")

# transformers wrote this prefix before version 5.
_CLIP_PREFIX = "text_model."


def flatten(tree: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Yield (path, leaf) for every leaf of a nested mapping, in sorted order."""
    for name in sorted(tree):
        if isinstance(tree[name], Mapping):
            for path, leaf in flatten(tree[name]):
                yield (name, *path), leaf
        else:
            yield (name,), tree[name]


def unflatten(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """Build the nested dict whose leaves are given by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def to_torch_key(path: Path) -> str:
    """Return the torch name of the leaf at `path`, e.g. ('mid_block', 'conv', 'kernel') -> 'mid_block.conv.weight'."""
    *modules, leaf = path
    return ".".join((*modules, _LEAVES.get(leaf, leaf)))


def to_torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the leaf at `path` in torch."""
    if path[-1] == "kernel" and len(shape) >= 2:
        return (shape[-1], shape[-2], *shape[:-2])
    return tuple(shape)


def to_torch_layout(path: Path, array: np.ndarray) -> np.ndarray:
    """Return a view of `array` in torch's layout."""
    if path[-1] == "kernel" and array.ndim >= 2:
        return array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
    return array


def from_torch_layout(path: Path, array: np.ndarray) -> np.ndarray:
    """Return a view of a torch array in our layout: the inverse of `to_torch_layout`."""
    if path[-1] == "kernel" and array.ndim >= 2:
        return array.transpose(*range(2, array.ndim), 1, 0)
    return array


def match(key: str, expected: Mapping[str, Any]) -> str | None:
    """Return the key of `expected` that a file's `key` means, or None.

    Knows the old VAE attention names and the two forms of CLIP text encoder names.
    """
    modern = key
    if old := _OLD_ATTENTION_PATTERN.match(key):
        modern = f"{old[1]}{_OLD_ATTENTION[old[2]]}.{old[3]}"
    for candidate in (key, modern, key.removeprefix(_CLIP_PREFIX), _CLIP_PREFIX + key):
        if candidate in expected:
            return candidate
    return None


def fold_shape(key: str, found: tuple[int, ...], expected: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape to read a file's tensor with: (c, c, 1, 1) attention weights of old VAE files become (c, c)."""
    if len(expected) == 2 and found[2:] == (1, 1) and _ATTENTION_WEIGHT.search(key):
        return found[:2]
    return found
