import dataclasses
import warnings

import numpy as np
import pytest

import jaxmix
from jaxmix.samplers import make_solver, split_sampler
from jaxmix.samplers.sigmas import dpm_levels, euler_levels
from jaxmix.schedule import NoiseSchedule
from jaxmix.schedulers import SCHEDULERS
from jaxmix.types import CheckpointWarning, InputError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

BETAS = {
    "linear": {},
    "stable diffusion": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": np.linspace(0.001, 0.03, 1000).tolist()},
}


@pytest.fixture
def correctly_rounded_roots(monkeypatch):
    """Round torch's float32 square roots correctly; on some machines some of them are 1 ulp off."""
    power = torch.Tensor.__pow__

    def root(x):
        return torch.from_numpy(np.asarray(np.sqrt(x.numpy())))

    monkeypatch.setattr(torch.Tensor, "sqrt", root)
    monkeypatch.setattr(torch.Tensor, "__pow__", lambda x, n: root(x) if n == 0.5 else power(x, n))


def pair(**config):
    theirs = diffusers.DDIMScheduler(**config)
    return NoiseSchedule.from_config(dict(theirs.config)), theirs


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
@pytest.mark.parametrize("total", [1000, 77, 4])
def test_tables_agree_bit_for_bit(betas, total):
    if "trained_betas" in betas:
        betas = {"trained_betas": betas["trained_betas"][:total]}
    ours, theirs = pair(num_train_timesteps=total, **betas)
    assert np.array_equal(ours.betas, theirs.betas.numpy())
    assert np.array_equal(ours.alphas_cumprod, theirs.alphas_cumprod.numpy())
    assert ours.alphas_cumprod.dtype == np.float32


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
def test_tables_rescaled_to_zero_signal_agree(betas):
    ours, theirs = pair(**betas, rescale_betas_zero_snr=True)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=0, atol=1e-6)
    assert ours.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
@pytest.mark.usefixtures("correctly_rounded_roots")
def test_tables_rescaled_to_zero_signal_agree_bit_for_bit(betas):
    ours, theirs = pair(**betas, rescale_betas_zero_snr=True)
    assert np.array_equal(ours.betas, theirs.betas.numpy())
    assert np.array_equal(ours.alphas_cumprod, theirs.alphas_cumprod.numpy())


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("total", [1000, 37])
def test_timesteps_agree_for_every_number_of_steps(spacing, total):
    ours, theirs = pair(timestep_spacing=spacing, num_train_timesteps=total)
    for steps in range(1, total + 1):
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.numpy()
        if len(expected) == steps + 1:  # diffusers takes a step too many where arange rounds up, at timestep -1
            assert expected[-1] == -1
            expected = expected[:steps]
        assert ours.timesteps(steps).tolist() == expected.tolist()


def test_steps_offset_agrees():
    ours, theirs = pair(steps_offset=1)
    theirs.set_timesteps(50)
    assert ours.timesteps(50).tolist() == theirs.timesteps.tolist() == list(range(981, 0, -20))


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
def test_noising_and_velocity_agree(betas):
    ours, theirs = pair(**betas)
    draw = np.random.default_rng(0).normal
    x0, noise = draw(size=(2, 6, 4, 4, 3)).astype("f4")
    t = np.array([0, 1, 250, 500, 981, 999])
    args = torch.from_numpy(x0), torch.from_numpy(noise), torch.from_numpy(t)
    np.testing.assert_allclose(ours.add_noise(x0, noise, t), theirs.add_noise(*args).numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours.velocity(x0, noise, t), theirs.get_velocity(*args).numpy(), rtol=0, atol=1e-6)


CLASSES = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
NO_FILES = {"DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"}  # they need torchsde to be made


@pytest.fixture(scope="module")
def folder(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    dataclasses.replace(tiny_pipeline, sampler=None).save(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted({*CLASSES, *SCHEDULERS} - NO_FILES))
def test_every_scheduler_class_opens_with_its_noise_schedule_or_says_what_it_has(name, folder):
    """As diffusers saves it: with Stable Diffusion's betas, with its own defaults, and with only its name."""
    make = getattr(diffusers, name)
    if name not in SCHEDULERS:
        with pytest.raises(InputError, match="scheduler config: ") as raised:
            NoiseSchedule.from_config({"_class_name": name, "num_train_timesteps": 1000})
        assert "\n" not in str(raised.value) and name in str(raised.value)
        return
    own = name == "UnCLIPScheduler"  # without betas to choose
    for config in ({}, {} if own else BETAS["stable diffusion"]):
        theirs = make(**config)
        for given in ({"_class_name": name, **theirs.config}, {"_class_name": name, **config}):
            ours = NoiseSchedule.from_config(given)
            np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=0, atol=1e-6)
    theirs.save_pretrained(folder / "scheduler")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pipe = jaxmix.load(folder)
    runge_kutta = name == "PNDMScheduler"  # by default it begins with Runge-Kutta steps, which are not here
    assert [w.category for w in said] == [CheckpointWarning] * (not SCHEDULERS[name].exact or runge_kutta)
    lacks = "without what the PNDMScheduler has: skip_prk_steps=False" if runge_kutta else f"there is no {name} here"
    assert all(lacks in str(w.message) and pipe.sampler in str(w.message) for w in said)
    assert make_solver(pipe.sampler, pipe.schedule, 4).steps == 4
    assert pipe.schedule.to_config()["_class_name"] == name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "betas"),
    [("DDPMScheduler", "sigmoid"), ("DDPMScheduler", "laplace"), ("HeunDiscreteScheduler", "exp")],
)
def test_the_rarer_betas_agree(name, betas):
    theirs = getattr(diffusers, name)(beta_schedule=betas, beta_start=0.001, beta_end=0.02)
    ours = NoiseSchedule.from_config({"_class_name": name, "beta_schedule": betas, "beta_start": 0.001})
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=0, atol=1e-6)


def test_diffusers_opens_our_config():
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
    ours = NoiseSchedule.from_config(config | BETAS["stable diffusion"] | {"clip_sample": False})
    theirs = diffusers.DDIMScheduler.from_config(ours.to_config())
    assert np.array_equal(ours.alphas_cumprod, theirs.alphas_cumprod.numpy())
    assert theirs.final_alpha_cumprod == theirs.alphas_cumprod[0] == float(ours.final_alpha_cumprod)
    assert (theirs.config.steps_offset, theirs.config.clip_sample) == (1, False)
    assert diffusers.PNDMScheduler.from_config(ours.to_config()).config.skip_prk_steps is True


GRIDS = {
    "linspace by default": {},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading"},
    "leading, offset 1": {"timestep_spacing": "leading", "steps_offset": 1},
}
DPM, EULER, ANCESTRAL = "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
ENDS = {"zero snr": BETAS["stable diffusion"] | {"rescale_betas_zero_snr": True}}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("euler", EULER),
        ("euler_karras", EULER),
        ("euler_ancestral", ANCESTRAL),
        ("dpmpp_2m", DPM),
        ("dpmpp_2m_karras", DPM),
        ("dpmpp_2m_exponential", DPM),
        ("dpmpp_2m_beta", DPM),
    ],
)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("betas", ["stable diffusion", "cosine", "zero snr"])
@pytest.mark.usefixtures("correctly_rounded_roots")
# diffusers makes NumPy arrays of torch tensors in a way that NumPy 2 frowns at.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_levels_of_euler_and_dpm_agree_bit_for_bit(name, kind, grid, betas):
    spacing = split_sampler(name)[1]
    config = (BETAS | ENDS)[betas] | grid | ({f"use_{spacing}_sigmas": True} if spacing else {})
    scheduler = getattr(diffusers, kind)(**config)
    schedule = NoiseSchedule.from_config({"_class_name": kind} | config)
    for steps in (1, 2, 3, 14, 25, 50, 333):
        scheduler.set_timesteps(steps)
        levels = (dpm_levels if kind == DPM else euler_levels)(schedule, steps, spacing)
        assert np.array_equal(levels.timesteps, scheduler.timesteps.numpy())
        assert np.array_equal(levels.sigmas, scheduler.sigmas.numpy())
        init = float(make_solver(name, schedule, steps).init_scale)
        if kind != DPM:
            init *= float(levels.sigmas[0].astype("f8") ** 2 + 1) ** 0.5
        assert init == pytest.approx(float(scheduler.init_noise_sigma), rel=2e-7)
