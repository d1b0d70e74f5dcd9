"""Solvers with one evaluation per step and no memory: DDIM, Euler and Euler ancestral.

They are the same step with different numbers. From x = signal x0 + sigma eps the model's prediction gives x0 and eps,
which are recombined at the next level: x' = a x0 + b eps + c noise.
"""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.samplers.sigmas import choice, euler_levels, refuse, refuse_levels
from jaxmix.schedule import NoiseSchedule, prediction_to_eps, prediction_to_x0
from jaxmix.types import InputError


def structural() -> Any:
    """Declare a field that is part of the pytree's structure: each value is another program."""
    return dataclasses.field(metadata={"static": True})


class Coefficients(NamedTuple):
    """The numbers of one step, float32 scalars."""

    signal: jax.Array  # x = signal x0 + sigma eps
    sigma: jax.Array
    x0: jax.Array  # the state after the step is x0 * x0_hat + eps * eps_hat + noise * standard normal noise
    eps: jax.Array
    noise: jax.Array


class OneStep(abc.ABC):
    """The step of a solver that calls the model once and remembers nothing."""

    timesteps: jax.Array
    prediction_type: str
    clip_range: float | None
    stochastic: bool

    @abc.abstractmethod
    def coefficients(self, i: jax.Array | int) -> Coefficients:
        """Return the numbers of step i."""

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.timesteps.shape[0]

    def memory(self, x: jax.Array) -> tuple[()]:
        """Return what is carried from step to step beside x: nothing."""
        return ()

    def step(
        self, i: jax.Array | int, x: jax.Array, memory: tuple[()], pred: jax.Array, noise: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[()]]:
        """Return the float32 state after step i, from the state x and the prediction at (x, timesteps[i]), and ().

        `noise` (shape of x, standard normal) is required by a stochastic solver and ignored by others.
        """
        x, pred = x.astype(jnp.float32), pred.astype(jnp.float32)
        c = self.coefficients(i)
        x0 = prediction_to_x0(self.prediction_type, pred, x, c.signal, c.sigma)
        eps = prediction_to_eps(self.prediction_type, pred, x, c.signal, c.sigma)
        if self.clip_range is not None:
            # Only x0 is clipped; the direction keeps the model's own eps, as in diffusers.
            x0 = jnp.clip(x0, -self.clip_range, self.clip_range)
        x = c.x0 * x0 + c.eps * eps
        if not self.stochastic:
            return x, memory
        if noise is None:
            raise ValueError("this solver is stochastic: step needs noise")
        return x + c.noise * noise.astype(jnp.float32), memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DDIM(OneStep):
    """DDIM (arXiv 2010.02502, eq. 12 and 16) over S steps, as a pytree of float32 tables (S,).

    The step sizes follow diffusers: step i moves from t to t - num_train_timesteps // steps, or below 0 to the final
    abar of `set_alpha_to_one`.
    """

    timesteps: jax.Array  # int32, descending
    alphas_cumprod: jax.Array  # abar at each step's timestep
    previous: jax.Array  # abar that each step moves to
    added: jax.Array  # standard deviation of the noise that each step adds
    prediction_type: str = structural()
    clip_range: float | None = structural()  # x0 is clipped to [-clip_range, clip_range]
    stochastic: bool = structural()  # eta > 0

    @classmethod
    def create(cls, schedule: NoiseSchedule, steps: int, eta: float = 0.0) -> "DDIM":
        """Make the solver of a schedule; `eta` from 0 (deterministic) to 1 (as noisy as DDPM).

        Raises InputError if the schedule cannot be run in that many steps, or not with DDIM.
        """
        if not 0 <= eta <= 1:
            raise InputError(f"eta is {eta}, expected a number from 0 to 1")
        refuse(schedule, ("thresholding",))
        timesteps = schedule.timesteps(steps)
        target = timesteps - schedule.num_train_timesteps // steps
        abar = schedule.alphas_cumprod[timesteps]
        if abar[0] == 0 and schedule.prediction_type == "epsilon":
            raise InputError(
                f"scheduler config: rescale_betas_zero_snr with prediction_type epsilon: timestep {timesteps[0]} has "
                "no signal, so eps gives no x0 there, expected v_prediction or sample for ddim"
            )
        previous = np.where(target >= 0, schedule.alphas_cumprod[target], schedule.final_alpha_cumprod)
        variance = (1 - previous) / (1 - abar) * (1 - abar / previous)
        # With set_alpha_to_one false and no steps_offset the last step stays at t = 0, with variance 0 up to rounding.
        added = np.float32(eta) * np.sqrt(np.maximum(variance, 0))
        return cls(
            timesteps=jnp.asarray(timesteps, jnp.int32),
            alphas_cumprod=jnp.asarray(abar, jnp.float32),
            previous=jnp.asarray(previous, jnp.float32),
            added=jnp.asarray(added, jnp.float32),
            prediction_type=schedule.prediction_type,
            clip_range=schedule.clip_sample_range if schedule.clip_sample else None,
            stochastic=eta > 0,
        )

    @property
    def _levels(self) -> jax.Array:
        return jnp.append(self.alphas_cumprod, self.previous[-1:])

    @property
    def signals(self) -> jax.Array:
        """Factors of x0 (S + 1,) before each step, and at the end."""
        return jnp.sqrt(self._levels)

    @property
    def sigmas(self) -> jax.Array:
        """Factors of eps (S + 1,) before each step, and at the end."""
        return jnp.sqrt(1 - self._levels)

    @property
    def init_scale(self) -> jax.Array:
        """The factor of standard normal start noise: 1, float32 ()."""
        return jnp.ones((), jnp.float32)

    def coefficients(self, i: jax.Array | int) -> Coefficients:
        """Return the numbers of step i."""
        abar, previous, added = self.alphas_cumprod[i], self.previous[i], self.added[i]
        # Rounding may make the difference negative if eta is 1 and the previous abar is near 1.
        direction = jnp.sqrt(jnp.maximum(1 - previous - added**2, 0))
        return Coefficients(jnp.sqrt(abar), jnp.sqrt(1 - abar), jnp.sqrt(previous), direction, added)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Euler(OneStep):
    """Euler's method on dx/dsigma = eps with x / signal as the state (arXiv 2206.00364, eq. 4), and its ancestral form.

    States here are the variance-preserving ones that the model sees, so that they compare with those of DDIM, which is
    the same step on another grid. A run whose last level is not 0 ends in x0 + sigma eps, as in diffusers.
    """

    timesteps: jax.Array  # (S,) int32, or float32 if fractional; descending
    signals: jax.Array  # (S + 1,) factor of x0 before each step and at the end
    sigmas: jax.Array  # (S + 1,) factor of eps before each step and at the end
    down: jax.Array  # (S,) factor of eps after each step: less than the next sigma if noise is added
    up: jax.Array  # (S,) standard deviation of the noise that each step adds
    init_scale: jax.Array  # () factor of standard normal start noise
    prediction_type: str = structural()
    stochastic: bool = structural()  # ancestral

    @classmethod
    def create(
        cls, schedule: NoiseSchedule, steps: int, ancestral: bool = False, spacing: str | None = None
    ) -> "Euler":
        """Make the solver of a schedule; `ancestral` replaces as much noise as possible at each step.

        `spacing` is as for `jaxmix.samplers.sigmas.euler_levels`.

        Raises InputError if the schedule cannot be run in that many steps, or needs what this solver does not have.
        """
        if not ancestral:
            choice(schedule, "interpolation_type", ("linear",))
            if schedule.prediction_type == "v_prediction":
                choice(schedule, "timestep_type", ("discrete",))
            refuse_levels(schedule, "euler", spacing)
        levels = euler_levels(schedule, steps, spacing, to_zero=ancestral)
        signals = levels.signals
        signals[-1] = 1
        ratios = levels.sigmas.astype(np.float64)
        source, target = ratios[:-1], ratios[1:]
        down = target**2 / source if ancestral else target
        up = np.sqrt(np.maximum(target**2 - down**2, 0))
        return cls(
            timesteps=jnp.asarray(levels.timesteps),
            signals=jnp.asarray(signals, jnp.float32),
            sigmas=jnp.asarray(signals * ratios, jnp.float32),
            down=jnp.asarray(signals[1:] * down, jnp.float32),
            up=jnp.asarray(signals[1:] * up, jnp.float32),
            init_scale=jnp.asarray(levels.init_scale(schedule, spacing), jnp.float32),
            prediction_type=schedule.prediction_type,
            stochastic=ancestral,
        )

    @property
    def clip_range(self) -> None:  # type: ignore[override]
        """Euler never clips x0."""
        return None

    def coefficients(self, i: jax.Array | int) -> Coefficients:
        """Return the numbers of step i."""
        return Coefficients(self.signals[i], self.sigmas[i], self.signals[i + 1], self.down[i], self.up[i])
