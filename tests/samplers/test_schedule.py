import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.samplers import differences, make_solver
from jaxmix.schedule import NoiseSchedule
from jaxmix.testing import normal
from jaxmix.types import CheckpointWarning, InputError

SD15 = {  # scheduler_config.json as Stable Diffusion 1.5 ships it
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def test_stable_diffusion_has_its_published_values():
    schedule = NoiseSchedule.from_config(SD15)
    np.testing.assert_allclose(
        schedule.alphas_cumprod[[1, 701, 961, 981, 999]], [0.99830, 0.0819, 0.00728, 0.00578, 0.00466], rtol=1e-3
    )
    assert schedule.timesteps(50).tolist() == list(range(981, 0, -20))
    assert schedule.final_alpha_cumprod == schedule.alphas_cumprod[0]


def test_config_round_trips_with_its_harmless_keys():
    config = NoiseSchedule.from_config(SD15).to_config()
    assert config.items() >= SD15.items()
    assert NoiseSchedule.from_config(json.loads(json.dumps(config))) == NoiseSchedule.from_config(SD15)
    trained = NoiseSchedule.from_config({"num_train_timesteps": 2, "trained_betas": [0.1, 0.2]})
    assert NoiseSchedule.from_config(trained.to_config()) == trained


def test_schedule_is_a_static_argument():
    schedules = {NoiseSchedule.from_config(SD15), NoiseSchedule.from_config(dict(SD15))}
    assert len(schedules) == 1
    double = jax.jit(lambda schedule, t: 2 * schedule.snr(t), static_argnums=0)
    assert double(schedules.pop(), 3) > 0


def test_a_class_that_never_clips_is_not_made_to_clip():
    assert NoiseSchedule.from_config({}).clip_sample
    assert not NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler"}).clip_sample


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("beta_schedule", "cosine", "linear, scaled_linear, squaredcos_cap_v2"),
        ("beta_schedule", ["linear"], "linear, scaled_linear, squaredcos_cap_v2"),
        ("prediction_type", "flow_prediction", "epsilon, v_prediction, sample"),
        ("timestep_spacing", "karras", "leading, trailing, linspace"),
        ("_class_name", "MyScheduler", "DDIMScheduler"),
        ("_class_name", "FlowMatchEulerDiscreteScheduler", "flow matching"),
        ("_class_name", "EDMEulerScheduler", "EDM noise schedule"),
        ("_class_name", ["x"], "DDIMScheduler"),
        ("rescale_betas_zero_snr", "yes", "true or false"),
        ("use_flow_sigmas", True, "flow matching"),
        ("num_train_timesteps", 0, "an integer from 1"),
        ("num_train_timesteps", "1000", "an integer from 1"),
        ("steps_offset", -1, "an integer from 0"),
        ("clip_sample", "no", "true or false"),
        ("beta_end", 10**400, "a number > 0"),
        ("num_train_timesteps", 10**12, "to 100000"),
        ("trained_betas", [10**400], "a list of numbers"),
        ("sigma_min", "0.1", "a number of at least"),
        ("trained_betas", [0.1], "num_train_timesteps = 1000"),
        ("trained_betas", 3, "a list of numbers"),
        ("beta_end", 1.5, "every beta in"),
    ],
)
def test_unsupported_values_name_key_found_and_expected(key, value, expected):
    with pytest.raises(InputError, match="scheduler config" if key == "_class_name" else key) as error:
        NoiseSchedule.from_config(SD15 | {key: value})
    text = str(error.value)
    assert expected in text
    assert "\n" not in text


def test_a_spacing_that_no_file_gave_is_not_written():
    assert "timestep_spacing" not in NoiseSchedule.from_config(SD15).to_config()
    assert NoiseSchedule.from_config(SD15 | {"timestep_spacing": None}) == NoiseSchedule.from_config(SD15)
    given = NoiseSchedule.from_config(SD15 | {"timestep_spacing": "leading"})
    assert given.to_config()["timestep_spacing"] == "leading"
    assert np.array_equal(given.timesteps(25), NoiseSchedule.from_config(SD15).timesteps(25))


def test_rescaled_betas_end_without_signal_and_start_as_before():
    plain = NoiseSchedule.from_config(SD15)
    schedule = NoiseSchedule.from_config(SD15 | {"rescale_betas_zero_snr": True})
    assert schedule.alphas_cumprod[-1] == 0 == schedule.snr(999)
    np.testing.assert_allclose(schedule.alphas_cumprod[0], plain.alphas_cumprod[0], rtol=1e-6)
    assert np.all(np.diff(schedule.alphas_cumprod) < 0)
    assert NoiseSchedule.from_config(schedule.to_config()) == schedule
    with pytest.raises(InputError, match="num_train_timesteps 1, expected at least 2"):
        NoiseSchedule(num_train_timesteps=1, rescale_betas_zero_snr=True)


def test_options_of_solvers_are_read_with_their_defaults():
    schedule = NoiseSchedule.from_config(SD15 | {"solver_order": 3, "sigma_max": None})
    assert schedule.option("solver_order", 2) == 3
    assert schedule.option("sigma_max", 7.0) == 7.0
    assert schedule.option("solver_type", "midpoint") == "midpoint"


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True])
def test_impossible_steps_are_refused(steps):
    with pytest.raises(InputError, match=f"steps is {steps}, expected an integer from 1 to 1000"):
        NoiseSchedule().timesteps(steps)


def test_an_offset_past_the_last_timestep_is_refused():
    with pytest.raises(InputError, match="the first timestep would be 1000, expected at most 999"):
        NoiseSchedule(steps_offset=1).timesteps(1000)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_targets_convert_back_to_x0_and_noise(prediction_type):
    schedule = NoiseSchedule.from_config(SD15 | {"prediction_type": prediction_type})
    x0, noise = normal(jax.random.key(0), (2, 4, 3, 3, 2))
    t = jnp.array([0, 10, 500, 999])
    x = schedule.add_noise(x0, noise, t)
    pred = schedule.target(x0, noise, t)
    np.testing.assert_allclose(schedule.to_x0(pred, x, t), x0, atol=1e-5)
    np.testing.assert_allclose(schedule.to_eps(pred, x, t), noise, atol=1e-4)


def test_v_prediction_gives_x0_where_nearly_no_signal_is_left():
    schedule = NoiseSchedule(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    x0, noise = normal(jax.random.key(0), (2, 1, 8))
    t = jnp.array([999])
    x, pred = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    np.testing.assert_allclose(schedule.to_x0(pred, x, t), x0, atol=1e-6)


def test_results_are_float32_from_bfloat16_inputs():
    schedule = NoiseSchedule()
    x0 = jnp.ones((2, 3), jnp.bfloat16)
    for result in (schedule.add_noise(x0, x0, jnp.array([1, 2])), schedule.target(x0, x0, 5), schedule.snr(5)):
        assert result.dtype == jnp.float32


def test_snr_is_signal_variance_over_noise_variance():
    abar = NoiseSchedule().alphas_cumprod.astype("f8")
    t = jnp.array([[0, 7], [500, 999]])
    np.testing.assert_allclose(NoiseSchedule().snr(t), (abar / (1 - abar))[np.asarray(t)], rtol=2e-3)


def test_null_is_the_default_and_unknown_keys_are_named_once_and_written_back():
    assert NoiseSchedule.from_config(SD15 | dict.fromkeys(["steps_offset", "clip_sample", "prediction_type"])) == (
        NoiseSchedule.from_config({k: v for k, v in SD15.items() if k not in ("steps_offset", "clip_sample")})
    )
    assert NoiseSchedule.from_config(SD15 | {"shift_terminal": None, "_comment": "x", "future": None}) is not None
    with pytest.warns(CheckpointWarning) as said:
        schedule = NoiseSchedule.from_config(SD15 | {"future": [1], "another": "x"})
    assert [str(w.message) for w in said] == ["scheduler config: unknown keys are ignored: another='x', future=[1]"]
    assert schedule.to_config()["future"] == [1]


def test_a_lenient_schedule_goes_without_what_a_solver_lacks():
    asked = {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "thresholding": True, "solver_type": "x"}
    schedule = NoiseSchedule.from_config(SD15 | asked)
    with pytest.raises(InputError, match="thresholding is true"):
        make_solver("dpmpp_2m", schedule, 4)
    plain = make_solver("dpmpp_2m", NoiseSchedule.from_config(SD15), 4)
    lenient = dataclasses.replace(schedule, lenient=True)
    jax.tree.map(np.testing.assert_array_equal, make_solver("dpmpp_2m", lenient, 4), plain)
    assert differences(lenient).endswith("thresholding=True, solver_order=3")
    assert lenient.to_config() == schedule.to_config()
