"""The noise schedule of a diffusion model, read from a diffusers `scheduler_config.json`.

x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps. The tables are computed in the order and the precision in which torch
diffusers computes them, so that alphas_cumprod agrees bit for bit and trajectories can be compared.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.schedulers import HARMLESS, NUMBERS, SCHEDULERS, SNR_SHIFT, other_noise
from jaxmix.types import InputError, note, shown

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")

CLASS_KEY, FLOW_KEY = "_class_name", "use_flow_sigmas"
_MOST_TIMESTEPS, _LARGEST = 100_000, 1e9  # far above what any model has


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """A discrete variance-preserving noise schedule with the fields of diffusers' DDIMScheduler.

    `timestep_spacing` None is each solver's own default, as in diffusers: "leading" for DDIM, "linspace" for Euler and
    DPM-Solver. `rescale_betas_zero_snr` shifts the betas so that abar is 0 at the last timestep (arXiv 2305.08891,
    Algorithm 1); an epsilon prediction carries no information about x0 there.

    Timesteps `t` are integers in [0, num_train_timesteps). The object is hashable and holds no arrays, so it can be a
    static argument of `jax.jit`. The array methods take `t` as a scalar or (b,), x0, noise, x and pred as (b, ...),
    compute in float32 and return float32.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    rescale_betas_zero_snr: bool = False
    class_name: str = "DDIMScheduler"
    extra: tuple[tuple[str, str], ...] = ()  # other keys with their JSON values, written back by to_config
    lenient: bool = False  # a solver leaves out the options that it lacks, instead of refusing them; not in configs

    def __post_init__(self) -> None:
        _check_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        _check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        if self.timestep_spacing is not None:
            _check_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        _check_class(self.class_name)
        for key in ("num_train_timesteps", "steps_offset"):
            value, least = getattr(self, key), 0 if key == "steps_offset" else 1
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST_TIMESTEPS:
                raise InputError(
                    f"scheduler config: {key} is {shown(value)}, expected an integer from {least} to {_MOST_TIMESTEPS}"
                )
        for key in ("clip_sample", "set_alpha_to_one", "rescale_betas_zero_snr"):
            if not isinstance(getattr(self, key), bool):
                raise InputError(f"scheduler config: {key} is {getattr(self, key)!r}, expected true or false")
        for key in ("beta_start", "beta_end", "clip_sample_range"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _LARGEST:
                raise InputError(f"scheduler config: {key} is {shown(value)}, expected a number > 0")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise InputError(
                f"scheduler config: trained_betas has {len(self.trained_betas)} values, "
                f"expected num_train_timesteps = {self.num_train_timesteps}"
            )
        betas = self._betas_before_rescaling()
        if not (np.all(betas > 0) and np.all(betas < 1)):
            raise InputError(
                f"scheduler config: betas run from {betas.min():g} to {betas.max():g} "
                f"(beta_start, beta_end or trained_betas), expected every beta in (0, 1)"
            )
        if self.rescale_betas_zero_snr and self.num_train_timesteps < 2:
            raise InputError("scheduler config: rescale_betas_zero_snr with num_train_timesteps 1, expected at least 2")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], notes: list[str] | None = None) -> "NoiseSchedule":
        """Build the schedule that a diffusers `scheduler_config.json` describes.

        Missing keys and null take the class's defaults. Keys that are not known here change nothing and are kept; they
        are added to `notes`, or warned about in one `CheckpointWarning` if it is None. Raises InputError naming the key
        for an unsupported value, and for a class whose noise schedule is not one of betas.
        """
        if not isinstance(config, Mapping):
            raise InputError(f"scheduler config: found {type(config).__name__}, expected a JSON object")
        class_name = config.get(CLASS_KEY) or "DDIMScheduler"
        _check_class(class_name)
        known = {field.name for field in dataclasses.fields(cls)} - {"class_name", "extra", "lenient"}
        fields: dict[str, Any] = {"class_name": class_name, "clip_sample": SCHEDULERS[class_name].clips}
        fields |= SCHEDULERS[class_name].defaults
        extra, unknown = {}, []
        for key, value in config.items():
            if key == CLASS_KEY or (key in known and value is None):
                continue
            if key in known:
                fields[key] = value
                continue
            if key == FLOW_KEY and value:
                raise InputError(
                    f"scheduler config: {key} is {value!r}, expected false: flow matching is not supported"
                )
            if key in NUMBERS and value is not None:
                _check_number(key, value)
            extra[key] = json.dumps(value)
            if not (key.startswith("_") or key in HARMLESS or value is None):
                unknown.append(f"{key}={shown(value)}")
        if unknown:
            note(f"unknown keys are ignored: {', '.join(sorted(unknown))}", notes, "scheduler config")
        if fields.get("trained_betas") is not None:
            try:
                fields["trained_betas"] = tuple(float(beta) for beta in fields["trained_betas"])
            except (TypeError, ValueError, OverflowError):
                found = shown(fields["trained_betas"])
                raise InputError(f"scheduler config: trained_betas is {found}, expected a list of numbers") from None
        return cls(**fields, extra=tuple(sorted(extra.items())))

    def to_config(self) -> dict[str, Any]:
        """Return the `scheduler_config.json` dict, with the class name and the harmless keys it was read from."""
        config: dict[str, Any] = {"_class_name": self.class_name}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("class_name", "extra", "lenient") and (field.name, value) != (
                "timestep_spacing",
                None,
            ):
                config[field.name] = value
        if self.trained_betas is not None:
            config["trained_betas"] = list(self.trained_betas)
        return config | {key: json.loads(value) for key, value in self.extra}

    def option(self, key: str, default: Any) -> Any:
        """Return the config's value of a solver option that is not a field, such as `solver_order`.

        A missing key or null gives the default.
        """
        for name, value in self.extra:
            if name == key and value != "null":
                return json.loads(value)
        return default

    @functools.cached_property
    def betas(self) -> np.ndarray:
        """The noise variances beta_t, float32 (T,); the last is 1 under `rescale_betas_zero_snr`."""
        betas = self._betas_before_rescaling()
        if not self.rescale_betas_zero_snr:
            return betas
        # arXiv 2305.08891, Algorithm 1, in float32 as torch computes it.
        signal = np.sqrt(_cumprod(np.float32(1) - betas))
        first, last = signal[0], signal[-1]
        signal = (signal - last) * (first / (first - last))
        abar = signal * signal
        return np.float32(1) - np.concatenate([abar[:1], abar[1:] / abar[:-1]])

    def _betas_before_rescaling(self) -> np.ndarray:
        if self.trained_betas is not None:
            return np.asarray(self.trained_betas, np.float32)
        steps = self.num_train_timesteps
        if self.beta_schedule == "linear":
            return _linspace(self.beta_start, self.beta_end, steps)
        if self.beta_schedule == "scaled_linear":
            return _linspace(self.beta_start**0.5, self.beta_end**0.5, steps) ** 2
        if self.beta_schedule == "sigmoid":
            rising = 1 / (1 + np.exp(-_linspace(-6.0, 6.0, steps)))
            return (rising * (self.beta_end - self.beta_start) + self.beta_start).astype(np.float32)
        abar = [_ABAR[self.beta_schedule](i / steps) for i in range(steps + 1)]
        return np.asarray([min(1 - abar[i + 1] / abar[i], 0.999) for i in range(steps)], np.float32)

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """The signal variances abar_t, the product of 1 - beta up to t, float32 (T,)."""
        scale = self.option("snr_shift_scale", SNR_SHIFT[self.class_name]) if self.class_name in SNR_SHIFT else 1.0
        if scale == 1.0:
            return _cumprod(np.float32(1) - self.betas)
        abar = _cumprod(np.float32(1) - self._betas_before_rescaling())
        abar = abar / (np.float32(scale) + np.float32(1 - scale) * abar)
        if self.rescale_betas_zero_snr:
            signal = np.sqrt(abar)
            abar = ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2
        return abar

    @property
    def final_alpha_cumprod(self) -> np.float32:
        """The abar that the last sampling step moves to."""
        return np.float32(1) if self.set_alpha_to_one else self.alphas_cumprod[0]

    def timesteps(self, steps: int) -> np.ndarray:
        """Return the timesteps of a DDIM run of `steps` steps in the order visited, int32 (steps,), descending.

        Spacings are those of arXiv 2305.08891, Table 2, rounded as diffusers does. `steps_offset` applies to `leading`
        only. Raises InputError if steps is not in [1, num_train_timesteps].
        """
        total = self.check_steps(steps)
        if self.timestep_spacing == "linspace":
            grid = np.linspace(0, total - 1, steps).round()[::-1]
        elif self.timestep_spacing == "trailing":
            # Rounding may make arange one element too long, which would be timestep -1.
            grid = np.round(np.arange(total, 0, -total / steps))[:steps] - 1
        else:
            grid = (np.arange(steps) * (total // steps))[::-1] + self.steps_offset
        self.check_first_timestep(steps, grid[0])
        return grid.astype(np.int32)

    def check_steps(self, steps: int) -> int:
        """Return num_train_timesteps; raises InputError if steps is not an integer from 1 to it."""
        total = self.num_train_timesteps
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= total:
            raise InputError(f"steps is {steps!r}, expected an integer from 1 to {total}")
        return total

    def check_first_timestep(self, steps: int, first: float) -> None:
        """Raise InputError if `steps_offset` pushes the first timestep of a run past the schedule."""
        if first >= self.num_train_timesteps:
            raise InputError(
                f"steps is {steps} with steps_offset {self.steps_offset}: the first timestep would be {int(first)}, "
                f"expected at most {self.num_train_timesteps - 1}; take fewer steps"
            )

    def add_noise(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """Return x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise."""
        signal, sigma = self._coefficients(t, x0)
        return signal * _f32(x0) + sigma * _f32(noise)

    def velocity(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """Return v_t = sqrt(abar_t) noise - sqrt(1 - abar_t) x0 (arXiv 2202.00512, appendix D)."""
        signal, sigma = self._coefficients(t, x0)
        return signal * _f32(noise) - sigma * _f32(x0)

    def target(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """Return what a model of this prediction type learns to output at (x_t, t)."""
        if self.prediction_type == "epsilon":
            return _f32(noise)
        if self.prediction_type == "sample":
            return _f32(x0)
        return self.velocity(x0, noise, t)

    def to_x0(self, pred: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Return the x0 that a model output `pred` at (x, t) implies, unclipped."""
        signal, sigma = self._coefficients(t, x)
        return prediction_to_x0(self.prediction_type, _f32(pred), _f32(x), signal, sigma)

    def to_eps(self, pred: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Return the noise that a model output `pred` at (x, t) implies."""
        signal, sigma = self._coefficients(t, x)
        return prediction_to_eps(self.prediction_type, _f32(pred), _f32(x), signal, sigma)

    def snr(self, t: jax.Array) -> jax.Array:
        """Return the signal-to-noise ratio abar_t / (1 - abar_t), float32, shape of t."""
        abar = jnp.asarray(self.alphas_cumprod)[t]
        return abar / (1 - abar)

    def _coefficients(self, t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply x."""
        abar = jnp.asarray(self.alphas_cumprod)[t]
        abar = abar.reshape(abar.shape + (1,) * (x.ndim - abar.ndim))
        return jnp.sqrt(abar), jnp.sqrt(1 - abar)


def prediction_to_x0(
    prediction_type: str, pred: jax.Array, x: jax.Array, signal: jax.Array, sigma: jax.Array
) -> jax.Array:
    """Return x0 from a prediction at x = signal x0 + sigma eps, where signal = sqrt(abar), sigma = sqrt(1 - abar).

    A v prediction is turned into x0 directly: going through eps would divide by signal, which is nearly zero at the
    last timesteps of a cosine schedule.
    """
    if prediction_type == "epsilon":
        return (x - sigma * pred) / signal
    if prediction_type == "sample":
        return pred
    return signal * x - sigma * pred


def prediction_to_eps(
    prediction_type: str, pred: jax.Array, x: jax.Array, signal: jax.Array, sigma: jax.Array
) -> jax.Array:
    """Return eps from a prediction at x = signal x0 + sigma eps."""
    if prediction_type == "epsilon":
        return pred
    if prediction_type == "sample":
        return (x - signal * pred) / sigma
    return signal * pred + sigma * x


def _laplace(t: float) -> float:
    """Return the abar of diffusers' "laplace" schedule at t in [0, 1]."""
    half = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-6)
    return math.sqrt(math.exp(half) / (1 + math.exp(half)))


_ABAR: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2,
    "laplace": _laplace,
    "exp": lambda t: math.exp(-12.0 * t),
}


def _f32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _cumprod(alphas: np.ndarray) -> np.ndarray:
    # On the CPU torch.cumprod accumulates float32 in float64 and rounds every entry once.
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _linspace(start: float, end: float, steps: int) -> np.ndarray:
    """Return an even float32 grid, built from both ends as torch.linspace does."""
    start32, end32 = np.float32(start), np.float32(end)
    if steps == 1:
        return np.asarray([start32], np.float32)
    step = (end32 - start32) / np.float32(steps - 1)
    index = np.arange(steps)
    # The sum is rounded once (a fused multiply-add in torch), hence float64 inside.
    rising = np.float64(start32) + np.float64(step) * index
    falling = np.float64(end32) - np.float64(step) * (steps - 1 - index)
    return np.where(index < steps // 2, rising, falling).astype(np.float32)


def _check_class(found: Any) -> None:
    if isinstance(found, str) and found in SCHEDULERS:
        return
    if isinstance(found, str) and (kind := other_noise(found)):
        raise InputError(f"scheduler config: {found} has {kind}, expected a scheduler whose noise schedule is of betas")
    raise InputError(
        f"scheduler config: _class_name is {shown(found)}, expected a scheduler of diffusers such as DDIMScheduler or "
        "EulerDiscreteScheduler"
    )


def _check_number(key: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and NUMBERS[key] <= value < _LARGEST):
        raise InputError(f"scheduler config: {key} is {shown(value)}, expected a number of at least {NUMBERS[key]:g}")


def _check_choice(key: str, found: Any, expected: tuple[str, ...]) -> None:
    if not isinstance(found, str) or found not in expected:
        raise InputError(f"scheduler config: {key} is {found!r}, expected one of {', '.join(expected)}")
