"""The solvers of `jaxmix.samplers` beyond DDIM, Euler and DPM++ 2M, and all spacings, against torch diffusers'.

Trajectories around the fixed model of `test_sampler_parity`, 1e-5 relative after every step.
"""

import importlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.samplers import (
    SAMPLERS,
    Phase,
    by_branch,
    classifier_free_guidance,
    default_sampler,
    differences,
    make_solver,
    sample,
)
from jaxmix.schedule import NoiseSchedule
from tests.parity.test_sampler_parity import BETAS, DPM, EULER, GRIDS, MILD, SDE, STEPS, small_model, worst

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

CLASSES = {  # sampler -> class, what its config says
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "euler": (EULER, {}),
    "dpmpp_2m": (DPM, {}),
    "dpmpp_2m_sde": (DPM, SDE),
}
NEW = ("heun", "lms", "dpmpp_sde", "unipc", "pndm")
PREDICTED = [
    (name, kind)
    for name in NEW
    for kind in ("epsilon", "v_prediction", "sample")
    if (name, kind) not in (("pndm", "sample"), ("dpmpp_sde", "sample"))  # which diffusers' classes refuse
]
LEVELS = ("karras", "exponential", "beta")
SPACED = ("euler", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc")


def scheduler_class(kind):
    """Return a class of diffusers; that of DPM++ SDE without torchsde, whose noise is replaced here."""
    if kind != "DPMSolverSDEScheduler":
        return getattr(diffusers, kind)
    sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    return getattr(importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde"), kind)


def draws(steps):
    """Return start noise, contexts of (image, branch), and the noise of every call of the model."""
    draw = np.random.default_rng(1).normal
    x, context = draw(size=(3, 4, 4, 4)).astype("f4"), draw(size=(3, 2, 3)).astype("f4")
    return x, context, draw(size=(2 * steps, *x.shape)).astype("f4")


def pair(name, config, steps=STEPS):
    """Return our solver and torch's scheduler of one config, which is all that ours knows."""
    kind, own = CLASSES[name]
    config = BETAS | own | config
    scheduler = scheduler_class(kind)(**config)
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_config({"_class_name": kind} | config)
    chosen = default_sampler(schedule)
    assert chosen.startswith(name)
    assert not differences(schedule)
    return make_solver(chosen, schedule, steps), scheduler


@jax.jit
def jax_run(solver, x, context, noises, scale):
    """Return the states after every step."""
    rows = context.reshape(-1, context.shape[-1])
    guided = classifier_free_guidance(by_branch(lambda x, t, step: small_model(jnp, x, t, rows), 2), scale)
    last, starts = sample(
        [Phase(guided, 0, solver.steps)],
        solver,
        x * solver.init_scale,
        record=lambda x, pred, i: x,
        noise_fn=lambda i: noises[i],
    )
    return jnp.concatenate([starts[1:], last[None]])


def torch_run(scheduler, steps, monkeypatch, noises, scale, **settings):
    """Return the states after every step, as the model sees them; `noises` are those of the calls, in order."""
    x, context, _ = draws(steps)
    left = iter(torch.from_numpy(noises))
    module = sys.modules[type(scheduler).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(left))
    scheduler.noise_sampler = lambda *args: next(left)
    x = torch.from_numpy(x) * scheduler.init_noise_sigma
    states = []
    with torch.no_grad():
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t)
            uncond, cond = (small_model(torch, seen, float(t), torch.from_numpy(context[:, b])) for b in (0, 1))
            x = scheduler.step(uncond + scale * (cond - uncond), t, x, **settings).prev_sample
            # Whole steps only: between them Heun and DPM++ SDE are in the middle of one, and PNDM's first comes twice.
            last = t == scheduler.timesteps[-1] and len(states) == steps - 1
            if last or (getattr(scheduler, "state_in_first_order", True) and getattr(scheduler, "counter", 0) != 1):
                scaled = hasattr(scheduler, "sigmas") and "multistep" not in type(scheduler).__module__
                sigma = scheduler.sigmas[scheduler.step_index] if scaled else 0
                states.append((x / (sigma**2 + 1) ** 0.5).numpy())
    return np.stack(states)


def both(name, config, monkeypatch, steps=STEPS, scale=MILD, **settings):
    solver, scheduler = pair(name, config, steps)
    if settings:
        solver = make_solver(name, NoiseSchedule.from_config({"_class_name": CLASSES[name][0]} | BETAS | config), steps,
                             **settings)  # fmt: skip
    x, context, noises = draws(steps)
    used = noises if name == "dpmpp_sde" else noises[:steps]
    theirs = torch_run(scheduler, steps, monkeypatch, used, scale, **settings)
    return jax_run(solver, x, context, noises, scale), theirs


def test_every_sampler_is_compared_here_or_there_and_is_the_default_of_its_class():
    from tests.parity.test_sampler_parity import OTHERS

    assert set(SAMPLERS) <= {"ddim", *OTHERS, *CLASSES}
    for name, (kind, own) in CLASSES.items():
        assert default_sampler(NoiseSchedule.from_config({"_class_name": kind} | own)) == name


@pytest.mark.parametrize(("name", "prediction_type"), PREDICTED)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_trajectories_agree(name, prediction_type, grid, monkeypatch):
    # Where x0 is predicted, eps is what is left of x at its last, small sigma: at scale 3 both lose 5e-6 in LMS,
    # measured against float64.
    scale = 1.0 if prediction_type == "sample" else MILD
    assert worst(*both(name, grid | {"prediction_type": prediction_type}, monkeypatch, scale=scale)) <= 1e-5


@pytest.mark.parametrize("name", SPACED)
@pytest.mark.parametrize("spacing", LEVELS)
@pytest.mark.parametrize("grid", [{}, GRIDS["leading, offset 1"]], ids=["linspace", "leading"])
def test_trajectories_on_every_spacing_of_levels_agree(name, spacing, grid, monkeypatch):
    config = grid | {f"use_{spacing}_sigmas": True}
    solver, scheduler = pair(name, config)
    first = scheduler.timesteps if name != "dpmpp_sde" else scheduler.timesteps[::2]
    ours = np.asarray(solver.timesteps)
    np.testing.assert_allclose(ours, list(dict.fromkeys(first.tolist())) if name == "heun" else first, rtol=1e-6)
    assert worst(*both(name, config, monkeypatch)) <= 1e-5


@pytest.mark.parametrize("name", ["lcm", "tcd"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_steps_of_distilled_models_agree(name, prediction_type, monkeypatch):
    config = {"prediction_type": prediction_type}
    for steps in (1, 4, 7):
        assert worst(*both(name, config, monkeypatch, steps)) <= 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.7, 1.0])
def test_gamma_of_tcd_agrees(eta, monkeypatch):
    assert worst(*both("tcd", {}, monkeypatch, 4, eta=eta)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "config", "steps"),
    [
        ("unipc", {"solver_order": 3}, STEPS),
        ("unipc", {"solver_order": 1}, STEPS),
        ("unipc", {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"}, STEPS),
        ("unipc", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, STEPS),
        ("unipc", {"solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"}, STEPS),
        ("unipc", {"disable_corrector": [0, 3]}, STEPS),
        ("unipc", {"solver_type": "midpoint"}, 5),
        ("unipc", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "sigma_min": 0.1}, STEPS),
        ("unipc", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
         STEPS),
        ("heun", {"clip_sample": True, "prediction_type": "sample"}, STEPS),
        ("pndm", {"set_alpha_to_one": True}, STEPS),
        ("pndm", {"steps_offset": 1}, 1),
        ("pndm", {"steps_offset": 1}, 2),
        ("lms", {}, 3),
        ("heun", {}, 1),
        ("lcm", {"original_inference_steps": 20, "timestep_scaling": 0.1}, 4),
        ("lcm", {"clip_sample": True, "clip_sample_range": 0.5}, 4),
        ("lcm", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, 4),
        ("tcd", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, 4),
    ],
    ids=str,
)  # fmt: skip
def test_options_agree(name, config, steps, monkeypatch):
    assert worst(*both(name, config, monkeypatch, steps)) <= 1e-5
