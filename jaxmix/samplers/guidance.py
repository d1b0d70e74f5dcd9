"""Classifier-free guidance (arXiv 2207.12598) as a transformation of model functions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmix.types import ModelFn


def by_branch(rows_fn: ModelFn, branches: int) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns the function that predicts every branch of each image, float32 (n, branches, h, w, c).

    `rows_fn` is called with that many rows per image, branch minor: u0, c0, u1, c1, ... (so that sharding the rows
    never parts the branches of an image), and must hold the contexts of the branches in that order.
    """

    def predict(x: jax.Array, t: jax.Array, step: jax.Array) -> jax.Array:
        rows_t = jnp.repeat(t, branches, axis=0) if jnp.ndim(t) else t
        rows = rows_fn(jnp.repeat(x, branches, axis=0), rows_t, step)
        return rows.astype(jnp.float32).reshape(x.shape[0], branches, *rows.shape[1:])

    return predict


def classifier_free_guidance(rows_fn: ModelFn, scale: jax.Array | float, rescale: jax.Array | float = 0.0) -> ModelFn:
    """Returns the guided model function u + scale (c - u), one row per image.

    `rows_fn` is called with two rows per image as `by_branch` says, the unconditional one first. `scale` is a scalar or
    (n,), traced; 1 is the conditional and 0 the unconditional prediction. Guidance is computed in float32, whatever
    dtype the model runs in.

    `rescale`, a scalar or (n,) from 0 to 1, brings the standard deviation of each guided row back towards that of its
    conditional one (arXiv 2305.08891, eq. 14-16). It is traced; 0 changes no bit, and as a Python number costs nothing.
    """
    scale = jnp.asarray(scale, jnp.float32)
    rescaling = isinstance(rescale, jax.Array) or bool(rescale != 0)
    rescale = jnp.asarray(rescale, jnp.float32)
    predict = by_branch(rows_fn, 2)

    def guided(x: jax.Array, t: jax.Array, step: jax.Array) -> jax.Array:
        for name, value in (("scale", scale), ("rescale", rescale)):
            if value.ndim and value.shape != x.shape[:1]:
                raise ValueError(f"guidance {name} has shape {value.shape}, expected () or {x.shape[:1]}")
        rows = predict(x, t, step)
        uncond, cond = rows[:, 0], rows[:, 1]
        mixed = uncond + _per_row(scale, uncond) * (cond - uncond)
        return _rescaled(mixed, cond, _per_row(rescale, uncond)) if rescaling else mixed

    return guided


def _rescaled(mixed: jax.Array, cond: jax.Array, rescale: jax.Array) -> jax.Array:
    axes = tuple(range(1, cond.ndim))
    spread = jnp.std(mixed, axes, keepdims=True)
    # A row without any spread has nothing to rescale.
    ratio = jnp.where(spread > 0, jnp.std(cond, axes, keepdims=True) / jnp.where(spread > 0, spread, 1), 1)
    return jnp.where(rescale == 0, mixed, rescale * (mixed * ratio) + (1 - rescale) * mixed)


def _per_row(value: jax.Array, rows: jax.Array) -> jax.Array:
    return value.reshape(value.shape + (1,) * (rows.ndim - value.ndim))
