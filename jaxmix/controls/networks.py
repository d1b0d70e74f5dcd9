"""Layers of the small networks that make tokens for attention, over plain trees of parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmix.types import Array, Params


def dense(params: Params, x: Array) -> Array:
    """Return x (..., i) times the kernel (i, o), plus the bias if there is one."""
    y = x @ params["kernel"].astype(x.dtype)
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def norm(params: Params, x: Array, eps: float = 1e-5) -> Array:
    """Return the LayerNorm of x (..., c), computed in float32."""
    y = x.astype(jnp.float32)
    y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + eps)
    return (y * params["scale"] + params["bias"]).astype(x.dtype)
