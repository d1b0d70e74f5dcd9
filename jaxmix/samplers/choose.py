"""Samplers by name."""

from typing import Any

from jaxmix.command import near_misses
from jaxmix.samplers.loop import Solver
from jaxmix.samplers.multistep import DPMSolver2M
from jaxmix.samplers.sigmas import UNSUPPORTED
from jaxmix.samplers.solvers import DDIM, Euler
from jaxmix.schedule import NoiseSchedule
from jaxmix.schedulers import SCHEDULERS
from jaxmix.types import InputError, shown

SAMPLERS = (
    "ddim",
    "euler",
    "euler_karras",
    "euler_ancestral",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_karras",
)


def make_solver(name: str, schedule: NoiseSchedule, steps: int) -> Solver:
    """Make the solver of that name for a run of `steps` steps.

    The name picks the solver and Karras levels; all other options come from the schedule's config. Raises InputError
    for an unknown name, impossible steps, and options that the sampler does not have.
    """
    if name not in SAMPLERS:
        raise InputError(f"sampler {name!r} is not known{near_misses(name, SAMPLERS)}")
    kind, karras = name.removesuffix("_karras"), name.endswith("_karras")
    if kind == "ddim":
        return DDIM.create(schedule, steps)
    if kind.startswith("euler"):
        return Euler.create(schedule, steps, ancestral=kind == "euler_ancestral", karras=karras)
    return DPMSolver2M.create(schedule, steps, sde=kind == "dpmpp_2m_sde", karras=karras)


def known_sampler(name: Any) -> str:
    """Return the name of a sampler, which may also be the class of diffusers that is the same solver.

    Raises InputError for any other, and for a class without its solver here, with the name of the nearest.
    """
    if isinstance(name, str) and name in SAMPLERS:
        return name
    same = SCHEDULERS.get(name) if isinstance(name, str) else None
    if same is not None and same.exact:
        return same.sampler
    nearest = "" if same is None else f" (the nearest to it is {same.sampler})"
    raise InputError(f"sampler: found {shown(name)}, expected one of {', '.join(SAMPLERS)}{nearest}")


def default_sampler(schedule: NoiseSchedule) -> str:
    """Return the name of the sampler that the schedule's config asks for, or of the one that is most like it."""
    name = SCHEDULERS[schedule.class_name].sampler
    # The first-generation algorithms, "dpmsolver" and "sde-dpmsolver", map to their successors.
    if name == "dpmpp_2m" and str(schedule.option("algorithm_type", "")).startswith("sde"):
        name = "dpmpp_2m_sde"
    karras = name + "_karras"
    return karras if schedule.option("use_karras_sigmas", False) and karras in SAMPLERS else name


def differences(schedule: NoiseSchedule) -> str:
    """Say in one line how `default_sampler` differs from what the schedule's config asks for, "" if it does not."""
    name, kind = default_sampler(schedule), schedule.class_name
    if not SCHEDULERS[kind].exact:
        return (
            f"there is no {kind} here: its noise schedule is used, with the sampler {name} (name another to change it)"
        )
    lacking = {key: True for key in ("thresholding", *UNSUPPORTED) if schedule.option(key, False)}
    if name.endswith("_karras"):
        lacking = {key: True for key in lacking if key == "thresholding"}
    kinds = {"interpolation_type": ("linear",), "timestep_type": ("discrete",)} if name.startswith("euler") else {}
    if name.startswith("dpmpp"):
        kinds = {"solver_order": (1, 2), "algorithm_type": ("dpmsolver++", "sde-dpmsolver++")}
    asked = {key: schedule.option(key, known[0]) for key, known in kinds.items()}
    lacking |= {key: value for key, value in asked.items() if value not in kinds[key]}
    said = ", ".join(f"{key}={shown(value)}" for key, value in lacking.items())
    return f"the sampler {name} does without what the {kind} has: {said}" if lacking else ""
