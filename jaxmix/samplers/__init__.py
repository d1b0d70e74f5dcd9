"""Samplers: start noise, guidance, solvers and the denoising loop, over any `ModelFn`."""

from jaxmix.samplers.choose import SAMPLERS, default_sampler, make_solver
from jaxmix.samplers.guidance import classifier_free_guidance
from jaxmix.samplers.latents import image_to_image_start, inpaint, noised
from jaxmix.samplers.loop import Phase, Solver, sample
from jaxmix.samplers.multistep import DPMSolver2M
from jaxmix.samplers.noise import initial_noise, seed_array, step_noise
from jaxmix.samplers.solvers import DDIM, Euler

__all__ = [
    "DDIM",
    "SAMPLERS",
    "DPMSolver2M",
    "Euler",
    "Phase",
    "Solver",
    "classifier_free_guidance",
    "default_sampler",
    "image_to_image_start",
    "initial_noise",
    "inpaint",
    "make_solver",
    "noised",
    "sample",
    "seed_array",
    "step_noise",
]
