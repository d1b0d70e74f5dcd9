"""Starts from an image, and what is done to the latents between steps: image-to-image and inpainting."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmix.samplers.loop import Solver
from jaxmix.types import InputError


def image_to_image_start(steps: int, strength: float) -> int:
    """Returns the step at which a run over an image starts (arXiv 2108.01073), as diffusers counts it.

    Strength 1 runs all steps and keeps nearly nothing of the image, less strength runs the last int(steps * strength)
    steps. Raises InputError for a strength outside (0, 1], or so little that no step is left.
    """
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength <= 1:
        raise InputError(f"strength is {strength!r}, expected a number above 0 and at most 1")
    run = min(int(steps * strength), steps)
    if run < 1:
        raise InputError(f"strength is {strength} with {steps} steps: no step is left, expected at least {1 / steps:g}")
    return steps - run


def noised(solver: Solver, x0: jax.Array, noise: jax.Array, i: jax.Array | int) -> jax.Array:
    """Returns signal_i x0 + sigma_i noise, float32: what x is before step i if the image is x0. i may be S, the end."""
    x0, noise = jnp.asarray(x0, jnp.float32), jnp.asarray(noise, jnp.float32)
    return solver.signals[i] * x0 + solver.sigmas[i] * noise


def inpaint(
    solver: Solver, x0: jax.Array, noise: jax.Array, mask: jax.Array
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the `latents_fn` that repaints where mask is 1 and holds the rest to the image x0.

    After each step the rest is x0 under `noise` at that level, and x0 itself after the last (arXiv 2201.09865, eq. 8,
    without resampling). x0 and noise are latents (n, h, w, c); mask broadcasts against them, from 0 to 1.
    """
    x0, noise, mask = (jnp.asarray(array, jnp.float32) for array in (x0, noise, mask))
    signals, sigmas = solver.signals, solver.sigmas

    def latents_fn(x: jax.Array, i: jax.Array) -> jax.Array:
        # Where a run ends above level 0, diffusers too puts the clean image back.
        kept = jnp.where(i + 1 < solver.steps, signals[i + 1] * x0 + sigmas[i + 1] * noise, x0)
        return (1 - mask) * kept + mask * x

    return latents_fn


def pin(states: jax.Array, gate: jax.Array) -> Callable[[jax.Array, jax.Array | int], jax.Array]:
    """Returns the `latents_fn` that holds images to the course `states` (n, S + 1, h, w, c) where gate (n,) is not 0.

    After step i the state of such an image is states[:, i + 1].
    """

    def latents_fn(x: jax.Array, i: jax.Array | int) -> jax.Array:
        return jnp.where(gate[:, None, None, None] > 0, states[:, i + 1], x)

    return latents_fn
