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
    level,
    make_solver,
    noised,
    sample,
)
from jaxmix.samplers.sigmas import LEVEL_SPACINGS
from jaxmix.schedule import NoiseSchedule
from jaxmix.testing import normal
from jaxmix.types import InputError

STEPS = 10
V = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
SCHEDULE = NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler"} | V)
X0, NOISE = normal(jax.random.key(0), (2, 3, 4, 4, 2))
NOISES = normal(jax.random.key(1), (2 * STEPS, *X0.shape))  # two calls a step


def knows(x0, solver):
    """Return a model that is right about x0 in every state: v prediction."""

    def model(x, t, step):
        signal, sigma = level(solver, step, t)
        return (signal * x - x0) / sigma

    return model


SPACED = [f"{name}_{spacing}" for name in ("euler", "unipc", "dpmpp_sde") for spacing in LEVEL_SPACINGS]
NO_SIGNAL = V | {"clip_sample": False, "rescale_betas_zero_snr": True}


def schedules(name):
    """Return schedules that a sampler has: PLMS, which knows eps only, has none without any signal."""
    return [SCHEDULE] + [NoiseSchedule.from_config(NO_SIGNAL)] * (name != "pndm")


@pytest.mark.parametrize("name", [name for name in (*SAMPLERS, *SPACED) if name != "pndm"])
def test_a_model_that_knows_x0_reaches_it(name):
    for schedule in schedules(name):
        solver = make_solver(name, schedule, STEPS)
        last = sample([Phase(knows(X0, solver), 0, STEPS)], solver, NOISE, noise_fn=lambda i: NOISES[i])
        end = solver.sigmas[-1]  # that of TCD's last timestep, 0
        np.testing.assert_allclose(last, X0, atol=1e-5 if end == 0 else 4 * end)


NOISY = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "lcm", "tcd")


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in (*NOISY, "pndm")])
def test_deterministic_samplers_follow_the_line_from_noise_to_x0(name):
    # Where eps and x0 never change, the path is straight whatever the grid and the order.
    solver = make_solver(name, SCHEDULE, STEPS)

    def model(x, t, step):
        signal, sigma = level(solver, step, t)
        return signal * NOISE - sigma * X0

    start = noised(solver, X0, NOISE, 0)
    last, states = sample([Phase(model, 0, STEPS)], solver, start, record=lambda x, pred, i: x)
    np.testing.assert_allclose(last, X0, atol=2e-5)
    if name != "ddim":  # a DDIM step may end beside the level that the next one starts from
        for i, x in enumerate(states):
            np.testing.assert_allclose(x, noised(solver, X0, NOISE, i), atol=2e-5)


def test_plms_follows_the_line_of_a_model_that_knows_eps():
    # It averages predictions of different levels as they are: only eps is the same at all of them.
    solver = make_solver("pndm", dataclasses.replace(SCHEDULE, prediction_type="epsilon"), STEPS)
    model = [Phase(lambda x, t, step: NOISE, 0, STEPS)]
    np.testing.assert_allclose(sample(model, solver, noised(solver, X0, NOISE, 0)), X0, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_are_variance_preserving_and_end_without_noise(name):
    for schedule in schedules(name):
        solver = make_solver(name, schedule, STEPS)
        assert solver.steps == len(solver.timesteps) == STEPS
        assert solver.signals.shape == solver.sigmas.shape == (STEPS + 1,)
        np.testing.assert_allclose(solver.signals**2 + solver.sigmas**2, 1, rtol=1e-6)
        assert np.all(np.diff(solver.signals) > 0)
        assert np.all(np.diff(solver.timesteps) < 0)
        assert (solver.signals[-1], solver.sigmas[-1]) == (1, 0) or name == "tcd"
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(solver))


@pytest.mark.parametrize("name", ["ddim", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "unipc", "pndm", "lms"])
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


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("euler", {"eta": 0.5}, "eta: found 0.5 with the sampler euler, which has none: expected ddim or tcd"),
        ("ddim", {"eta": 1.5}, "eta: found 1.5, expected a number from 0 to 1"),
        ("tcd", {"eta": float("nan")}, "eta: found nan, expected a number from 0 to 1"),
        ("ddim", {"eta": True}, "eta: found True, expected a number from 0 to 1"),
        ("lcm", {"spacing": "karras"}, "spacing: found 'karras' with the sampler lcm, expected none"),
        ("pndm", {"spacing": "beta"}, "spacing: found 'beta' with the sampler pndm, expected one of leading, trailing"),
        (
            "euler",
            {"spacing": "Karras"},
            "spacing: found 'Karras', expected one of leading, trailing, linspace, kar",
        ),
        ("euler", {"spacing": 3}, "spacing: found 3, expected one of leading"),
        ("heun_beta", {"spacing": "karras"}, "spacing: found 'karras' with the sampler heun_beta, expected heun"),
    ],
)
def test_settings_that_a_sampler_does_not_have_are_refused_in_one_line(name, settings, message):
    with pytest.raises(InputError) as error:
        make_solver(name, SCHEDULE, STEPS, **settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_spacing_is_that_of_the_name_and_of_the_timesteps():
    def same(a, b):
        return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    for name in ("euler", "unipc", "lms"):
        plain = make_solver(name, SCHEDULE, STEPS)
        for spacing in LEVEL_SPACINGS:
            named = make_solver(f"{name}_{spacing}", SCHEDULE, STEPS)
            assert same(make_solver(name, SCHEDULE, STEPS, spacing=spacing), named)
            assert not same(named, plain)
        assert same(make_solver(name, SCHEDULE, STEPS, spacing="trailing"), plain)
    linspace = dataclasses.replace(SCHEDULE, timestep_spacing="linspace")
    assert same(make_solver("pndm", SCHEDULE, STEPS, spacing="linspace"), make_solver("pndm", linspace, STEPS))
    # A spacing that is named stands above the levels that the config asks for.
    asks = NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True} | V)
    assert same(make_solver("euler", asks, STEPS, spacing="trailing"), make_solver("euler", SCHEDULE, STEPS))


def test_the_levels_of_sgm_uniform_are_those_of_web_uis():
    # k-diffusion's DiscreteSchedule.t_to_sigma, at torch.linspace(999, 0, 5)[:-1].
    sigmas = np.sqrt((1 - SCHEDULE.alphas_cumprod.astype("f8")) / SCHEDULE.alphas_cumprod)
    expected = [np.exp(0.25 * np.log(sigmas[a]) + 0.75 * np.log(sigmas[b])) for a, b in ((748, 749),)]
    solver = make_solver("euler_sgm_uniform", SCHEDULE, 4)
    np.testing.assert_allclose(solver.timesteps, [999, 749.25, 499.5, 249.75])
    np.testing.assert_allclose((solver.sigmas / solver.signals)[0], sigmas[999], rtol=1e-5)
    expected = np.exp(0.75 * np.log(sigmas[749]) + 0.25 * np.log(sigmas[750]))
    np.testing.assert_allclose((solver.sigmas / solver.signals)[1], expected, rtol=1e-5)
    assert solver.sigmas[-1] == 0


@pytest.mark.parametrize(
    ("name", "start", "calls"), [("heun", 0, 19), ("heun", 4, 11), ("pndm", 0, 11), ("pndm", 4, 7)]
)
def test_some_solvers_call_the_model_twice_in_some_steps_and_everything_else_sees_whole_ones(name, start, calls):
    solver, seen = make_solver(name, SCHEDULE, STEPS), []

    def model(x, t, step):
        jax.debug.callback(lambda t, step: seen.append((int(step), int(t))), t, step, ordered=True)
        return jnp.sin(x)

    def run(stop, phases):
        return sample(
            [Phase(model, a, b) for a, b in phases],
            solver,
            NOISE,
            record=lambda x, pred, i: (x, i),
            latents_fn=lambda x, i: x + i / 100,
            start=start,
            stop=stop,
        )

    x, (states, steps) = run(None, [(start, STEPS)])
    jax.effects_barrier()
    assert len(seen) == calls
    assert steps.tolist() == list(range(start, STEPS))
    assert [step for step, _ in seen] == sorted(step for step, _ in seen)
    first, second = seen[:2]
    assert first == (start, int(solver.timesteps[start])) and second == (start, int(solver.timesteps[start + 1]))
    # Phases change nothing, and what is run up to a step is what a longer run sees before it.
    again, _ = run(None, [(start, start + 1), (start + 1, STEPS)])
    np.testing.assert_allclose(again, x, rtol=0, atol=1e-6)
    before, _ = run(start + 3, [(start, start + 3)])
    np.testing.assert_allclose(before, states[3], rtol=0, atol=1e-6)


def test_the_noise_of_a_step_of_two_calls_is_one_brownian_motion():
    solver = make_solver("dpmpp_sde", SCHEDULE, STEPS)
    draws = normal(jax.random.key(2), (2 * STEPS, 4000))
    r = (solver.sigmas / solver.signals)[:-1]
    for i in (0, 4, 8):
        first, whole = (solver.noise(lambda call: draws[call], jnp.asarray(2 * i + part)) for part in (0, 1))
        # Their increments: the first part's share of the variance of the whole is its share of the way.
        middle = solver.second_sigmas[i] / solver.second_signals[i]
        share = (r[i] - middle) / (r[i] - r[i + 1])
        assert float(jnp.std(whole)) == pytest.approx(1, abs=0.05)
        assert float(jnp.corrcoef(first, whole)[0, 1]) == pytest.approx(float(share) ** 0.5, abs=0.05)


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


@pytest.mark.parametrize("name", ["DDIM", "eular", "dpmpp_3m", "pndm_karras", "euler_", "_karras", "", "x"])
def test_an_unknown_sampler_names_near_misses(name):
    with pytest.raises(InputError, match=f"sampler '{name}' is not known; (did you mean|known: ddim)"):
        make_solver(name, SCHEDULE, STEPS)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "ddim"),
        ({"_class_name": "PNDMScheduler", "use_karras_sigmas": True}, "pndm"),
        ({"_class_name": "HeunDiscreteScheduler", "use_beta_sigmas": True}, "heun_beta"),
        ({"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": True}, "unipc_karras"),
        ({"_class_name": "LMSDiscreteScheduler", "use_exponential_sigmas": True}, "lms_exponential"),
        ({"_class_name": "DPMSolverSinglestepScheduler"}, "dpmpp_2m"),
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
        ("unipc", {"solver_order": 4}, "solver_order is 4, expected 1, 2 or 3"),
        ("unipc", {"predict_x0": False}, "predict_x0 is false, expected true"),
        ("heun", {"use_beta_sigmas": True}, "use_beta_sigmas is true, expected false for heun, or heun_beta"),
        ("lcm", {"original_inference_steps": 5}, "steps is 10, expected at most 5"),
        ("tcd", {"original_inference_steps": "x"}, "original_inference_steps is 'x', expected an integer from 1 to"),
        ("pndm", V | {"rescale_betas_zero_snr": True}, "timestep 999 has no signal"),
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
