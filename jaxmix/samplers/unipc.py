"""UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models (arXiv 2302.04867).

The variant in B(h) that predicts x0, multistep, as in diffusers' UniPCMultistepScheduler. With lambda = log(signal /
sigma), h = lambda' - lambda and hh = -h a step is::

    x' = sigma' / sigma x - signal' (e^hh - 1) m_0 - signal' B(h) sum_k rho_k (m_k - m_0) / r_k

over the x0 of earlier steps m_k at relative distances r_k, with B(h) = hh ("bh1") or e^hh - 1 ("bh2"), and rho that
solves a system of Vandermonde (Algorithm 1, UniP). When the model has been called at x', the same step is made again
with that x0 as one more (UniC), without another call. All weights are tables here, by order.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.samplers.sigmas import choice, dpm_levels, refuse, refuse_levels
from jaxmix.samplers.solvers import structural
from jaxmix.schedule import NoiseSchedule, prediction_to_x0
from jaxmix.types import InputError

ORDERS = (1, 2, 3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UniPC:
    """UniPC of order P over S steps, as a pytree of float32 tables.

    The memory is the x0 of the last P steps, the newest first, how many there are, and the corrected state before the
    last step. The first step of a run is of first order, wherever it starts.
    """

    timesteps: jax.Array  # (S,) int32, or float32 if fractional; descending
    signals: jax.Array  # (S + 1,) factor of x0 at each level
    sigmas: jax.Array  # (S + 1,) factor of eps at each level
    predictor: jax.Array  # (P, S, 1 + P) weights of x and of the x0, the newest first, by the order of the step
    corrector: jax.Array  # (P, S, 2 + P) weights of x before the last step, of this x0 and of the older ones
    corrects: jax.Array  # (S,) 1 where a step begins by correcting the last one
    most: jax.Array  # (S,) int32, the highest order of each step
    init_scale: jax.Array  # () factor of standard normal start noise: 1
    prediction_type: str = structural()
    stochastic: bool = structural()  # never

    @classmethod
    def create(cls, schedule: NoiseSchedule, steps: int, spacing: str | None = None) -> "UniPC":
        """Make the solver of a schedule; `spacing` as for `jaxmix.samplers.sigmas.dpm_levels`.

        Raises InputError if the schedule cannot be run in that many steps, or needs what this solver does not have.
        """
        refuse(schedule, ("thresholding",))
        refuse_levels(schedule, "unipc", spacing)
        order = schedule.option("solver_order", 2)
        if order not in ORDERS or isinstance(order, bool):
            if not schedule.lenient:
                raise InputError(f"scheduler config: solver_order is {order!r}, expected 1, 2 or 3 for this sampler")
            order = 2
        if not schedule.option("predict_x0", True) and not schedule.lenient:
            raise InputError("scheduler config: predict_x0 is false, expected true for this sampler")
        # The last three are types of DPM-Solver++, which diffusers takes for bh2 here.
        bh1 = choice(schedule, "solver_type", ("bh2", "bh1", "midpoint", "heun", "logrho")) == "bh1"
        levels = dpm_levels(schedule, steps, spacing, unipc=True)
        signals, r = levels.signals, levels.sigmas.astype(np.float64)
        most = np.full(steps, order)
        if schedule.option("lower_order_final", True):
            most = np.minimum(most, np.arange(steps, 0, -1))
        if r[-1] == 0:
            most[-1] = 1  # h is infinite there
        predictor, corrector = np.zeros((order, steps, 1 + order)), np.zeros((order, steps, 2 + order))
        for p in range(1, order + 1):
            for i in range(steps):
                q = min(p, i + 1)  # a step with fewer before it has no such order; nothing reads its weights
                predictor[p - 1, i, : q + 1] = _weights(signals, r, i, q, bh1)
                if i + 1 < steps:
                    corrector[p - 1, i + 1, : q + 2] = _weights(signals, r, i, q, bh1, corrector=True)
        left_out = schedule.option("disable_corrector", [])
        left_out = left_out if isinstance(left_out, list) else []
        tables = {
            "signals": signals,
            "sigmas": signals * r,
            "predictor": predictor,
            "corrector": corrector,
            "corrects": [i > 0 and i - 1 not in left_out for i in range(steps)],
            "init_scale": 1.0,
        }
        return cls(
            timesteps=jnp.asarray(levels.timesteps),
            **{name: jnp.asarray(table, jnp.float32) for name, table in tables.items()},
            most=jnp.asarray(most, jnp.int32),
            prediction_type=schedule.prediction_type,
            stochastic=False,
        )

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.timesteps.shape[0]

    @property
    def order(self) -> int:
        """The highest order P."""
        return self.predictor.shape[0]

    def memory(self, x: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
        """Return the memory before the first step: any x0, of which none counts, and any state."""
        x = x.astype(jnp.float32)
        return (x,) * self.order, jnp.zeros((), jnp.int32), x

    def step(
        self,
        i: jax.Array | int,
        x: jax.Array,
        memory: tuple[tuple[jax.Array, ...], jax.Array, jax.Array],
        pred: jax.Array,
        noise: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], jax.Array, jax.Array]]:
        """Return the float32 state after step i and the memory, from the state x and the prediction there."""
        x, pred = x.astype(jnp.float32), pred.astype(jnp.float32)
        before, known, last = memory
        x0 = prediction_to_x0(self.prediction_type, pred, x, self.signals[i], self.sigmas[i])
        # The order of the last step, which knew one x0 less.
        order = jnp.minimum(self.most[jnp.maximum(jnp.asarray(i) - 1, 0)], known)
        corrected = _sum(self.corrector[jnp.maximum(order - 1, 0), i], (last, x0, *before))
        x = jnp.where((known > 0) & (self.corrects[i] > 0), corrected, x)
        held = (x0, *before[:-1])
        order = jnp.minimum(self.most[i], known + 1)
        return _sum(self.predictor[order - 1, i], (x, *held)), (held, known + 1, x)


def _sum(weights: jax.Array, terms: tuple[jax.Array, ...]) -> jax.Array:
    total = weights[0] * terms[0]
    for k in range(1, len(terms)):
        total = total + weights[k] * terms[k]
    return total


def _weights(signals: np.ndarray, r: np.ndarray, i: int, order: int, bh1: bool, corrector: bool = False) -> np.ndarray:
    """Return the weights of step i from its state, and its x0 and earlier ones: (1 + order,).

    Those of the corrector, (2 + order,), have that of the x0 at the end of the step in the second place.
    """
    source, target = r[i], r[i + 1]
    shift = signals[i + 1] * (1 - target / source)  # - signal' (e^hh - 1)
    out = np.zeros(1 + order + corrector)
    out[0] = signals[i + 1] * target / (signals[i] * source)
    newest = 2 if corrector else 1
    out[newest] = shift
    if target == source or (order == 1 and not corrector):
        return out
    hh = math.log(target / source) if target > 0 else -math.inf
    scale = signals[i + 1] * hh if bh1 else -shift  # signal' B(h)
    distances = np.log(source / r[i - np.arange(1, order)]) / -hh if order > 1 else np.zeros(0)
    if np.any(distances == 0) or np.isinf(hh):
        return out  # levels that fall together, or a step to the end: of first order
    rho = _rho(distances, hh, bh1, corrector)
    for k, share in enumerate(distances):
        weight = scale * rho[k] / share
        out[newest + 1 + k] -= weight
        out[newest] += weight
    if corrector:
        out[1] -= scale * rho[-1]
        out[newest] += scale * rho[-1]
    return out


def _rho(distances: np.ndarray, hh: float, bh1: bool, corrector: bool) -> np.ndarray:
    """Solve for the weights of the differences, of which the corrector has one more."""
    if len(distances) + corrector == 1:
        return np.array([0.5])  # which diffusers takes instead of the solution
    size = len(distances) + corrector
    nodes = np.append(distances, 1.0)[:size]
    phi = math.expm1(hh) / hh - 1
    b = hh if bh1 else math.expm1(hh)
    right = []
    for k in range(1, size + 1):
        right.append(phi * math.factorial(k) / b)
        phi = phi / hh - 1 / math.factorial(k + 1)
    return np.linalg.solve(np.stack([nodes ** (k - 1) for k in range(1, size + 1)]), right)
