"""The terms of a reconstruction loss: what an autoencoder must preserve in a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from train.scorer import load_scorer

_CHROMA = ((-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
"""Blue and red difference of ITU-R BT.601, from RGB."""


def pool(x: jax.Array, factor: int) -> jax.Array:
    """Return the means of squares of `factor` pixels, (b, H, W, c) to (b, H/factor, W/factor, c)."""
    b, h, w, c = x.shape
    return x.reshape(b, h // factor, factor, w // factor, factor, c).mean((2, 4))


def difference_loss(error: jax.Array) -> jax.Array:
    """Return the mean absolute difference of neighbouring errors (b, H, W, c), at full and at half size."""
    total = jnp.zeros(())
    for _ in range(2):
        total += jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
        error = pool(error, 2)
    return total


def color_loss(error: jax.Array) -> jax.Array:
    """Return the mean absolute error of chroma at half size plus that of colours at a quarter and an eighth.

    `error` is (b, H, W, 3) with sides that are multiples of 8. On small pictures shapes are learnt from luminance, and
    colours late; this adds weight to what is visible from afar.
    """
    chroma = pool(error, 2) @ jnp.asarray(_CHROMA, error.dtype).T
    return jnp.abs(chroma).mean() + jnp.abs(pool(error, 4)).mean() + jnp.abs(pool(error, 8)).mean()


def make_feature_loss(weights: str | Path) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return loss(found, wanted) of images (b, H, W, 3) in [-1, 1] in the features of a trained scene network.

    Each layer gives its mean absolute error and that of its spatial means, both as shares of its mean activation, at
    full and at half size: edges and textures by place, and their overall amount, which makes a style. After arXiv
    1603.08155, with absolute errors. The network must not be the one that judges the autoencoder.
    """
    scorer = load_scorer(weights)

    def layers(images: jax.Array) -> Sequence[jax.Array]:
        shown = (images * 0.5 + 0.5, pool(images, 2) * 0.5 + 0.5)
        return [x for y in shown for x in scorer.net.apply({"params": scorer.params}, y, method="activations")]

    def loss(found: jax.Array, wanted: jax.Array) -> jax.Array:
        total = jnp.zeros(())
        pairs = list(zip(layers(found), layers(wanted), strict=True))
        for f, w in pairs:
            f, w = f.astype(jnp.float32), jax.lax.stop_gradient(w.astype(jnp.float32))
            error = jnp.abs(f - w).mean() + jnp.abs(f.mean((1, 2)) - w.mean((1, 2))).mean()
            total += error / (w.mean() + 1e-3)
        return total / len(pairs)

    return loss
