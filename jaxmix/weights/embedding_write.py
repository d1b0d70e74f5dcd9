"""Learnt embeddings (textual inversion, arXiv 2208.01618; P+, arXiv 2303.09522) to files that other programs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmix.types import InputError
from jaxmix.weights.embedding_files import TOKEN
from jaxmix.weights.files import path_here
from jaxmix.weights.store import save_arrays

_ENCODERS = ("clip_l", "clip_g")


def embedding_tree(
    token: str, vectors: Sequence[Any], layers: Mapping[str, Sequence[Any]] | None = None
) -> dict[str, np.ndarray]:
    """Return what a file of an embedding holds, given its vectors (n, d) for each text encoder, or those of each layer.

    One text encoder: ``{token: (n, d)}``, as diffusers and A1111 read it. Two: ``{"clip_l": ..., "clip_g": ...}``, as
    A1111 and ComfyUI do. Of layers: their names, as in sd-scripts' files of P+; see `jaxmix.weights.embedding_files`.
    """
    if layers:
        made: dict[str, Any] = {}
        for name, held in layers.items():
            keys = [name] if len(held) == 1 else [f"{name}.{encoder}" for encoder in _ENCODERS]
            made |= dict(zip(keys, held, strict=True))
    else:
        made = dict(zip([token] if len(vectors) == 1 else _ENCODERS, vectors, strict=True))
    return {key: np.asarray(x, np.float32) for key, x in made.items()}


def write_embedding(
    path: str | Path, token: str, vectors: Sequence[Any], layers: Mapping[str, Sequence[Any]] | None = None
) -> None:
    """Write an embedding as one safetensors file, float32, which appears whole or not at all; see `embedding_tree`."""
    path = path_here(path)
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"{path}: found {path.suffix or 'no ending'!r}, expected a file that ends in .safetensors")
    save_arrays(embedding_tree(token, vectors, layers), path, {TOKEN: token})
