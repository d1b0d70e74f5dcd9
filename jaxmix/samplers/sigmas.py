"""Noise levels of the solvers that step along sigma / signal, which diffusers calls sigmas.

sigma(t) = sqrt((1 - abar_t) / abar_t). The grids follow diffusers' EulerDiscreteScheduler,
DPMSolverMultistepScheduler and UniPCMultistepScheduler, which differ from each other and from DDIM in spacing and end
points. The "sgm_uniform" of web UIs, which diffusers lacks, is even in t from the last training timestep down to the
first, which is left out, with sigma interpolated in its logarithm.
"""

import dataclasses
import math

import numpy as np
from scipy.special import betaincinv

from jaxmix.schedule import NoiseSchedule
from jaxmix.types import InputError

RHO = 7.0  # arXiv 2206.00364, section 3
BETA = 0.6  # both parameters of the beta distribution, arXiv 2407.12173
LEVEL_SPACINGS = ("karras", "exponential", "beta", "sgm_uniform")
"""Spacings of levels, in place of a spacing of timesteps."""


@dataclasses.dataclass(frozen=True)
class Levels:
    """The grid of a run: timesteps (S,), descending, and sigma / signal, float32 (S + 1,), before each step and last.

    Timesteps are int32, or float32 if they fall between those of training.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray

    @property
    def signals(self) -> np.ndarray:
        """The factor of x0 at each level, float64 (S + 1,); times the grid's sigmas it is the factor of eps."""
        return 1 / np.sqrt(self.sigmas.astype(np.float64) ** 2 + 1)

    def init_scale(self, schedule: NoiseSchedule, spacing: str | None) -> float:
        """Return the factor of standard normal start noise, for Euler and its kin."""
        # diffusers allows for the little signal of the first level only if the spacing is leading.
        if schedule.timestep_spacing == "leading" and spacing != "sgm_uniform":
            return 1.0
        return float(self.signals[0] * self.sigmas[0].astype(np.float64))


def training_sigmas(schedule: NoiseSchedule) -> np.ndarray:
    """Return sigma / signal of every training timestep, float32 (T,), ascending and finite.

    If the schedule ends without any signal, abar is taken as 2**-24 there, as in diffusers.
    """
    abar = schedule.alphas_cumprod
    if schedule.rescale_betas_zero_snr:
        abar = np.concatenate([abar[:-1], np.asarray([2**-24], np.float32)])
    return np.sqrt((1 - abar) / abar)


def euler_levels(schedule: NoiseSchedule, steps: int, spacing: str | None = None, to_zero: bool = False) -> Levels:
    """Return the grid of Euler and its kin; `spacing` is one of LEVEL_SPACINGS, None for the schedule's timesteps.

    Karras levels (arXiv 2206.00364, eq. 5), exponential and beta ones run between the ends of the grid of timesteps.
    The last level is 0, or the lowest of training if the config's final_sigmas_type says so and `to_zero` is not set.
    Raises InputError for impossible steps and unsupported options.
    """
    total = schedule.check_steps(steps)
    training = training_sigmas(schedule)
    if spacing == "sgm_uniform":
        t, sigmas = _sgm_uniform(training, steps)
        return Levels(_whole(t), _with_last(schedule, training, sigmas, to_zero))
    if schedule.timestep_spacing in (None, "linspace"):
        t = np.linspace(0, total - 1, steps, dtype=np.float32)[::-1]
    else:
        t = schedule.timesteps(steps).astype(np.float32)
    sigmas = np.interp(t, np.arange(total), training)
    if spacing is not None:
        sigmas = _spread(spacing, schedule, sigmas[0].item(), sigmas[-1].item(), steps)
        t = timesteps_of(sigmas, training)
    return Levels(_whole(t), _with_last(schedule, training, sigmas, to_zero))


def dpm_levels(schedule: NoiseSchedule, steps: int, spacing: str | None = None, unipc: bool = False) -> Levels:
    """Return the grid of DPM-Solver++, or of UniPC; other levels than those of timesteps run between those of training.

    Grids of timesteps are made for one step more, and their last timestep is dropped. Raises InputError for impossible
    steps and unsupported options.
    """
    total = schedule.check_steps(steps)
    training = training_sigmas(schedule)
    if spacing == "sgm_uniform":
        t, sigmas = _sgm_uniform(training, steps)
        return Levels(_whole(t), _with_last(schedule, training, sigmas))
    if spacing is None:
        t = _dpm_timesteps(schedule, steps, training, clipped=not unipc)
        sigmas = np.interp(t, np.arange(total), training)
    else:
        sigmas = _spread(spacing, schedule, training[-1].item(), training[0].item(), steps)
        t = timesteps_of(sigmas, training)
        # diffusers rounds those of Karras levels, and cuts off the fractions of the others.
        if spacing == "karras" and (unipc or schedule.beta_schedule != "squaredcos_cap_v2"):
            t = t.round()
    lowest = sigmas[-1:] if unipc and spacing is not None else training
    return Levels(t.astype(np.int32), _with_last(schedule, lowest, sigmas))


def _whole(t: np.ndarray) -> np.ndarray:
    """Return timesteps as int32 if they are whole, else as float32."""
    t = t.astype(np.float32)
    whole = t.astype(np.int32)
    return whole if np.all(whole == t) else t


def _dpm_timesteps(schedule: NoiseSchedule, steps: int, training: np.ndarray, clipped: bool) -> np.ndarray:
    total = schedule.num_train_timesteps
    # lambda = log(signal / sigma) falls with t; levels below lambda_min_clipped are left out at the noisy end.
    clip = schedule.option("lambda_min_clipped", -math.inf) if clipped else -math.inf
    end = total - int(np.searchsorted(-np.log(training[::-1]), np.float32(clip)))
    if schedule.timestep_spacing in (None, "linspace"):
        t = np.linspace(0, end - 1, steps + 1).round()[:0:-1]
    elif schedule.timestep_spacing == "trailing":
        t = np.arange(end, 0, -total / steps).round()[:steps] - 1
    else:
        ratio = end // (steps + 1)
        if ratio == 0:
            raise InputError(
                f"steps is {steps}, expected at most {end - 1} for this sampler with leading timestep_spacing"
            )
        t = (np.arange(1, steps + 1) * ratio)[::-1] + schedule.steps_offset
    schedule.check_first_timestep(steps, t[0])
    return t


def _with_last(schedule: NoiseSchedule, training: np.ndarray, sigmas: np.ndarray, to_zero: bool = False) -> np.ndarray:
    last = 0.0 if to_zero or final_sigma(schedule) == "zero" else training[0]
    return np.concatenate([sigmas, [last]]).astype(np.float32)


def final_sigma(schedule: NoiseSchedule) -> str:
    """Return the config's final_sigmas_type: "zero" or "sigma_min"; raises InputError for any other."""
    return choice(schedule, "final_sigmas_type", ("zero", "sigma_min"))


def choice(schedule: NoiseSchedule, key: str, choices: tuple[str, ...]) -> str:
    """Return a solver option of the config, by default the first choice.

    Any other value raises InputError, or counts as missing if the schedule is lenient.
    """
    found = schedule.option(key, choices[0])
    if found not in choices:
        if schedule.lenient:
            return choices[0]
        raise InputError(f"scheduler config: {key} is {found!r}, expected {' or '.join(choices)} for this sampler")
    return found


def refuse(schedule: NoiseSchedule, keys: tuple[str, ...]) -> None:
    """Raise InputError if the config switches on one of these options, which the sampler does not have.

    A lenient schedule goes without them.
    """
    for key in keys:
        if schedule.option(key, False) and not schedule.lenient:
            raise InputError(f"scheduler config: {key} is true, expected false for this sampler: not supported")


def refuse_levels(schedule: NoiseSchedule, name: str, spacing: str | None) -> None:
    """Raise InputError if the config asks for levels that the sampler `name` takes from its spacing, which is None.

    A lenient schedule goes without them.
    """
    for found in ("exponential", "beta"):
        key = f"use_{found}_sigmas"
        if spacing is None and schedule.option(key, False) and not schedule.lenient:
            raise InputError(f"scheduler config: {key} is true, expected false for {name}, or {name}_{found}")


def _spread(spacing: str, schedule: NoiseSchedule, most: float, least: float, steps: int) -> np.ndarray:
    """Return levels from most to least, or between the config's sigma_max and sigma_min, float64 (steps,)."""
    most, least = schedule.option("sigma_max", most), schedule.option("sigma_min", least)
    ramp = np.linspace(0, 1, steps)
    if spacing == "karras":  # even in their RHO-th roots
        start, stop = most ** (1 / RHO), least ** (1 / RHO)
        return (start + ramp * (stop - start)) ** RHO
    if spacing == "exponential":
        return np.exp(np.linspace(math.log(most), math.log(least), steps))
    return least + betaincinv(BETA, BETA, 1 - ramp) * (most - least)


def _sgm_uniform(training: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the timesteps (steps,), fractional, and their levels."""
    t = np.linspace(len(training) - 1, 0, steps + 1)[:-1]
    return t, np.exp(np.interp(t, np.arange(len(training)), np.log(training)))


def timesteps_of(sigmas: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Return the timesteps of levels, interpolated in log sigma between those of training and clipped to its range."""
    logs, log = np.log(training), np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(logs, log, side="right") - 1, 0, len(logs) - 2)
    weight = np.clip((logs[low] - log) / (logs[low] - logs[low + 1]), 0, 1)
    return (1 - weight) * low + weight * (low + 1)
