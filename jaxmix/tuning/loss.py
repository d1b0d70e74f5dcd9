"""The denoising loss: epsilon, v or sample targets, uniform or logit-normal timesteps, optional min-SNR weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

TIMESTEP_BINS = 4


def min_snr_weights(snr: jax.Array, gamma: float, prediction_type: str) -> jax.Array:
    """Return the loss weight of each row, (b,) float32, for signal-to-noise ratios `snr` (b,).

    min(snr, gamma) for a predicted sample, that / snr for epsilon and / (snr + 1) for v (arXiv 2303.09556, section
    3.4): each is the same weight of the error of the sample. Zero terminal SNR gives weight 1 for epsilon, the limit of
    the formula.
    """
    clipped = jnp.minimum(snr, gamma)
    if prediction_type == "sample":
        return clipped
    if prediction_type == "v_prediction":
        return clipped / (snr + 1.0)
    return jnp.where(snr > 0.0, clipped / jnp.maximum(snr, 1e-20), 1.0)


def draw_timesteps(key: jax.Array, rows: int, total: int, logit_normal: tuple[float, float] | None = None) -> jax.Array:
    """Return (rows,) int32 in [0, total), each uniform, together spread evenly over the range.

    One uniform offset plus i / rows, modulo 1 (arXiv 2107.00630, appendix I.1), has less variance than independent
    draws. With `logit_normal` = (mean, std) the same spread is mapped through the quantiles of t / total =
    sigmoid(normal) (arXiv 2403.03206, eq. 19), which favours the middle, where shapes are decided.
    """
    spread = (jax.random.uniform(key) + jnp.arange(rows) / rows) % 1.0
    if logit_normal is not None:
        mean, std = logit_normal
        spread = jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(spread))
    return jnp.minimum((spread * total).astype(jnp.int32), total - 1)


def bin_losses(per_row: jax.Array, t: jax.Array, total: int) -> dict[str, jax.Array]:
    """Return sums and counts of `per_row` (b,) in equal bins of t; sums, so that averages tolerate empty bins."""
    inside = jax.nn.one_hot(t * TIMESTEP_BINS // total, TIMESTEP_BINS, dtype=jnp.float32)
    return {"bin_sum": per_row @ inside, "bin_count": inside.sum(0)}


def diffusion_loss(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: Any,
    latents: jax.Array,
    key: jax.Array,
    snr_gamma: float | None = None,
    noise_offset: float = 0.0,
    logit_normal: tuple[float, float] | None = None,
    row_weights: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the mean squared error of `predict(noisy, t)` against the schedule's target, and metrics.

    latents: (b, h, w, c), already times the scaling factor. The target is that of schedule.prediction_type.
    noise_offset adds a constant per row and channel to the noise, as in diffusers; logit_normal is that of
    `draw_timesteps`. row_weights (b,) multiply the rows' losses, beside min-SNR; the mean is over all
    rows. Metrics hold the unweighted loss by quarter of the timesteps as `bin_sum` and `bin_count`, each (4,). All in
    float32.
    """
    latents = latents.astype(jnp.float32)
    rows, total = latents.shape[0], len(schedule.alphas_cumprod)
    key_t, key_noise, key_offset = jax.random.split(key, 3)
    t = draw_timesteps(key_t, rows, total, logit_normal)
    noise = jax.random.normal(key_noise, latents.shape)
    if noise_offset:
        noise += noise_offset * jax.random.normal(key_offset, (rows, 1, 1, latents.shape[-1]))
    error = predict(schedule.add_noise(latents, noise, t), t).astype(jnp.float32) - schedule.target(latents, noise, t)
    per_row = jnp.mean(error**2, axis=(1, 2, 3))
    weights = 1.0 if snr_gamma is None else min_snr_weights(schedule.snr(t), snr_gamma, schedule.prediction_type)
    if row_weights is not None:
        weights = weights * row_weights
    return jnp.mean(weights * per_row), bin_losses(per_row, t, total)
