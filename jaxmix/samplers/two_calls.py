"""Solvers that call the model twice a step, at both ends of it or at its beginning and middle: Heun and DPM++ SDE.

Both step along r = sigma / signal, in the grids of Euler. They are the same as diffusers' HeunDiscreteScheduler and
DPMSolverSDEScheduler.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.samplers.sigmas import euler_levels, refuse_levels, timesteps_of, training_sigmas
from jaxmix.samplers.solvers import structural
from jaxmix.schedule import NoiseSchedule, prediction_to_eps, prediction_to_x0


class LastOnce:
    """The shape of a run whose steps call the model twice, the last one excepted, which ends at level 0."""

    timesteps: jax.Array

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.timesteps.shape[0]

    def calls(self, step: int, start: int) -> int:
        """Return how often step `step` calls the model."""
        return 2 if step + 1 < self.steps else 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heun(LastOnce):
    """Heun's method on dx/dr = eps (arXiv 2206.00364, Algorithm 1, without churn), over S steps, as float32 tables.

    The second call is at the next level, where Euler's step leads; the step then takes the mean of both eps. The memory
    is the eps of the first call.
    """

    timesteps: jax.Array  # (S,) int32, or float32 if fractional; descending
    signals: jax.Array  # (S + 1,) factor of x0 before each step and at the end
    sigmas: jax.Array  # (S + 1,) factor of eps before each step and at the end
    half: jax.Array  # (S,) factor of the change of eps in the second call
    init_scale: jax.Array  # () factor of standard normal start noise
    prediction_type: str = structural()
    clip_range: float | None = structural()  # x0 is clipped to [-clip_range, clip_range]
    stochastic: bool = structural()  # never

    @classmethod
    def create(cls, schedule: NoiseSchedule, steps: int, spacing: str | None = None) -> "Heun":
        """Make the solver of a schedule; `spacing` as for `jaxmix.samplers.sigmas.euler_levels`.

        Raises InputError if the schedule cannot be run in that many steps, or needs what this solver does not have.
        """
        refuse_levels(schedule, "heun", spacing)
        levels = euler_levels(schedule, steps, spacing, to_zero=True)
        ratios, signals = levels.sigmas.astype(np.float64), levels.signals
        return cls(
            timesteps=jnp.asarray(levels.timesteps),
            signals=jnp.asarray(signals, jnp.float32),
            sigmas=jnp.asarray(signals * ratios, jnp.float32),
            half=jnp.asarray(signals[1:] * np.diff(ratios) / 2, jnp.float32),
            init_scale=jnp.asarray(levels.init_scale(schedule, spacing), jnp.float32),
            prediction_type=schedule.prediction_type,
            clip_range=schedule.clip_sample_range if schedule.clip_sample else None,
            stochastic=False,
        )

    @property
    def second_timesteps(self) -> jax.Array:
        """Timesteps of the second calls: those of the next step."""
        return jnp.append(self.timesteps[1:], self.timesteps[-1:])

    @property
    def second_signals(self) -> jax.Array:
        """Factors of x0 (S,) in what the second calls see."""
        return self.signals[1:]

    @property
    def second_sigmas(self) -> jax.Array:
        """Factors of eps (S,) in what the second calls see."""
        return self.sigmas[1:]

    def memory(self, x: jax.Array) -> jax.Array:
        """Return the memory before the first step: any eps."""
        return x.astype(jnp.float32)

    def step(
        self,
        i: jax.Array | int,
        x: jax.Array,
        memory: jax.Array,
        pred: jax.Array,
        noise: jax.Array | None = None,
        part: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the float32 state after a call of step i, Euler's after the first, and the memory."""
        x, pred, second = x.astype(jnp.float32), pred.astype(jnp.float32), jnp.asarray(part) == 1
        level = jnp.asarray(i) + jnp.asarray(part)
        signal, sigma = self.signals[level], self.sigmas[level]
        x0 = prediction_to_x0(self.prediction_type, pred, x, signal, sigma)
        eps = prediction_to_eps(self.prediction_type, pred, x, signal, sigma)
        if self.clip_range is not None:
            x0 = jnp.clip(x0, -self.clip_range, self.clip_range)
            eps = (x - signal * x0) / sigma
        euler = self.signals[i + 1] * x0 + self.sigmas[i + 1] * eps
        return jnp.where(second, x + self.half[i] * (eps - memory), euler), eps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DPMSolverSDE(LastOnce):
    """DPM-Solver++ (arXiv 2211.01095) as an SDE, single step, second order, over S steps, as float32 tables (S, 2).

    From r to r' < r, with up = min(r', r' sqrt(1 - (r' / r)^2)) and down = sqrt(r'^2 - up^2)::

        x' / signal' = down / r x / signal + (1 - down / r) x0 + up noise

    The first call leads to the geometric mean of two levels, the second one, made there, from the state before the step
    to the next level. The memory is that state.
    """

    timesteps: jax.Array  # (S,) float32, descending
    second_timesteps: jax.Array  # (S,) float32
    signals: jax.Array  # (S + 1,) factor of x0 before each step and at the end
    sigmas: jax.Array  # (S + 1,) factor of eps before each step and at the end
    second_signals: jax.Array  # (S,)
    second_sigmas: jax.Array  # (S,)
    x_weights: jax.Array  # (S, 2) the state after a call is x_weight x + x0_weight x0 + noise_weight noise
    x0_weights: jax.Array  # (S, 2)
    noise_weights: jax.Array  # (S, 2)
    shared: (
        jax.Array
    )  # (S, 2) what the noise of the second call is made of: shares of that of the first, and of its own
    init_scale: jax.Array  # () factor of standard normal start noise
    prediction_type: str = structural()
    stochastic: bool = structural()  # always

    @classmethod
    def create(cls, schedule: NoiseSchedule, steps: int, spacing: str | None = None) -> "DPMSolverSDE":
        """Make the solver of a schedule; `spacing` as for `jaxmix.samplers.sigmas.euler_levels`.

        Raises InputError if the schedule cannot be run in that many steps, or needs what this solver does not have.
        """
        refuse_levels(schedule, "dpmpp_sde", spacing)
        levels = euler_levels(schedule, steps, spacing, to_zero=True)
        r = levels.sigmas.astype(np.float64)
        signals = levels.signals
        middle = np.append(np.sqrt(r[:-2] * r[1:-1]), 0.0)  # the last step goes to 0 at once
        between = timesteps_of(middle[:-1], training_sigmas(schedule))
        middle_signals = 1 / np.sqrt(middle**2 + 1)
        targets = np.stack([middle, r[1:]], 1)
        up = np.minimum(targets, targets * np.sqrt(np.maximum(1 - (targets / r[:-1, None]) ** 2, 0)))
        down = np.sqrt(targets**2 - up**2)
        after = np.stack([middle_signals, signals[1:]], 1)
        shrink = down / r[:-1, None]
        # Brownian motion in r: what happens up to the middle is a part of what happens in the whole step.
        whole = r[:-1] - r[1:]
        first = np.sqrt(np.divide(r[:-1] - middle, whole, out=np.ones(steps), where=whole > 0))
        tables = {
            "timesteps": levels.timesteps,
            "second_timesteps": np.append(between, levels.timesteps[-1:]),
            "signals": signals,
            "sigmas": signals * r,
            "second_signals": middle_signals,
            "second_sigmas": middle_signals * middle,
            "x_weights": after * shrink / signals[:-1, None],
            "x0_weights": after * (1 - shrink),
            "noise_weights": after * up,
            "shared": np.stack([first, np.sqrt(np.maximum(1 - first**2, 0))], 1),
            "init_scale": levels.init_scale(schedule, spacing),
        }
        return cls(
            **{name: jnp.asarray(table, jnp.float32) for name, table in tables.items()},
            prediction_type=schedule.prediction_type,
            stochastic=True,
        )

    def memory(self, x: jax.Array) -> jax.Array:
        """Return the memory before the first step: any state."""
        return x.astype(jnp.float32)

    def noise(self, draw: Callable[[jax.Array], jax.Array], call: jax.Array) -> jax.Array:
        """Return the noise of a call, 2 i + part, from independent draws, as increments of one Brownian motion.

        Those of a step are correlated, as the reference's are; those of different steps are independent.
        """
        i, part = call // 2, call % 2
        first, own = draw(2 * i), draw(2 * i + 1)
        return jnp.where(part == 0, first, self.shared[i, 0] * first + self.shared[i, 1] * own)

    def step(
        self,
        i: jax.Array | int,
        x: jax.Array,
        memory: jax.Array,
        pred: jax.Array,
        noise: jax.Array | None = None,
        part: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the float32 state after a call of step i, between two levels after the first, and the memory.

        `noise` (shape of x) is standard normal. Raises ValueError if there is none.
        """
        if noise is None:
            raise ValueError("this solver is stochastic: step needs noise")
        x, pred, second = x.astype(jnp.float32), pred.astype(jnp.float32), jnp.asarray(part) == 1
        signal = jnp.where(second, self.second_signals[i], self.signals[i])
        sigma = jnp.where(second, self.second_sigmas[i], self.sigmas[i])
        x0 = prediction_to_x0(self.prediction_type, pred, x, signal, sigma)
        before = jnp.where(second, memory, x)
        x = self.x_weights[i, part] * before + self.x0_weights[i, part] * x0
        return x + self.noise_weights[i, part] * noise.astype(jnp.float32), before
