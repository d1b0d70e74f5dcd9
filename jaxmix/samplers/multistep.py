"""DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (arXiv 2211.01095).

With lambda = log(signal / sigma), h = lambda_{i+1} - lambda_i and r = (lambda_i - lambda_{i-1}) / h, a step is
x' = sigma_{i+1} / sigma_i x - signal_{i+1} (exp(-h) - 1) (x0_i + (x0_i - x0_{i-1}) / 2r)   (Algorithm 2, "midpoint").
Unlike the paper, the weights and the choices around them (heun, first order at the end, SDE) are those of diffusers'
DPMSolverMultistepScheduler.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.samplers.sigmas import choice, dpm_levels, final_sigma, refuse, refuse_levels
from jaxmix.samplers.solvers import structural
from jaxmix.schedule import NoiseSchedule, prediction_to_x0
from jaxmix.types import InputError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DPMSolver2M:
    """DPM-Solver++(2M) over S steps, deterministic or as an SDE, as a pytree of float32 tables.

    Step i goes from level i to level i + 1; level S is the end. The memory is the x0 of the previous step, and whether
    there was one: the first step of a run, wherever it starts, is of first order.
    """

    timesteps: jax.Array  # (S,) int32, descending
    signals: jax.Array  # (S + 1,) factor of x0 at each level
    sigmas: jax.Array  # (S + 1,) factor of eps at each level
    x_weights: jax.Array  # (S,) the state after a step is x_weight x + x0_weight x0 + change_weight (x0 - previous x0)
    x0_weights: jax.Array  # (S,)                       + noise_weight noise
    change_weights: jax.Array  # (S,)
    noise_weights: jax.Array  # (S,)
    init_scale: jax.Array  # () factor of standard normal start noise: 1
    prediction_type: str = structural()
    stochastic: bool = structural()  # step needs noise

    @classmethod
    def create(
        cls, schedule: NoiseSchedule, steps: int, sde: bool = False, spacing: str | None = None
    ) -> "DPMSolver2M":
        """Make the solver of a schedule; `sde` is diffusers' algorithm_type "sde-dpmsolver++".

        `spacing` is as for `jaxmix.samplers.sigmas.dpm_levels`.

        Raises InputError if the schedule cannot be run in that many steps, or needs what this solver does not have.
        """
        refuse(schedule, ("thresholding",) if spacing else ("thresholding", "use_lu_lambdas"))
        refuse_levels(schedule, "dpmpp_2m_sde" if sde else "dpmpp_2m", spacing)
        order = schedule.option("solver_order", 2)
        if order not in (1, 2) and schedule.lenient:
            order = 2
        if order not in (1, 2):
            raise InputError(f"scheduler config: solver_order is {order!r}, expected 2 or 1 for this sampler")
        # The last three are types of UniPC and DEIS, which diffusers treats as midpoint here.
        kind = choice(schedule, "solver_type", ("midpoint", "heun", "logrho", "bh1", "bh2"))
        levels = dpm_levels(schedule, steps, spacing)
        ratios = levels.sigmas.astype(np.float64)
        signals = levels.signals
        source, target = ratios[:-1], ratios[1:]

        shrink = target / source  # exp(-h); 0 at the last step of a run that ends without noise
        with np.errstate(divide="ignore"):
            h = -np.log(shrink)
        decay = shrink**2 if sde else shrink
        x0_weights = signals[1:] * (1 - decay)
        if kind == "heun":
            rate = 2 * h if sde else h
            # (1 - decay) / rate tends to 1 where two levels coincide.
            change = signals[1:] * (1 - np.divide(1 - decay, rate, out=np.ones(steps), where=rate > 0))
        else:
            change = x0_weights / 2
        before = np.append(0.0, h[:-1])
        with np.errstate(invalid="ignore"):  # inf * 0 at the last step, which is then of first order
            change = np.divide(change * h, before, out=np.zeros(steps), where=before > 0)
        if order == 1:
            change[:] = 0
        few = schedule.option("lower_order_final", True) and steps < 15
        if few or schedule.option("euler_at_final", False) or final_sigma(schedule) == "zero":
            change[-1] = 0

        sigmas = signals * ratios
        tables = {
            "signals": signals,
            "sigmas": sigmas,
            "x_weights": sigmas[1:] / sigmas[:-1] * (shrink if sde else 1),
            "x0_weights": x0_weights,
            "change_weights": change,
            "noise_weights": sigmas[1:] * np.sqrt(1 - decay) if sde else np.zeros(steps),
            "init_scale": 1.0,
        }
        return cls(
            timesteps=jnp.asarray(levels.timesteps),
            **{name: jnp.asarray(table, jnp.float32) for name, table in tables.items()},
            prediction_type=schedule.prediction_type,
            stochastic=sde,
        )

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.timesteps.shape[0]

    def memory(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the memory before the first step: some x0 with weight 0."""
        # x rather than zeros, so that under shard_map it varies over devices like the x0 that replaces it.
        return x.astype(jnp.float32), jnp.zeros((), jnp.float32)

    def step(
        self,
        i: jax.Array | int,
        x: jax.Array,
        memory: tuple[jax.Array, jax.Array],
        pred: jax.Array,
        noise: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Return the float32 state after step i and the memory, from the state x and the prediction there.

        `noise` (shape of x, standard normal) is required by the SDE and ignored by the deterministic solver.
        """
        x, pred = x.astype(jnp.float32), pred.astype(jnp.float32)
        previous, known = memory
        x0 = prediction_to_x0(self.prediction_type, pred, x, self.signals[i], self.sigmas[i])
        x = self.x_weights[i] * x + self.x0_weights[i] * x0 + known * self.change_weights[i] * (x0 - previous)
        if self.stochastic:
            if noise is None:
                raise ValueError("this solver is stochastic: step needs noise")
            x = x + self.noise_weights[i] * noise.astype(jnp.float32)
        return x, (x0, jnp.ones_like(known))
