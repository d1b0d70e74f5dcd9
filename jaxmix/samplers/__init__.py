"""Samplers: start noise, guidance, solvers and the denoising loop, over any `ModelFn`."""

from jaxmix.samplers.choose import SAMPLERS, default_sampler, differences, known_sampler, make_solver
from jaxmix.samplers.composable import Composed
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
from jaxmix.samplers.loop import Phase, Solver, sample
from jaxmix.samplers.multistep import DPMSolver2M
from jaxmix.samplers.noise import initial_noise, seed_array, step_noise
from jaxmix.samplers.renoise import Refined, ReNoise, renoised
from jaxmix.samplers.solvers import DDIM, Euler

__all__ = [
    "DDIM",
    "SAMPLERS",
    "BranchFn",
    "Branches",
    "ClassifierFree",
    "Composed",
    "DDIMInversion",
    "DPMSolver2M",
    "Euler",
    "FromImage",
    "Guidance",
    "Inpaint",
    "LatentEdit",
    "Likeness",
    "Phase",
    "Pin",
    "ReNoise",
    "Refined",
    "SaliencyBlend",
    "Solver",
    "Unguided",
    "blend",
    "by_branch",
    "classifier_free_guidance",
    "default_sampler",
    "differences",
    "image_to_image_start",
    "initial_noise",
    "inpaint",
    "invert",
    "known_sampler",
    "make_solver",
    "noised",
    "pin",
    "renoised",
    "sample",
    "seed_array",
    "stack",
    "step_noise",
]
