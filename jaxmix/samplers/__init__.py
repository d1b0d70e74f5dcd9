"""Samplers: start noise, guidance, solvers and the denoising loop, over any `ModelFn`."""

from jaxmix.samplers.guidance import classifier_free_guidance
from jaxmix.samplers.loop import Phase, sample
from jaxmix.samplers.noise import initial_noise, seed_array, step_noise
from jaxmix.samplers.solvers import DDIM

__all__ = ["DDIM", "Phase", "classifier_free_guidance", "initial_noise", "sample", "seed_array", "step_noise"]
