"""Classifier-free guidance (arXiv 2207.12598) as a transformation of model functions."""

import jax
import jax.numpy as jnp

from jaxmix.types import ModelFn


def classifier_free_guidance(rows_fn: ModelFn, scale: jax.Array | float) -> ModelFn:
    """Returns the guided model function u + scale (c - u), one row per image.

    `rows_fn` is called with two rows per image, branch minor: u0, c0, u1, c1, ... (so that sharding the rows never
    parts the branches of an image), and must hold the contexts of the unconditional and the conditional branch in that
    order. `scale` is a scalar or (n,), traced; 1 is the conditional and 0 the unconditional prediction. Guidance is
    computed in float32, whatever dtype the model runs in.
    """
    scale = jnp.asarray(scale, jnp.float32)

    def guided(x: jax.Array, t: jax.Array, step: jax.Array) -> jax.Array:
        if scale.ndim and scale.shape != x.shape[:1]:
            raise ValueError(f"guidance scale has shape {scale.shape}, expected () or {x.shape[:1]}")
        rows_t = jnp.repeat(t, 2, axis=0) if jnp.ndim(t) else t
        rows = rows_fn(jnp.repeat(x, 2, axis=0), rows_t, step)
        rows = rows.astype(jnp.float32).reshape(x.shape[0], 2, *rows.shape[1:])
        uncond, cond = rows[:, 0], rows[:, 1]
        return uncond + scale.reshape(scale.shape + (1,) * (uncond.ndim - scale.ndim)) * (cond - uncond)

    return guided
