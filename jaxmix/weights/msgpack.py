"""Flax msgpack files (`flax.serialization.to_bytes`) as sources."""

from __future__ import annotations

import os
from pathlib import Path

from flax import serialization

from jaxmix.types import InputError
from jaxmix.weights.files import refuse_stand_in
from jaxmix.weights.flax_tree import FlaxTree


def open_msgpack(path: str | os.PathLike[str]) -> FlaxTree:
    """Open a `diffusion_flax_model.msgpack` or `flax_model.msgpack` under torch names.

    flax reads the whole file, which stays in memory beside the parameters until they are all loaded. Raises InputError
    for a file that is missing, truncated, or not a tree of arrays.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        refuse_stand_in(path, content)
        tree = serialization.msgpack_restore(content)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except InputError:
        raise
    except Exception as error:  # msgpack's own, and whatever flax raises for what is not an array
        if "incomplete input" in str(error):
            size = path.stat().st_size
            raise InputError(f"{path}: truncated: {size} bytes, expected more by its contents") from None
        raise InputError(f"{path}: not a Flax msgpack file of weights: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: not a Flax msgpack file of weights: found a {type(tree).__name__}")
    try:
        return FlaxTree(tree, str(path))
    except InputError as error:
        raise InputError(f"{path}: not a Flax msgpack file of weights: {error}") from None
