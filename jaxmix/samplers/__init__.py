"""Samplers: start noise, guidance, solvers and the denoising loop, over any `ModelFn`."""

from jaxmix.samplers.choose import (
    SAMPLERS,
    SPACINGS,
    check_eta,
    check_settings,
    check_spacing,
    default_sampler,
    differences,
    is_sampler,
    known_sampler,
    make_solver,
    split_sampler,
)
from jaxmix.samplers.composable import Composed
from jaxmix.samplers.consistency import LCM, TCD
from jaxmix.samplers.fusion import SaliencyBlend, blend
from jaxmix.samplers.guidance import (
    Branches,
    BranchFn,
    ClassifierFree,
    Guidance,
    Unguided,
    by_branch,
    classifier_free_guidance,
    stack,
)
from jaxmix.samplers.inversion import DDIMInversion, invert
from jaxmix.samplers.latents import (
    FromImage,
    Inpaint,
    LatentEdit,
    Pin,
    image_to_image_start,
    inpaint,
    noised,
    pin,
)
from jaxmix.samplers.likeness import Likeness
from jaxmix.samplers.linear_multistep import LMS, PNDM
from jaxmix.samplers.loop import Phase, Solver, TwoCalls, level, sample
from jaxmix.samplers.multistep import DPMSolver2M
from jaxmix.samplers.noise import initial_noise, seed_array, step_noise
from jaxmix.samplers.renoise import Refined, ReNoise, renoised
from jaxmix.samplers.solvers import DDIM, Euler
from jaxmix.samplers.two_calls import DPMSolverSDE, Heun
from jaxmix.samplers.unipc import UniPC

__all__ = [
    "DDIM",
    "LCM",
    "LMS",
    "PNDM",
    "SAMPLERS",
    "SPACINGS",
    "TCD",
    "BranchFn",
    "Branches",
    "ClassifierFree",
    "Composed",
    "DDIMInversion",
    "DPMSolver2M",
    "DPMSolverSDE",
    "Euler",
    "FromImage",
    "Guidance",
    "Heun",
    "Inpaint",
    "LatentEdit",
    "Likeness",
    "Phase",
    "Pin",
    "ReNoise",
    "Refined",
    "SaliencyBlend",
    "Solver",
    "TwoCalls",
    "Unguided",
    "UniPC",
    "blend",
    "by_branch",
    "check_eta",
    "check_settings",
    "check_spacing",
    "classifier_free_guidance",
    "default_sampler",
    "differences",
    "image_to_image_start",
    "initial_noise",
    "inpaint",
    "invert",
    "is_sampler",
    "known_sampler",
    "level",
    "make_solver",
    "noised",
    "pin",
    "renoised",
    "sample",
    "seed_array",
    "split_sampler",
    "stack",
    "step_noise",
]
