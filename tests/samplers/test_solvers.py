"""Laws of all samplers; their numbers are compared with torch's in tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.samplers import (
    SAMPLERS,
    Phase,
    default_sampler,
    image_to_image_start,
    initial_noise,
    inpaint,
    make_solver,
    noised,
    sample,
)
from jaxmix.schedule import NoiseSchedule
from jaxmix.testing import normal
from jaxmix.types import InputError

STEPS = 10
V = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
SCHEDULE = NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler"} | V)
X0, NOISE = normal(jax.random.key(0), (2, 3, 4, 4, 2))
NOISES = normal(jax.random.key(1), (STEPS, *X0.shape))


def knows(x0, solver):
    """Return a model that is right about x0 in every state: v prediction."""

    def model(x, t, step):
        signal, sigma = solver.signals[step], solver.sigmas[step]
        return (signal * x - x0) / sigma

    return model


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_that_knows_x0_reaches_it(name):
    for schedule in (SCHEDULE, NoiseSchedule.from_config(V | {"clip_sample": False, "rescale_betas_zero_snr": True})):
        solver = make_solver(name, schedule, STEPS)
        last = sample([Phase(knows(X0, solver), 0, STEPS)], solver, NOISE, noise_fn=lambda i: NOISES[i])
        np.testing.assert_allclose(last, X0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if "ancestral" not in name and "sde" not in name])
def test_deterministic_samplers_follow_the_line_from_noise_to_x0(name):
    # Where eps and x0 never change, the path is straight whatever the grid and the order.
    solver = make_solver(name, SCHEDULE, STEPS)

    def model(x, t, step):
        return solver.signals[step] * NOISE - solver.sigmas[step] * X0

    start = noised(solver, X0, NOISE, 0)
    last, states = sample([Phase(model, 0, STEPS)], solver, start, record=lambda x, pred, i: x)
    np.testing.assert_allclose(last, X0, atol=2e-5)
    if name != "ddim":  # a DDIM step may end beside the level that the next one starts from
        for i, x in enumerate(states):
            np.testing.assert_allclose(x, noised(solver, X0, NOISE, i), atol=2e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_are_variance_preserving_and_end_without_noise(name):
    for schedule in (SCHEDULE, NoiseSchedule.from_config(V | {"rescale_betas_zero_snr": True})):
        solver = make_solver(name, schedule, STEPS)
        assert solver.steps == len(solver.timesteps) == STEPS
        assert solver.signals.shape == solver.sigmas.shape == (STEPS + 1,)
        np.testing.assert_allclose(solver.signals**2 + solver.sigmas**2, 1, rtol=1e-6)
        assert np.all(np.diff(solver.signals) > 0)
        assert np.all(np.diff(solver.timesteps) < 0)
        assert (solver.signals[-1], solver.sigmas[-1]) == (1, 0)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(solver))


@pytest.mark.parametrize("name", ["ddim", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde"])
def test_another_schedule_and_other_noise_do_not_retrace(name):
    traces = []

    @jax.jit
    def run(solver, x, noises):
        traces.append(name)
        return sample([Phase(lambda x, t, step: jnp.sin(x), 0, STEPS)], solver, x, noise_fn=lambda i: noises[i])

    solver = make_solver(name, SCHEDULE, STEPS)
    first = run(solver, NOISE, NOISES)
    other = dataclasses.replace(SCHEDULE, beta_end=0.01)
    assert not np.allclose(run(make_solver(name, other, STEPS), NOISE, NOISES), first)
    assert np.array_equal(run(solver, NOISE, 2 * NOISES), first) != solver.stochastic
    assert len(traces) == 1


def test_the_second_order_solver_carries_one_x0_and_a_flag():
    def run(x):
        return sample([Phase(lambda x, t, step: x, 0, 9)], make_solver("dpmpp_2m", SCHEDULE, 9), x)

    scans = [eqn for eqn in jax.make_jaxpr(run)(jnp.ones((2, 3))).eqns if eqn.primitive.name == "scan"]
    assert [scan.params["num_carry"] for scan in scans] == [3]


def test_a_run_from_the_middle_starts_with_a_first_order_step():
    solver = make_solver("dpmpp_2m", SCHEDULE, STEPS)
    pred = jnp.cos(NOISE)
    x, _ = solver.step(4, NOISE, solver.memory(NOISE), pred)
    euler = make_solver("euler", NoiseSchedule.from_config({"_class_name": "DPMSolverMultistepScheduler"} | V), STEPS)
    np.testing.assert_allclose(x, euler.step(4, NOISE, (), pred)[0], rtol=0, atol=1e-6)  # which is Euler's step
    after = solver.step(4, NOISE, (2 * NOISE, jnp.float32(1)), pred)[0]
    assert not np.allclose(after, x)


def test_levels_that_fall_together_give_no_nan():
    # 999 rounded timesteps of a linspace over 1000 repeat one.
    solver = make_solver("dpmpp_2m", NoiseSchedule.from_config({}), 1000)
    assert len(set(solver.timesteps.tolist())) < 1000
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(solver))


@pytest.mark.parametrize("name", ["DDIM", "eular", "dpmpp_3m", "euler_ancestral_karras", "", "x"])
def test_an_unknown_sampler_names_near_misses(name):
    with pytest.raises(InputError, match=f"sampler '{name}' is not known; (did you mean|known: ddim)"):
        make_solver(name, SCHEDULE, STEPS)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "ddim"),
        ({"_class_name": "PNDMScheduler", "use_karras_sigmas": True}, "ddim"),
        ({"_class_name": "HeunDiscreteScheduler"}, "euler"),
        ({"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": True}, "dpmpp_2m_karras"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": None}, "euler"),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "use_karras_sigmas": True}, "euler_ancestral"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "dpmpp_2m"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver"}, "dpmpp_2m_sde"),
    ],
)
def test_the_default_sampler_is_what_the_config_asks_for(config, expected):
    assert default_sampler(NoiseSchedule.from_config(config)) == expected


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("ddim", {"thresholding": True}, "thresholding is true, expected false"),
        ("dpmpp_2m_karras", {"thresholding": True}, "thresholding is true, expected false"),
        ("euler", {"use_exponential_sigmas": True}, "use_exponential_sigmas is true"),
        ("dpmpp_2m", {"use_beta_sigmas": True}, "use_beta_sigmas is true"),
        ("dpmpp_2m_sde", {"use_lu_lambdas": True}, "use_lu_lambdas is true"),
        ("dpmpp_2m", {"solver_order": 3}, "solver_order is 3, expected 2 or 1"),
        ("dpmpp_2m", {"solver_type": "euler"}, "solver_type is 'euler', expected midpoint or heun"),
        ("euler", {"final_sigmas_type": "least"}, "final_sigmas_type is 'least', expected zero or sigma_min"),
        ("euler", {"interpolation_type": "log_linear"}, "interpolation_type is 'log_linear', expected linear"),
        ("euler", V | {"timestep_type": "continuous"}, "timestep_type is 'continuous', expected discrete"),
        ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "expected v_prediction or sample"),
    ],
)
def test_options_that_a_sampler_does_not_have_are_refused_for_it_alone(name, config, message):
    schedule = NoiseSchedule.from_config(config)  # loading is fine
    with pytest.raises(InputError, match=message) as error:
        make_solver(name, schedule, STEPS)
    assert "\n" not in str(error.value)
    make_solver("euler_ancestral", schedule, STEPS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_impossible_steps_are_refused_by_every_sampler(name):
    for steps in (0, 1001, 2.5, True):
        with pytest.raises(InputError, match=f"steps is {steps}, expected an integer from 1 to 1000"):
            make_solver(name, SCHEDULE, steps)


def test_leading_dpm_needs_a_timestep_more_than_steps():
    schedule = NoiseSchedule.from_config({"timestep_spacing": "leading"})
    assert make_solver("dpmpp_2m", schedule, 999).timesteps[-1] == 1
    with pytest.raises(InputError, match="steps is 1000, expected at most 999"):
        make_solver("dpmpp_2m", schedule, 1000)
    with pytest.raises(InputError, match="the first timestep would be 1000, expected at most 999"):
        make_solver("euler", NoiseSchedule.from_config({"timestep_spacing": "leading", "steps_offset": 1}), 1000)


# Starts from an image -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "start"), [(1, 0), (1.0, 0), (0.8, 10), (0.5, 25), (0.02, 49)])
def test_strength_leaves_out_the_first_steps(strength, start):
    assert image_to_image_start(50, strength) == start


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan"), "0.5", True])
def test_impossible_strengths_are_refused(strength):
    with pytest.raises(InputError, match=f"strength is {strength!r}, expected a number above 0 and at most 1"):
        image_to_image_start(50, strength)


def test_a_strength_that_leaves_no_step_is_refused():
    with pytest.raises(InputError, match=r"strength is 0\.01 with 50 steps: no step is left, expected at least 0\.02"):
        image_to_image_start(50, 0.01)


ABOVE_0 = {"set_alpha_to_one": False, "final_sigmas_type": "sigma_min", "clip_sample": False}


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m_sde"])
def test_inpainting_keeps_the_image_outside_of_the_mask_and_paints_inside(name):
    schedule = NoiseSchedule.from_config(V | ABOVE_0)
    solver = make_solver(name, schedule, STEPS)
    mask = (jax.random.uniform(jax.random.key(3), (3, 4, 4, 1)) > 0.5).astype(jnp.float32)
    image = jnp.ones_like(X0)
    last, states = sample(
        [Phase(knows(X0, solver), 3, STEPS)],
        solver,
        noised(solver, image, NOISE, 3),
        start=3,
        noise_fn=lambda i: NOISES[i],
        latents_fn=inpaint(solver, image, NOISE, mask),
        record=lambda x, pred, i: x,
    )
    for i, x in enumerate(states, start=3):
        np.testing.assert_allclose((1 - mask) * x, (1 - mask) * noised(solver, image, NOISE, i), atol=1e-6)
    assert len(states) == STEPS - 3
    assert np.array_equal((1 - mask) * last, (1 - mask) * image)
    assert np.abs(mask * (last - X0)).max() < 0.2  # both runs end above level 0
    assert np.abs(mask * (last - image)).max() > 1


def test_a_mask_of_ones_is_identity():
    solver = make_solver("euler", SCHEDULE, STEPS)
    x = initial_noise([1, 2, 3], (4, 4, 2))
    for i in (0, STEPS - 1):
        assert np.array_equal(inpaint(solver, X0, NOISE, jnp.ones((1, 4, 4, 1)))(x, i), x)
