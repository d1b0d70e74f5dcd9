"""What tells models apart: digests of their configs and weights, for files that were made with one of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmix.types import Params

_WITHOUT_EFFECT = ("_class_name", "_diffusers_version", "architectures", "model_type", "sample_size", "force_upcast")
_LEADING = 4096  # values of each tensor that enter the digest of the weights


def config_digest(config: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that stand for what a config says of its model's outputs."""
    held = {key: value for key, value in config.items() if key not in _WITHOUT_EFFECT}
    return _digest([json.dumps(held, sort_keys=True).encode()])


def weights_digest(params: Params, without: str | None = None) -> str:
    """Return 16 hexadecimal digits that stand for weights, without those that have a word in their path.

    They cover the first values of every tensor in bfloat16, so they are the same for a model loaded in float32 or in
    bfloat16.
    """
    paths = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    kept = [(path, leaf) for path, leaf in paths if without is None or without not in path]
    values = jax.device_get(_leading([leaf for _, leaf in kept]))
    return _digest(
        [f"{path} {leaf.shape}".encode() + value.tobytes() for (path, leaf), value in zip(kept, values, strict=True)]
    )


@jax.jit
def _leading(leaves: list[jax.Array]) -> list[jax.Array]:
    return [leaf.reshape(-1)[:_LEADING].astype(jnp.bfloat16) for leaf in leaves]


def _digest(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
