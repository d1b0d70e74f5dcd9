"""Samplers of models that are distilled to a few steps: latent consistency models, and trajectory consistency.

Both visit some of the timesteps with which the models were distilled, and add noise after each step but the last. They
are the same as diffusers' LCMScheduler and TCDScheduler.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.samplers.sigmas import refuse
from jaxmix.samplers.solvers import Coefficients, OneStep, structural
from jaxmix.schedule import NoiseSchedule, prediction_to_x0
from jaxmix.types import InputError, shown

ORIGINAL_STEPS = 50
SIGMA_DATA = 0.5  # arXiv 2310.04378, appendix D
GAMMA = 0.3  # of TCD, unless asked otherwise


def distilled_timesteps(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Return `steps` of the config's `original_inference_steps` (50) timesteps, evenly by index, descending, int32.

    Raises InputError for more steps than those, and for an impossible number of them.
    """
    total = schedule.check_steps(steps)
    original = schedule.option("original_inference_steps", ORIGINAL_STEPS)
    if isinstance(original, bool) or not isinstance(original, int) or not 1 <= original <= total:
        raise InputError(
            f"scheduler config: original_inference_steps is {shown(original)}, expected an integer from 1 to {total}"
        )
    if steps > original:
        raise InputError(
            f"steps is {steps}, expected at most {original} for this sampler: the model was distilled with as many"
        )
    chosen = np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)
    visited = (original - chosen) * (total // original) - 1
    if schedule.alphas_cumprod[visited[0]] == 0 and schedule.prediction_type == "epsilon":
        raise InputError(
            f"scheduler config: rescale_betas_zero_snr with prediction_type epsilon: timestep {visited[0]} has no "
            "signal, so eps gives no x0 there, expected v_prediction or sample"
        )
    return visited.astype(np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LCM:
    """Multistep latent consistency sampling (arXiv 2310.04378, Algorithm 3) over S steps, as float32 tables.

    With s = timestep_scaling t and sigma_data = 0.5 the model's x0 becomes c_out x0 + c_skip x, where c_skip =
    sigma_data^2 / (s^2 + sigma_data^2) and c_out = s / sqrt(s^2 + sigma_data^2); that is noised to the next level.
    """

    timesteps: jax.Array  # (S,) int32, descending
    signals: jax.Array  # (S + 1,) factor of x0 before each step and at the end, where it is 1
    sigmas: jax.Array  # (S + 1,) factor of eps before each step and at the end, where it is 0
    skips: jax.Array  # (S,) c_skip
    outs: jax.Array  # (S,) c_out
    init_scale: jax.Array  # () factor of standard normal start noise: 1
    prediction_type: str = structural()
    clip_range: float | None = structural()  # x0 is clipped to [-clip_range, clip_range]
    stochastic: bool = structural()  # always

    @classmethod
    def create(cls, schedule: NoiseSchedule, steps: int) -> "LCM":
        """Make the solver of a schedule.

        Raises InputError for more steps than the model was distilled with, and for what this solver does not have.
        """
        refuse(schedule, ("thresholding",))
        timesteps = distilled_timesteps(schedule, steps)
        scaling = schedule.option("timestep_scaling", 10.0)
        abar = np.append(schedule.alphas_cumprod[timesteps].astype(np.float64), 1.0)
        scaled = timesteps.astype(np.float64) * scaling
        tables: dict[str, Any] = {
            "signals": np.sqrt(abar),
            "sigmas": np.sqrt(1 - abar),
            "skips": SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2),
            "outs": scaled / np.sqrt(scaled**2 + SIGMA_DATA**2),
            "init_scale": 1.0,
        }
        return cls(
            timesteps=jnp.asarray(timesteps),
            **{name: jnp.asarray(table, jnp.float32) for name, table in tables.items()},
            prediction_type=schedule.prediction_type,
            clip_range=schedule.clip_sample_range if schedule.clip_sample else None,
            stochastic=True,
        )

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

        `noise` (shape of x) is standard normal. Raises ValueError if there is none.
        """
        if noise is None:
            raise ValueError("this solver is stochastic: step needs noise")
        x, pred = x.astype(jnp.float32), pred.astype(jnp.float32)
        x0 = prediction_to_x0(self.prediction_type, pred, x, self.signals[i], self.sigmas[i])
        if self.clip_range is not None:
            x0 = jnp.clip(x0, -self.clip_range, self.clip_range)
        x0 = self.outs[i] * x0 + self.skips[i] * x
        return self.signals[i + 1] * x0 + self.sigmas[i + 1] * noise.astype(jnp.float32), memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TCD(OneStep):
    """Strategic stochastic sampling (Trajectory Consistency Distillation, arXiv 2402.19159, Algorithm 4) over S steps.

    Step i goes along the trajectory to timestep s = floor((1 - gamma) t_{i+1}), where gamma is called eta, and from
    there by noise to t_{i+1}. The last step goes to timestep 0, and so ends above level 0.
    """

    timesteps: jax.Array  # (S,) int32, descending
    signals: jax.Array  # (S + 1,) factor of x0 before each step and at the end
    sigmas: jax.Array  # (S + 1,) factor of eps before each step and at the end
    eps: jax.Array  # (S,) factor of eps after each step
    added: jax.Array  # (S,) standard deviation of the noise that each step adds
    init_scale: jax.Array  # () factor of standard normal start noise: 1
    prediction_type: str = structural()
    stochastic: bool = structural()  # eta > 0

    @classmethod
    def create(cls, schedule: NoiseSchedule, steps: int, eta: float = GAMMA) -> "TCD":
        """Make the solver of a schedule; `eta` from 0 (deterministic) to 1 (as noisy as a consistency model's).

        Raises InputError for more steps than the model was distilled with, and for what this solver does not have.
        """
        timesteps = distilled_timesteps(schedule, steps)
        after = np.append(timesteps[1:], 0)
        # In float32, as torch multiplies a number with whole ones.
        along = np.floor(np.float32(1 - eta) * after.astype(np.float32)).astype(int)
        abar = schedule.alphas_cumprod.astype(np.float64)
        kept = np.sqrt(abar[after] / abar[along])
        levels = abar[np.append(timesteps, 0)]
        tables = {
            "signals": np.sqrt(levels),
            "sigmas": np.sqrt(1 - levels),
            "eps": kept * np.sqrt(1 - abar[along]),
            "added": np.sqrt(np.maximum(1 - kept**2, 0)),
            "init_scale": 1.0,
        }
        return cls(
            timesteps=jnp.asarray(timesteps),
            **{name: jnp.asarray(table, jnp.float32) for name, table in tables.items()},
            prediction_type=schedule.prediction_type,
            stochastic=eta > 0,
        )

    @property
    def clip_range(self) -> None:  # type: ignore[override]
        """TCD never clips x0."""
        return None

    def coefficients(self, i: jax.Array | int) -> Coefficients:
        """Return the numbers of step i."""
        return Coefficients(self.signals[i], self.sigmas[i], self.signals[i + 1], self.eps[i], self.added[i])
