import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.samplers import (
    DDIM,
    SAMPLERS,
    Phase,
    by_branch,
    classifier_free_guidance,
    initial_noise,
    make_solver,
    sample,
    seed_array,
    step_noise,
)
from jaxmix.samplers.noise import MAX_SEED
from jaxmix.schedule import NoiseSchedule
from jaxmix.testing import normal
from jaxmix.types import InputError

SCHEDULE = NoiseSchedule(clip_sample=False)


def decay(x, t, step):
    return 0.5 * x + t / 1000


def test_rows_of_noise_depend_on_their_seed_alone():
    shape = (5, 3, 3)
    seeds = [7, 0, 2**32 - 1, 7, 123456789]
    rows = initial_noise(seeds, shape)
    assert rows.dtype == jnp.float32
    assert np.array_equal(rows[0], rows[3])
    assert not np.array_equal(rows[0], rows[1])
    for order in ([2], [4, 3], [1, 0, 2], [4, 3, 2, 1, 0] * 3):
        again = jax.jit(initial_noise, static_argnums=1)(jnp.asarray([seeds[i] for i in order], jnp.uint32), shape)
        assert np.array_equal(again, rows[np.asarray(order)])


def test_initial_noise_is_standard_normal():
    noise = np.asarray(initial_noise(range(64), (8, 8, 4)))
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert np.abs(np.corrcoef(noise.reshape(64, -1)) - np.eye(64)).max() < 0.35


def test_step_noise_differs_by_step_and_from_the_start():
    draws = [initial_noise([3], (4, 4, 2)), step_noise([3], 0, (4, 4, 2)), step_noise([3], 1, (4, 4, 2))]
    assert all(not np.allclose(a, b) for i, a in enumerate(draws) for b in draws[:i])


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", True])
def test_bad_seeds_are_named(seed):
    with pytest.raises(
        InputError, match=f"seed of row 1: found {seed!r}, expected a whole number from 0 to {MAX_SEED}"
    ):
        seed_array([3, seed])


def test_seeds_have_64_bits_and_are_those_of_32_where_they_fit():
    seeds = [7, 2**32 - 1, 2**32 + 7, 2**64 - 1, 7.0, np.uint64(2**63)]
    rows = np.asarray(initial_noise(seeds, (4, 4, 2)))
    np.testing.assert_array_equal(rows[:2], initial_noise(jnp.asarray(seeds[:2], jnp.uint32), (4, 4, 2)))
    np.testing.assert_array_equal(rows[4], rows[0])
    assert len(np.unique(rows[[0, 1, 2, 3, 5], 0, 0, 0])) == 5
    for row, seed in enumerate(seeds[:2]):  # and as they were when a seed was 32 bits
        key = jax.random.fold_in(jax.random.key(jnp.uint32(seed), impl="threefry2x32"), 0)
        np.testing.assert_array_equal(rows[row], jax.random.normal(key, (4, 4, 2)))


def test_guidance_rows_are_branch_minor():
    seen = []

    def rows_fn(x, t, step):
        seen.append(np.asarray(x[:, 0]))
        return x + jnp.arange(4.0)[:, None]  # u0 c0 u1 c1

    guided = classifier_free_guidance(by_branch(rows_fn, 2), 3.0)
    x = jnp.array([[10.0], [20.0]])
    assert guided(x, jnp.int32(5), jnp.int32(0)).tolist() == [[10 + 3 * 1], [20 + 2 + 3 * 1]]
    assert seen[0].tolist() == [10, 10, 20, 20]


def test_a_guidance_scale_of_at_most_1_is_the_prompts_branch_alone():
    def rows_fn(x, t, step):
        return x * jnp.array([2.0, 5.0, 2.0, 5.0])[:, None]

    x = jnp.array([[1.0], [3.0]])
    for scales in ([0.0, 1.0], [-3.0, 0.9]):
        guided = classifier_free_guidance(by_branch(rows_fn, 2), jnp.array(scales))
        assert guided(x, 0, 0).tolist() == [[5.0], [15.0]]


def test_guidance_repeats_timesteps_per_row_and_works_in_float32():
    def rows_fn(x, t, step):
        return (x + t[:, None]).astype(jnp.bfloat16)

    out = classifier_free_guidance(by_branch(rows_fn, 2), 2.0)(jnp.ones((2, 3)), jnp.array([1, 2]), 0)
    assert out.dtype == jnp.float32
    assert out[:, 0].tolist() == [2, 3]


def test_guidance_scale_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"guidance scale has shape \(3,\), expected \(\) or \(2,\)"):
        classifier_free_guidance(by_branch(decay, 2), jnp.ones(3))(jnp.ones((2, 1)), 0, 0)


def test_rescaled_guidance_has_the_spread_of_the_conditional_branch():
    rows = normal(jax.random.key(0), (4, 8, 8, 2)) * jnp.array([1.0, 1.0, 1.0, 3.0])[:, None, None, None]
    guided = classifier_free_guidance(by_branch(lambda x, t, step: rows, 2), 7.5, jnp.array([1.0, 0.5]))
    plain = classifier_free_guidance(by_branch(lambda x, t, step: rows, 2), 7.5)
    x = jnp.zeros((2, 8, 8, 2))
    ours, mixed = (np.asarray(fn(x, 0, 0)).reshape(2, -1) for fn in (guided, plain))
    cond = np.asarray(rows[1::2]).reshape(2, -1)
    np.testing.assert_allclose(ours[0].std(), cond[0].std(), rtol=1e-5)
    np.testing.assert_allclose(ours[1].std(), (cond[1].std() + mixed[1].std()) / 2, rtol=1e-5)


def test_rescale_0_is_identity_bit_for_bit_and_traced():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(rows, scale, rescale):
        return classifier_free_guidance(by_branch(lambda x, t, step: rows, 2), scale, rescale)(x, 0, 0)

    @jax.jit
    def plain(rows, scale):
        return classifier_free_guidance(by_branch(lambda x, t, step: rows, 2), scale)(x, 0, 0)

    x = jnp.zeros((3, 8, 8, 2))
    rows, scale = normal(jax.random.key(0), (6, 8, 8, 2)), jnp.array([7.5, 3.0, 1.0])
    assert np.array_equal(run(rows, scale, jnp.float32(0)), plain(rows, scale))
    assert not np.allclose(run(rows, scale, jnp.float32(0.7)), plain(rows, scale))
    assert np.array_equal(run(jnp.ones_like(rows), scale, jnp.float32(1)), x + 1)  # no spread, nothing to rescale


def test_guidance_rescale_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"guidance rescale has shape \(3,\), expected \(\) or \(2,\)"):
        classifier_free_guidance(by_branch(decay, 2), 1.0, jnp.ones(3))(jnp.ones((2, 1)), 0, 0)


def test_the_true_noise_leads_back_to_x0():
    x0, noise = normal(jax.random.key(0), (2, 3, 4))
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        schedule = NoiseSchedule(clip_sample=False, prediction_type=prediction_type)
        solver = DDIM.create(schedule, 20)
        start = schedule.add_noise(x0, noise, solver.timesteps[0])
        phase = Phase(lambda x, t, step, schedule=schedule: schedule.target(x0, noise, t), 0, 20)
        np.testing.assert_allclose(sample([phase], solver, start), x0, atol=2e-5)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_phases_equal_one_scan_bit_for_bit(name):
    solver = make_solver(name, SCHEDULE, 12)
    x = initial_noise([1, 2], (4, 4, 2))
    whole = sample([Phase(decay, 0, 12)], solver, x)
    assert np.array_equal(sample([Phase(decay, 0, 5), Phase(decay, 5, 6), Phase(decay, 6, 12)], solver, x), whole)


def test_each_phase_runs_its_own_model_on_its_own_steps():
    solver = DDIM.create(SCHEDULE, 6)
    x = jnp.ones((1, 2))
    phases = [Phase(lambda x, t, step: 0 * x + 1, 0, 2), Phase(lambda x, t, step: 0 * x + 2, 2, 6)]
    _, (preds, steps) = sample(phases, solver, x, record=lambda x, pred, i: (pred[0, 0], i))
    assert preds.tolist() == [1, 1, 2, 2, 2, 2]
    assert steps.tolist() == list(range(6))


@pytest.mark.parametrize(
    "bounds", [[], [(0, 5)], [(0, 3), (4, 6)], [(0, 4), (3, 6)], [(3, 6), (0, 3)], [(0, 6), (6, 6)], [(0, 7)]]
)
def test_phases_that_do_not_tile_the_steps_are_refused(bounds):
    with pytest.raises(ValueError, match=r"expected them to tile \[0, 6\)"):
        sample([Phase(decay, *bound) for bound in bounds], DDIM.create(SCHEDULE, 6), jnp.ones((1, 2)))


@pytest.mark.parametrize("bounds", [[(0, 6)], [(2, 5)], [(3, 6)]])
def test_phases_that_do_not_tile_the_steps_from_the_start_on_are_refused(bounds):
    with pytest.raises(ValueError, match=r"expected them to tile \[2, 6\)"):
        sample([Phase(decay, *bound) for bound in bounds], DDIM.create(SCHEDULE, 6), jnp.ones((1, 2)), start=2)


def test_a_run_from_the_middle_is_the_end_of_the_whole_run():
    solver = DDIM.create(SCHEDULE, 6)
    whole, starts = sample([Phase(decay, 0, 6)], solver, jnp.ones((1, 2)), record=lambda x, pred, i: x)
    end, steps = sample([Phase(decay, 2, 6)], solver, starts[2], start=2, record=lambda x, pred, i: i)
    assert np.array_equal(end, whole)
    assert steps.tolist() == [2, 3, 4, 5]


def test_latents_fn_acts_after_every_step():
    seen = {"latents_fn": lambda x, i: jnp.full_like(x, i), "record": lambda x, pred, i: x[0, 0]}
    last, starts = sample([Phase(decay, 0, 4)], DDIM.create(SCHEDULE, 4), jnp.full((1, 2), 9.0), **seen)
    assert starts.tolist() == [9, 0, 1, 2]
    assert last.tolist() == [[3, 3]]


def test_state_stays_float32_under_a_bfloat16_model():
    def model(x, t, step):
        assert x.dtype == jnp.float32
        return x.astype(jnp.bfloat16)

    for name in ("ddim", "dpmpp_2m"):
        last = sample([Phase(model, 0, 3)], make_solver(name, SCHEDULE, 3), jnp.ones((1, 2), jnp.bfloat16))
        assert last.dtype == jnp.float32


def test_a_stochastic_solver_asks_for_noise():
    for solver in (DDIM.create(SCHEDULE, 3, eta=1.0), *(make_solver(name, SCHEDULE, 3) for name in SAMPLERS)):
        if solver.stochastic:
            with pytest.raises(ValueError, match="needs noise"):
                sample([Phase(decay, 0, 3)], solver, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="eta is 2"):
        DDIM.create(SCHEDULE, 3, eta=2)


def test_numbers_do_not_retrace():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(solver, seeds, scale, context):
        rows = context.reshape(-1, 1, 1, context.shape[-1])
        guided = classifier_free_guidance(by_branch(lambda x, t, step: 0.1 * x + rows, 2), scale)
        return sample([Phase(guided, 0, 4)], solver, initial_noise(seeds, (3, 3, 2)))

    def call(seeds, scale, context, schedule=SCHEDULE):
        scale = jnp.asarray(scale, jnp.float32)
        return run(DDIM.create(schedule, 4), jnp.asarray(seeds, jnp.uint32), scale, jnp.full((2, 2, 2), context))

    first = call([1, 2], 7.5, jnp.array([[0.0], [1.0]]))
    for other in (
        call([3, 2], 7.5, jnp.array([[0.0], [1.0]])),
        call([1, 2], 3.0, jnp.array([[0.0], [1.0]])),
        call([1, 2], 7.5, jnp.array([[0.5], [1.0]])),
        call([1, 2], 7.5, jnp.array([[0.0], [1.0]]), NoiseSchedule(clip_sample=False, beta_end=0.01)),
    ):
        assert not np.allclose(first[0], other[0])


def test_the_loop_is_one_scan_that_carries_only_x():
    def run(x):
        return sample([Phase(decay, 0, 9)], DDIM.create(SCHEDULE, 9), x)

    scans = [eqn for eqn in jax.make_jaxpr(run)(jnp.ones((2, 3))).eqns if eqn.primitive.name == "scan"]
    assert len(scans) == 1
    assert scans[0].params["num_carry"] == 1
    assert scans[0].params["length"] == 9


def test_gradients_reach_the_start_noise():
    grad = jax.grad(lambda x: sample([Phase(decay, 0, 4)], DDIM.create(SCHEDULE, 4), x).sum())(jnp.ones((1, 2)))
    assert np.all(np.isfinite(grad))
    assert np.all(grad != 0)
