"""Edits of the latents: where a run starts, and what happens to its state after each step.

An edit is a tree (`jaxmix.rows`) of per-image arrays. Several are applied in order.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmix.rows import dataclass, per_row
from jaxmix.samplers.loop import Solver
from jaxmix.types import Array, InputError


def image_to_image_start(steps: int, strength: float) -> int:
    """Return the step at which a run over an image starts (arXiv 2108.01073), as diffusers counts it.

    Strength 1 runs all steps and keeps almost nothing of the image; a lower one runs the last int(steps * strength)
    steps. Raises InputError for a strength outside (0, 1], or so low that no step is left.
    """
    number = isinstance(strength, (int, float, np.integer, np.floating)) and not isinstance(strength, bool)
    if not number or not 0 < strength <= 1:
        raise InputError(f"strength is {strength!r}, expected a number above 0 and at most 1")
    run = min(int(steps * strength), steps)
    if run < 1:
        raise InputError(f"strength is {strength} with {steps} steps: no step is left, expected at least {1 / steps:g}")
    return steps - run


def noised(solver: Solver, x0: jax.Array, noise: jax.Array, i: jax.Array | int) -> jax.Array:
    """Return signal_i x0 + sigma_i noise, float32: what x is before step i if the image is x0. i may be S, the end."""
    x0, noise = jnp.asarray(x0, jnp.float32), jnp.asarray(noise, jnp.float32)
    return solver.signals[i] * x0 + solver.sigmas[i] * noise


def inpaint(
    solver: Solver, x0: jax.Array, noise: jax.Array, mask: jax.Array
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the `latents_fn` that repaints where mask is 1 and holds the rest to the image x0.

    After each step the rest is x0 noised by `noise` to that level, and x0 itself after the last (arXiv 2201.09865,
    eq. 8, without resampling). x0 and noise are latents (n, h, w, c); mask, from 0 to 1, broadcasts against them.
    """
    x0, noise, mask = (jnp.asarray(array, jnp.float32) for array in (x0, noise, mask))
    signals, sigmas = solver.signals, solver.sigmas

    def latents_fn(x: jax.Array, i: jax.Array) -> jax.Array:
        # diffusers, too, puts the clean image back where a run ends above level 0.
        kept = jnp.where(i + 1 < solver.steps, signals[i + 1] * x0 + sigmas[i + 1] * noise, x0)
        return (1 - mask) * kept + mask * x

    return latents_fn


def pin(states: jax.Array, gate: jax.Array) -> Callable[[jax.Array, jax.Array | int], jax.Array]:
    """Return the `latents_fn` that holds images to the course `states` (n, S + 1, h, w, c) where gate (n,) is not 0.

    After step i the state of such an image is states[:, i + 1].
    """

    def latents_fn(x: jax.Array, i: jax.Array | int) -> jax.Array:
        return jnp.where(gate[:, None, None, None] > 0, states[:, i + 1], x)

    return latents_fn


@dataclass
class LatentEdit:
    """What an edit may override; the base does nothing. Subclasses are `jaxmix.rows.dataclass`es."""

    def start(self, solver: Solver, x: Array, noise: Array, step: int) -> Array:
        """Return the state before the first step to run, given the state ``x`` of pure noise."""
        return x

    def after(self, solver: Solver, x: Array, noise: Array, step: Array) -> Array:
        """Return the state after a step, given the solver's; ``noise`` is the start noise, standard normal."""
        return x


@dataclass
class FromImage(LatentEdit):
    """Image-to-image: the run starts from scaled latents ``image`` (n, h, w, c) at the level of its first step."""

    image: Float[Array, "n h w c"] = per_row()

    def start(self, solver: Solver, x: Array, noise: Array, step: int) -> Array:
        """Return the noised image."""
        return noised(solver, self.image, noise, step)


@dataclass
class Inpaint(LatentEdit):
    """Inpainting: ``image`` is held outside ``mask`` (n, h, w, 1), which is 1 where it is to be repainted."""

    image: Float[Array, "n h w c"] = per_row()
    mask: Float[Array, "n h w 1"] = per_row()

    def start(self, solver: Solver, x: Array, noise: Array, step: int) -> Array:
        """Return the noised image, or pure noise at strength 1, as in diffusers."""
        return noised(solver, self.image, noise, step) if step > 0 else x

    def after(self, solver: Solver, x: Array, noise: Array, step: Array) -> Array:
        """Put the image back where it stays, noised to the next level."""
        return inpaint(solver, self.image, noise, self.mask)(x, step)


@dataclass
class Pin(LatentEdit):
    """Images held to a course: the states of an inversion, or noised images.

    ``states`` (n, steps + 1, h, w, c) is the state of each image before each step, and at the end; ``gate`` (n,) is 1
    where an image is held, 0 where it is free.
    """

    states: Float[Array, "n s h w c"] = per_row()
    gate: Float[Array, " n"] = per_row()

    def start(self, solver: Solver, x: Array, noise: Array, step: int) -> Array:
        """Return the course's state before the first step."""
        return pin(self.states, self.gate)(x, step - 1)

    def after(self, solver: Solver, x: Array, noise: Array, step: Array) -> Array:
        """Return the course's state after a step."""
        return pin(self.states, self.gate)(x, step)
