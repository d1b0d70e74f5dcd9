"""Samplers by name."""

from jaxmix.command import near_misses
from jaxmix.samplers.loop import Solver
from jaxmix.samplers.multistep import DPMSolver2M
from jaxmix.samplers.solvers import DDIM, Euler
from jaxmix.schedule import NoiseSchedule
from jaxmix.types import InputError

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


def default_sampler(schedule: NoiseSchedule) -> str:
    """Return the name of the sampler that the schedule's config asks for, "ddim" if we have none like it."""
    karras = "_karras" if schedule.option("use_karras_sigmas", False) else ""
    if schedule.class_name == "EulerDiscreteScheduler":
        return "euler" + karras
    if schedule.class_name == "EulerAncestralDiscreteScheduler":
        return "euler_ancestral"
    if schedule.class_name == "DPMSolverMultistepScheduler":
        # The first-generation algorithms, "dpmsolver" and "sde-dpmsolver", map to their successors.
        sde = str(schedule.option("algorithm_type", "dpmsolver++")).startswith("sde")
        return "dpmpp_2m" + ("_sde" if sde else "") + karras
    return "ddim"
