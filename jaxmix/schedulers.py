"""The scheduler classes of diffusers 0.42: what each takes for granted, and which of our samplers is the nearest.

Plain data. A `scheduler_config.json` names the class; its noise schedule belongs to the model, its solver is a
preference of its author.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class SchedulerClass:
    """One class of diffusers.

    `sampler` is the name of ours that is the same solver, or if not `exact` the nearest; "_karras" is added for
    `use_karras_sigmas`, and so on, where the class has it. `clips`: whether the class clips x0 unless its config says
    otherwise. `defaults` are those of its keys that differ from DDIMScheduler's.
    """

    sampler: str = "ddim"
    exact: bool = False
    clips: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_LATENT = {"beta_start": 0.00085, "beta_end": 0.012}
_DISTILLED = {**_LATENT, "beta_schedule": "scaled_linear"}

SCHEDULERS: dict[str, SchedulerClass] = {
    "DDIMScheduler": SchedulerClass(exact=True, clips=True),
    "DDIMParallelScheduler": SchedulerClass(exact=True, clips=True),
    "DDIMInverseScheduler": SchedulerClass(clips=True),
    "DDPMScheduler": SchedulerClass(clips=True),
    "DDPMParallelScheduler": SchedulerClass(clips=True),
    "PNDMScheduler": SchedulerClass("pndm", exact=True, defaults={"set_alpha_to_one": False}),
    "RePaintScheduler": SchedulerClass(clips=True),
    "UnCLIPScheduler": SchedulerClass(clips=True, defaults={"beta_schedule": "squaredcos_cap_v2"}),
    "CogVideoXDDIMScheduler": SchedulerClass(clips=True, defaults=_DISTILLED),
    "CogVideoXDPMScheduler": SchedulerClass(clips=True, defaults=_DISTILLED),
    "TCDScheduler": SchedulerClass("tcd", exact=True, defaults=_DISTILLED),
    "LCMScheduler": SchedulerClass("lcm", exact=True, defaults=_DISTILLED),
    "EulerDiscreteScheduler": SchedulerClass("euler", exact=True),
    "EulerAncestralDiscreteScheduler": SchedulerClass("euler_ancestral", exact=True),
    "HeunDiscreteScheduler": SchedulerClass("heun", exact=True, defaults=_LATENT),
    "KDPM2DiscreteScheduler": SchedulerClass("heun", defaults=_LATENT),
    "KDPM2AncestralDiscreteScheduler": SchedulerClass("euler_ancestral", defaults=_LATENT),
    "LMSDiscreteScheduler": SchedulerClass("lms", exact=True),
    "DPMSolverMultistepScheduler": SchedulerClass("dpmpp_2m", exact=True),
    "DPMSolverMultistepInverseScheduler": SchedulerClass("dpmpp_2m"),
    "DPMSolverSinglestepScheduler": SchedulerClass("dpmpp_2m"),
    "DEISMultistepScheduler": SchedulerClass("dpmpp_2m"),
    "UniPCMultistepScheduler": SchedulerClass("unipc", exact=True),
    "DPMSolverSDEScheduler": SchedulerClass("dpmpp_sde", exact=True, defaults=_LATENT),
    "SASolverScheduler": SchedulerClass("dpmpp_2m_sde"),
}
"""Every class whose noise schedule is one of betas."""

OTHER_NOISE = {
    "Flow": "flow matching",
    "EDM": "the EDM noise schedule",
    "Cosine": "the EDM noise schedule",
    "CMStochastic": "a consistency model's own noise levels",
    "KarrasVe": "a variance-exploding process",
    "ScoreSde": "a stochastic differential equation",
    "IPNDM": "a schedule of angles",
    "LTX": "flow matching",
    "Helios": "flow matching",
}
"""What the other classes have, by how their names begin."""

SNR_SHIFT = {"CogVideoXDDIMScheduler": 3.0, "CogVideoXDPMScheduler": 3.0}
"""The default `snr_shift_scale` of the classes that divide the signal-to-noise ratio by it."""

HARMLESS = frozenset(
    {
        "algorithm_type",
        "corrector_order",
        "disable_corrector",
        "dynamic_thresholding_ratio",
        "eta",
        "euler_at_final",
        "final_sigmas_type",
        "flow_shift",
        "interpolation_type",
        "lambda_min_clipped",
        "lower_order_final",
        "noise_sampler_seed",
        "original_inference_steps",
        "predict_x0",
        "predictor_order",
        "sample_max_value",
        "shift_terminal",
        "sigma_max",
        "sigma_min",
        "skip_prk_steps",
        "snr_shift_scale",
        "solver_order",
        "solver_p",
        "solver_type",
        "tau_func",
        "thresholding",
        "time_shift_type",
        "timestep_scaling",
        "timestep_type",
        "use_beta_sigmas",
        "use_dynamic_shifting",
        "use_exponential_sigmas",
        "use_flow_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
        "variance_type",
    }
)
"""Keys that choose or tune a solver; a solver asks for them with `NoiseSchedule.option`."""


NUMBERS = {
    "lambda_min_clipped": -math.inf,
    "sigma_max": 1e-9,
    "sigma_min": 1e-9,
    "snr_shift_scale": 1e-9,
    "timestep_scaling": 1e-9,
}
"""Those of them that are numbers, and the least that they may be."""


def other_noise(name: str) -> str | None:
    """Return what a class of diffusers without betas has for a noise schedule, None for a name that is not known."""
    return next((kind for prefix, kind in OTHER_NOISE.items() if name.startswith(prefix)), None)
