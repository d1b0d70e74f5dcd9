"""DDIM inversion: the deterministic solver run backwards, from an image to the noise that would draw it.

From x at the level a of one step to the level b of the next noisier one (arXiv 2105.05233, appendix F)::

    x_b = sqrt(abar_b) x0(x_a, eps) + sqrt(1 - abar_b) eps

The methods differ in the timestep that the model is given at x_a, the ``label`` of `create`: "next", that of b
(diffusers' DDIMInverseScheduler, StyleAligned), or "own", that of a (StyleID).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.samplers.solvers import structural
from jaxmix.schedule import NoiseSchedule, prediction_to_eps, prediction_to_x0
from jaxmix.types import InputError

LABELS = ("next", "own")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DDIMInversion:
    """DDIM inversion over the S timesteps of a sampling run, as a pytree of float32 tables."""

    timesteps: jax.Array  # (S,) int32, ascending: what the model is given
    alphas_cumprod: jax.Array  # (S + 1,) abar before each step, and at the end
    prediction_type: str = structural()

    @classmethod
    def create(cls, schedule: NoiseSchedule, steps: int, label: str = "next") -> "DDIMInversion":
        """Make the inversion of a DDIM run of `steps` steps.

        "next" starts from the final abar of the schedule and ends at the first timestep of sampling. "own" treats the
        image as the state at the last timestep of sampling, and ends at the last timestep of the schedule (999).
        """
        if label not in LABELS:
            raise InputError(f"label is {label!r}, expected one of {', '.join(LABELS)}")
        timesteps = schedule.timesteps(steps)[::-1]
        abar = schedule.alphas_cumprod[timesteps]
        if label == "own":
            levels = np.append(abar, schedule.alphas_cumprod[-1])
        else:
            before = timesteps[0] - schedule.num_train_timesteps // steps
            first = schedule.alphas_cumprod[before] if before >= 0 else schedule.final_alpha_cumprod
            levels = np.append(first, abar)
        bad = {"epsilon": levels[:-1].min() == 0, "sample": levels.max() == 1}.get(schedule.prediction_type, False)
        if bad:
            raise InputError(
                f"scheduler config: prediction_type {schedule.prediction_type} cannot be inverted with {steps} steps: "
                f"a level has no {'signal' if schedule.prediction_type == 'epsilon' else 'noise'}"
            )
        return cls(
            timesteps=jnp.asarray(timesteps, jnp.int32),
            alphas_cumprod=jnp.asarray(levels, jnp.float32),
            prediction_type=schedule.prediction_type,
        )

    @property
    def steps(self) -> int:
        """The number of steps S."""
        return self.timesteps.shape[0]

    def step(self, i: jax.Array | int, x: jax.Array, pred: jax.Array) -> jax.Array:
        """Return the float32 state after step i, from the state x and the prediction at (x, timesteps[i])."""
        x, pred = x.astype(jnp.float32), pred.astype(jnp.float32)
        signal, sigma = jnp.sqrt(self.alphas_cumprod[i]), jnp.sqrt(1 - self.alphas_cumprod[i])
        x0 = prediction_to_x0(self.prediction_type, pred, x, signal, sigma)
        eps = prediction_to_eps(self.prediction_type, pred, x, signal, sigma)
        return jnp.sqrt(self.alphas_cumprod[i + 1]) * x0 + jnp.sqrt(1 - self.alphas_cumprod[i + 1]) * eps


def invert(
    model_fn: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]], inversion: DDIMInversion, x: jax.Array
) -> tuple[jax.Array, Any]:
    """Run an inversion from clean latents x (n, ...); `model_fn(x, t, step)` returns the prediction and what to keep.

    Returns the states (S + 1, n, ...), float32, from x to the noise, and what was kept at each step, stacked.
    """
    x = jnp.asarray(x, jnp.float32)

    def body(x: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
        pred, kept = model_fn(x, inversion.timesteps[i], i)
        return inversion.step(i, x, pred), (x, kept)

    last, (states, kept) = jax.lax.scan(body, x, jnp.arange(inversion.steps, dtype=jnp.int32))
    return jnp.concatenate([states, last[None]]), kept
