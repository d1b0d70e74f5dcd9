"""Samplers by name, with the spacings that each can have."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from jaxmix.command import near_misses
from jaxmix.samplers.consistency import LCM, TCD
from jaxmix.samplers.linear_multistep import LMS, PNDM
from jaxmix.samplers.loop import Solver
from jaxmix.samplers.multistep import DPMSolver2M
from jaxmix.samplers.sigmas import LEVEL_SPACINGS
from jaxmix.samplers.solvers import DDIM, Euler
from jaxmix.samplers.two_calls import DPMSolverSDE, Heun
from jaxmix.samplers.unipc import UniPC
from jaxmix.schedule import TIMESTEP_SPACINGS, NoiseSchedule
from jaxmix.schedulers import SCHEDULERS
from jaxmix.types import InputError, shown

SPACINGS = (*TIMESTEP_SPACINGS, *LEVEL_SPACINGS)
"""All spacings: of timesteps, and of noise levels."""


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How a solver is made, from a schedule and a number of steps, and the settings that it takes beside them."""

    make: Callable[..., Solver]
    spacings: tuple[str, ...] = SPACINGS
    eta: bool = False
    #: Whether the class of diffusers has `use_karras_sigmas` and the like.
    asks: bool = True


_KINDS: Mapping[str, _Kind] = {
    "ddim": _Kind(DDIM.create, TIMESTEP_SPACINGS, eta=True, asks=False),
    "euler": _Kind(Euler.create),
    "euler_ancestral": _Kind(partial(Euler.create, ancestral=True), asks=False),
    "heun": _Kind(Heun.create),
    "lms": _Kind(LMS.create),
    "dpmpp_2m": _Kind(DPMSolver2M.create),
    "dpmpp_2m_sde": _Kind(partial(DPMSolver2M.create, sde=True)),
    "dpmpp_sde": _Kind(DPMSolverSDE.create),
    "unipc": _Kind(UniPC.create),
    "pndm": _Kind(PNDM.create, TIMESTEP_SPACINGS, asks=False),
    "lcm": _Kind(LCM.create, (), asks=False),
    "tcd": _Kind(TCD.create, (), eta=True, asks=False),
}

SAMPLERS = tuple(_KINDS)
"""The names of the samplers; each may be followed by "_" and a spacing of levels that it has, as in "euler_karras"."""


def split_sampler(name: str) -> tuple[str, str | None]:
    """Return the sampler and the spacing of levels that a name stands for, None for the schedule's timesteps.

    Raises InputError for an unknown name.
    """
    for spacing in (None, *LEVEL_SPACINGS):
        base = name if spacing is None else name.removesuffix(f"_{spacing}")
        if base in _KINDS and (spacing is None or (base != name and spacing in _KINDS[base].spacings)):
            return base, spacing
    raise InputError(f"sampler {name!r} is not known{near_misses(name, _all_names())}")


def is_sampler(name: Any) -> bool:
    """Return whether a value is the name of a sampler, with or without a spacing."""
    return isinstance(name, str) and name in _all_names()


def _all_names() -> tuple[str, ...]:
    spaced = [f"{base}_{spacing}" for base, kind in _KINDS.items() for spacing in _levels(kind)]
    return (*SAMPLERS, *spaced)


def _levels(kind: _Kind) -> list[str]:
    return [spacing for spacing in LEVEL_SPACINGS if spacing in kind.spacings]


def make_solver(
    name: str, schedule: NoiseSchedule, steps: int, eta: float | None = None, spacing: str | None = None
) -> Solver:
    """Make the solver of that name for a run of `steps` steps.

    `eta`, from 0 to 1, is how noisy DDIM (by default 0) and TCD (0.3, the paper's gamma) are. `spacing` is one of
    SPACINGS; None is that of the name, or else the schedule's `timestep_spacing`. All other options come from the
    schedule's config. Raises InputError for an unknown name, impossible steps, settings and options that the sampler
    does not have.
    """
    base, own = split_sampler(name)
    check_settings(name, eta, spacing)
    kind, settings = _KINDS[base], dict[str, Any]()
    if eta is not None:
        settings["eta"] = eta
    if spacing in TIMESTEP_SPACINGS:
        schedule = dataclasses.replace(schedule, timestep_spacing=spacing)
    levels = own or (spacing if spacing in LEVEL_SPACINGS else None)
    if levels is not None:
        settings["spacing"] = levels
    elif spacing is not None and kind.asks:  # named, so that the config's own levels are not meant
        schedule = dataclasses.replace(schedule, extra=tuple(pair for pair in schedule.extra if pair[0] not in _ASKED))
    return kind.make(schedule, steps, **settings)


_ASKED = tuple(f"use_{spacing}_sigmas" for spacing in LEVEL_SPACINGS) + ("use_lu_lambdas",)


def check_settings(name: str, eta: Any = None, spacing: Any = None) -> None:
    """Raise InputError for settings that are out of range, or that the sampler of that name does not have."""
    base, own = split_sampler(name)
    check_eta("eta", eta)
    check_spacing("spacing", spacing)
    kind = _KINDS[base]
    if eta is not None and not kind.eta:
        having = " or ".join(other for other, found in _KINDS.items() if found.eta)
        raise InputError(f"eta: found {shown(eta)} with the sampler {name}, which has none: expected {having}")
    if spacing is not None and spacing not in kind.spacings:
        expected = f"one of {', '.join(kind.spacings)}" if kind.spacings else "none: it has timesteps of its own"
        raise InputError(f"spacing: found {spacing!r} with the sampler {name}, expected {expected}")
    if None not in (own, spacing) and own != spacing:
        raise InputError(f"spacing: found {spacing!r} with the sampler {name}, expected {base}, or no spacing")


def check_eta(key: str, value: Any) -> None:
    """Raise InputError, which calls it `key`, unless a value is None or a number from 0 to 1."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
    if value is not None and not number:
        raise InputError(f"{key}: found {shown(value)}, expected a number from 0 to 1")


def check_spacing(key: str, value: Any) -> None:
    """Raise InputError, which calls it `key`, unless a value is None or one of SPACINGS."""
    if value is not None and not (isinstance(value, str) and value in SPACINGS):
        raise InputError(f"{key}: found {shown(value)}, expected one of {', '.join(SPACINGS)}")


def known_sampler(name: Any) -> str:
    """Return the name of a sampler, which may also be the class of diffusers that is the same solver.

    Raises InputError for any other, and for a class without its solver here, with the name of the nearest.
    """
    if is_sampler(name):
        return name
    same = SCHEDULERS.get(name) if isinstance(name, str) else None
    if same is not None and same.exact:
        return same.sampler
    nearest = "" if same is None else f" (the nearest to it is {same.sampler})"
    spaced = f"{', '.join(SAMPLERS)}, some also with _{', _'.join(LEVEL_SPACINGS)}"
    raise InputError(f"sampler: found {shown(name)}, expected one of {spaced}{nearest}")


def default_sampler(schedule: NoiseSchedule) -> str:
    """Return the name of the sampler that the schedule's config asks for, or of the one that is most like it."""
    name = SCHEDULERS[schedule.class_name].sampler
    # The first-generation algorithms, "dpmsolver" and "sde-dpmsolver", map to their successors.
    if name == "dpmpp_2m" and str(schedule.option("algorithm_type", "")).startswith("sde"):
        name = "dpmpp_2m_sde"
    spacing = next((s for s in LEVEL_SPACINGS if schedule.option(f"use_{s}_sigmas", False)), None)
    return f"{name}_{spacing}" if spacing is not None and _KINDS[name].asks else name


def differences(schedule: NoiseSchedule) -> str:
    """Say in one line how `default_sampler` differs from what the schedule's config asks for, "" if it does not."""
    name, kind = default_sampler(schedule), schedule.class_name
    if not SCHEDULERS[kind].exact:
        return (
            f"there is no {kind} here: its noise schedule is used, with the sampler {name} (name another to change it)"
        )
    base, spacing = split_sampler(name)
    lacking = {key: True for key in ("thresholding", "use_lu_lambdas") if schedule.option(key, False)}
    if spacing is not None:
        lacking.pop("use_lu_lambdas", None)
    kinds: dict[str, tuple[Any, ...]] = {}
    if base.startswith("euler"):
        kinds = {"interpolation_type": ("linear",), "timestep_type": ("discrete",)}
    elif base.startswith("dpmpp_2m"):
        kinds = {"solver_order": (1, 2), "algorithm_type": ("dpmsolver++", "sde-dpmsolver++")}
    elif base == "unipc":
        kinds = {"solver_order": (1, 2, 3), "predict_x0": (True,), "solver_p": (None,)}
    asked = {key: schedule.option(key, known[0]) for key, known in kinds.items()}
    if base == "pndm":
        kinds["skip_prk_steps"], asked["skip_prk_steps"] = (True,), schedule.option("skip_prk_steps", False)
    lacking |= {key: value for key, value in asked.items() if value not in kinds[key]}
    said = ", ".join(f"{key}={shown(value)}" for key, value in lacking.items())
    return f"the sampler {name} does without what the {kind} has: {said}" if lacking else ""
