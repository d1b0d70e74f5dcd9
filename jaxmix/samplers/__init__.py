"""Samplers: start noise, guidance, solvers and the denoising loop, over any `ModelFn`."""

from jaxmix.samplers.choose import SAMPLERS, default_sampler, make_solver
from jaxmix.samplers.fusion import blend
from jaxmix.samplers.guidance import by_branch, classifier_free_guidance
from jaxmix.samplers.inversion import DDIMInversion, invert
from jaxmix.samplers.latents import image_to_image_start, inpaint, noised, pin
from jaxmix.samplers.loop import Phase, Solver, sample
from jaxmix.samplers.multistep import DPMSolver2M
from jaxmix.samplers.noise import initial_noise, seed_array, step_noise
from jaxmix.samplers.solvers import DDIM, Euler

__all__ = [
    "DDIM",
    "SAMPLERS",
    "DDIMInversion",
    "DPMSolver2M",
    "Euler",
    "Phase",
    "Solver",
    "blend",
    "by_branch",
    "classifier_free_guidance",
    "default_sampler",
    "image_to_image_start",
    "initial_noise",
    "inpaint",
    "invert",
    "make_solver",
    "noised",
    "pin",
    "sample",
    "seed_array",
    "step_noise",
]
