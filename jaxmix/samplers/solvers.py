"""Solvers: what one step of the denoising loop does with a prediction."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.schedule import NoiseSchedule, prediction_to_eps, prediction_to_x0

_META = ("prediction_type", "clip_range", "stochastic")


@dataclasses.dataclass(frozen=True)
class DDIM:
    """DDIM (arXiv 2010.02502, eq. 12 and 16) over a fixed number of steps, as a pytree of float32 tables (steps,).

    The step sizes follow diffusers: step i moves from t to t - num_train_timesteps // steps, and past 0 to the final
    abar of `set_alpha_to_one`.
    """

    timesteps: jax.Array  # int32, descending
    alphas_cumprod: jax.Array  # abar at each step's timestep
    previous: jax.Array  # abar that each step moves to
    sigmas: jax.Array  # standard deviation of the noise that each step adds
    prediction_type: str
    clip_range: float | None  # x0 is clipped to [-clip_range, clip_range]
    stochastic: bool  # eta > 0

    @classmethod
    def create(cls, schedule: NoiseSchedule, steps: int, eta: float = 0.0) -> "DDIM":
        """Makes the solver of a schedule; `eta` from 0 (deterministic) to 1 (as noisy as DDPM).

        Raises InputError if the schedule cannot be run in that many steps.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}, expected a number from 0 to 1")
        timesteps = schedule.timesteps(steps)
        target = timesteps - schedule.num_train_timesteps // steps
        abar = schedule.alphas_cumprod[timesteps]
        previous = np.where(target >= 0, schedule.alphas_cumprod[target], schedule.final_alpha_cumprod)
        variance = (1 - previous) / (1 - abar) * (1 - abar / previous)
        # With set_alpha_to_one false and no steps_offset the last step stays at t = 0, with variance 0 up to rounding.
        sigmas = np.float32(eta) * np.sqrt(np.maximum(variance, 0))
        return cls(
            timesteps=jnp.asarray(timesteps, jnp.int32),
            alphas_cumprod=jnp.asarray(abar, jnp.float32),
            previous=jnp.asarray(previous, jnp.float32),
            sigmas=jnp.asarray(sigmas, jnp.float32),
            prediction_type=schedule.prediction_type,
            clip_range=schedule.clip_sample_range if schedule.clip_sample else None,
            stochastic=eta > 0,
        )

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.timesteps.shape[0]

    def step(self, i: jax.Array | int, x: jax.Array, pred: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Returns the float32 state after step i, from the state x and the prediction at (x, timesteps[i]).

        `noise` (shape of x, standard normal) is required if eta > 0 and ignored if not.
        """
        x, pred = x.astype(jnp.float32), pred.astype(jnp.float32)
        signal, sigma = jnp.sqrt(self.alphas_cumprod[i]), jnp.sqrt(1 - self.alphas_cumprod[i])
        x0 = prediction_to_x0(self.prediction_type, pred, x, signal, sigma)
        eps = prediction_to_eps(self.prediction_type, pred, x, signal, sigma)
        if self.clip_range is not None:
            # Only x0 is clipped; the direction keeps the model's own eps, as in diffusers.
            x0 = jnp.clip(x0, -self.clip_range, self.clip_range)
        added = self.sigmas[i]
        # Rounding may bring the difference below 0 where eta is 1 and the previous abar is near 1.
        direction = jnp.sqrt(jnp.maximum(1 - self.previous[i] - added**2, 0)) * eps
        previous = jnp.sqrt(self.previous[i]) * x0 + direction
        if not self.stochastic:
            return previous
        if noise is None:
            raise ValueError("this solver has eta > 0: step needs noise")
        return previous + added * noise.astype(jnp.float32)


jax.tree_util.register_dataclass(
    DDIM,
    data_fields=[field.name for field in dataclasses.fields(DDIM) if field.name not in _META],
    meta_fields=list(_META),
)
