"""Linear multistep solvers, which step with a combination of the last four predictions: LMS and PNDM.

They are the same as diffusers' LMSDiscreteScheduler, and PNDMScheduler with ``skip_prk_steps`` (PLMS). A run that
begins in the middle begins with a step of first order, and so do those of k-diffusion; diffusers then weights
predictions that it does not have.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.samplers.sigmas import euler_levels, refuse_levels
from jaxmix.samplers.solvers import structural
from jaxmix.schedule import NoiseSchedule, prediction_to_eps, prediction_to_x0
from jaxmix.types import InputError

ORDER = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LMS:
    """Adams-Bashforth on dx/dr = eps with r = sigma / signal, on uneven grids, over S steps, as float32 tables.

    A step is x' / signal' = x0_i + r_i eps_i + sum_k weight_k eps_{i - k}; the weights are the integrals of Lagrange's
    polynomials through the last levels. The memory is the three eps before, and how many there are.
    """

    timesteps: jax.Array  # (S,) int32, or float32 if fractional; descending
    signals: jax.Array  # (S + 1,) factor of x0 before each step and at the end
    sigmas: jax.Array  # (S + 1,) factor of eps before each step and at the end
    weights: jax.Array  # (ORDER, S, ORDER) of the last eps, the newest first, in a step of order 1, 2, 3, 4
    init_scale: jax.Array  # () factor of standard normal start noise
    prediction_type: str = structural()
    stochastic: bool = structural()  # never

    @classmethod
    def create(cls, schedule: NoiseSchedule, steps: int, spacing: str | None = None) -> "LMS":
        """Make the solver of a schedule; `spacing` as for `jaxmix.samplers.sigmas.euler_levels`.

        Raises InputError if the schedule cannot be run in that many steps, or needs what this solver does not have.
        """
        refuse_levels(schedule, "lms", spacing)
        levels = euler_levels(schedule, steps, spacing, to_zero=True)
        r, signals = levels.sigmas.astype(np.float64), levels.signals
        weights = np.zeros((ORDER, steps, ORDER))
        for order in range(1, ORDER + 1):
            for i in range(steps):
                # A step whose levels before it are missing has no such order; nothing reads its weights.
                weights[order - 1, i, : min(order, i + 1)] = _adams(r, i, min(order, i + 1))
        # The step from r_i to r_{i+1} is written from x0 and eps, which a large r_i would hide in a rounded x.
        weights[:, :, 0] += r[:-1]
        return cls(
            timesteps=jnp.asarray(levels.timesteps),
            signals=jnp.asarray(signals, jnp.float32),
            sigmas=jnp.asarray(signals * r, jnp.float32),
            weights=jnp.asarray(weights * signals[1:, None], jnp.float32),
            init_scale=jnp.asarray(levels.init_scale(schedule, spacing), jnp.float32),
            prediction_type=schedule.prediction_type,
            stochastic=False,
        )

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.timesteps.shape[0]

    def memory(self, x: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Return the memory before the first step: any three eps, of which none counts."""
        x = x.astype(jnp.float32)
        return (x,) * (ORDER - 1), jnp.zeros((), jnp.int32)

    def step(
        self,
        i: jax.Array | int,
        x: jax.Array,
        memory: tuple[tuple[jax.Array, ...], jax.Array],
        pred: jax.Array,
        noise: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], jax.Array]]:
        """Return the float32 state after step i and the memory, from the state x and the prediction there."""
        x, pred = x.astype(jnp.float32), pred.astype(jnp.float32)
        before, known = memory
        x0 = prediction_to_x0(self.prediction_type, pred, x, self.signals[i], self.sigmas[i])
        eps = prediction_to_eps(self.prediction_type, pred, x, self.signals[i], self.sigmas[i])
        weights = self.weights[jnp.minimum(known, ORDER - 1), i]
        x = self.signals[i + 1] * x0 + _weighted(weights, (eps, *before))
        return x, ((eps, *before[:-1]), known + 1)


def _adams(r: np.ndarray, i: int, order: int) -> np.ndarray:
    """Return the integrals from r_i to r_{i+1} of the polynomials that are 1 at r_{i-k}, else 0 (order,)."""
    nodes, shares = np.polynomial.legendre.leggauss(2)  # exact up to degree 3
    a, b = r[i], r[i + 1]
    tau = (a + b) / 2 + (b - a) / 2 * nodes
    held = r[i - np.arange(order)]
    out = np.zeros(order)
    for k in range(order):
        others = np.delete(held, k)
        gaps = held[k] - others
        if np.all(gaps != 0):  # levels that fall together leave the weight to their twin
            out[k] = (b - a) / 2 * np.sum(shares * np.prod((tau[:, None] - others) / gaps, axis=1))
    return out


def _weighted(weights: jax.Array, terms: tuple[jax.Array, ...]) -> jax.Array:
    total = weights[0] * terms[0]
    for k in range(1, len(terms)):
        total = total + weights[k] * terms[k]
    return total


# Of the newest prediction and of those before it, by how many there are before it; then of the second call of the first
# step, which is made with the prediction of the first call.
_PLMS = np.array(
    [[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    + [[1 / 2, 1 / 2, 0, 0]]
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PNDM:
    """Pseudo linear multistep (arXiv 2202.09778, eq. 12, Algorithm 2) over S steps, as float32 tables.

    A step is DDIM's with the weighted mean of the last predictions. The first step of a run has two calls: it is made
    once more with the mean of the predictions at both of its ends. The memory is the three predictions before, how many
    there are, and the state before the first step.
    """

    timesteps: jax.Array  # (S,) int32, descending
    signals: jax.Array  # (S + 1,) factor of x0 before each step and at the end
    sigmas: jax.Array  # (S + 1,) factor of eps before each step and at the end
    levels: jax.Array  # (S, 2, 2) what a call's step takes for factors of x0 and eps in the state before it
    x_weights: jax.Array  # (S, 2) the state after a call is x_weight x + eps_weight eps
    eps_weights: jax.Array  # (S, 2)
    init_scale: jax.Array  # () factor of standard normal start noise: 1
    prediction_type: str = structural()
    stochastic: bool = structural()  # never

    @classmethod
    def create(cls, schedule: NoiseSchedule, steps: int) -> "PNDM":
        """Make the solver of a schedule.

        Raises InputError if the schedule cannot be run in that many steps, or begins without any signal.
        """
        timesteps = schedule.timesteps(steps)
        ratio = schedule.num_train_timesteps // steps
        abar = schedule.alphas_cumprod
        if abar[timesteps[0]] == 0:
            raise InputError(
                f"scheduler config: rescale_betas_zero_snr: timestep {timesteps[0]} has no signal, so eps gives no x0 "
                "there, expected another sampler than pndm"
            )

        def at(t: np.ndarray) -> np.ndarray:
            return np.where(t >= 0, abar[np.maximum(t, 0)], schedule.final_alpha_cumprod)

        # The first step made once more goes from one ratio above the next timestep, as in diffusers, wherever it began.
        after = np.append(timesteps[1:], timesteps[-1:])
        source = at(np.stack([timesteps, np.minimum(after + ratio, len(abar) - 1)], 1)).astype(np.float64)
        target = at(np.stack([timesteps - ratio, after], 1)).astype(np.float64)
        x_weights = np.sqrt(target / source)
        levels = np.append(source[:, 0], target[-1, 0])
        tables = {
            "signals": np.sqrt(levels),
            "sigmas": np.sqrt(1 - levels),
            "levels": np.sqrt(np.stack([source, 1 - source], 2)),
            "x_weights": x_weights,
            "eps_weights": np.sqrt(1 - target) - x_weights * np.sqrt(1 - source),
            "init_scale": 1.0,
        }
        return cls(
            timesteps=jnp.asarray(timesteps),
            **{name: jnp.asarray(table, jnp.float32) for name, table in tables.items()},
            prediction_type=schedule.prediction_type,
            stochastic=False,
        )

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.timesteps.shape[0]

    @property
    def second_timesteps(self) -> jax.Array:
        """Timesteps of second calls: those of the next step."""
        return jnp.append(self.timesteps[1:], self.timesteps[-1:])

    @property
    def second_signals(self) -> jax.Array:
        """Factors of x0 (S,) in what second calls see."""
        return self.signals[1:]

    @property
    def second_sigmas(self) -> jax.Array:
        """Factors of eps (S,) in what second calls see."""
        return self.sigmas[1:]

    def calls(self, step: int, start: int) -> int:
        """Return how often step `step` calls the model: twice if it is the first of a run, and not its last."""
        return 2 if step == start and step + 1 < self.steps else 1

    def memory(self, x: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
        """Return the memory before the first step: any three predictions, of which none counts, and any state."""
        x = x.astype(jnp.float32)
        return (x,) * (ORDER - 1), jnp.zeros((), jnp.int32), x

    def step(
        self,
        i: jax.Array | int,
        x: jax.Array,
        memory: tuple[tuple[jax.Array, ...], jax.Array, jax.Array],
        pred: jax.Array,
        noise: jax.Array | None = None,
        part: jax.Array | int = 0,
    ) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], jax.Array, jax.Array]]:
        """Return the float32 state after a call of step i, and the memory."""
        x, pred, second = x.astype(jnp.float32), pred.astype(jnp.float32), jnp.asarray(part) == 1
        before, known, saved = memory
        weights = jnp.asarray(_PLMS, jnp.float32)[jnp.where(second, ORDER, jnp.minimum(known, ORDER - 1))]
        x = jnp.where(second, saved, x)
        # Predictions are combined as they are, and v becomes eps with the state of this step, as in diffusers.
        mean = _weighted(weights, (pred, *before))
        eps = prediction_to_eps(self.prediction_type, mean, x, self.levels[i, part, 0], self.levels[i, part, 1])
        held = tuple(
            jnp.where(second, old, new) for old, new in zip(before, (pred, *before[:-1]), strict=True)
        )  # the second call's prediction is used once
        after = self.x_weights[i, part] * x + self.eps_weights[i, part] * eps
        return after, (held, jnp.where(second, known, known + 1), x)
