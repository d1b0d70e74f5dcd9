"""ReNoise's steps and its regularisation against a plain version in float64, with torch's gradients.

Written from the description of the algorithm (arXiv 2403.14602 and the settings of 2407.00788), one image at a time,
with the same noise and rolls and a model that is linear.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.samplers import DDIMInversion, ReNoise, invert, renoised
from jaxmix.samplers.renoise import regularised
from jaxmix.schedule import NoiseSchedule

torch = pytest.importorskip("torch")

SCHEDULE = NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1)  # fmt: skip
STEPS = 5  # timesteps 1, 201 | 401, 601, 801
rng = np.random.default_rng(0)
MIX, SHIFT = rng.standard_normal((4, 4)) / 4, rng.standard_normal((16, 16, 4)) / 2
CLEAN = rng.standard_normal((2, 16, 16, 4)).astype("f4")


def linear(x, t, mix=MIX, shift=SHIFT):
    """Return the prediction of a linear model of channels-last x."""
    return x @ mix + shift * (0.5 + t / 1000)


def ours(x, t, step):
    return linear(x, t, jnp.asarray(MIX, jnp.float32), jnp.asarray(SHIFT, jnp.float32))


@functools.partial(jax.jit, static_argnames=("plain",))
def run(how, inversion, x, plain=False):
    if plain:
        return invert(lambda *a: (ours(*a), ()), inversion, x)[0]
    return renoised(ours, ours, inversion, x, how)


def moments(x):
    patches = x.unfold(1, 4, 4).unfold(2, 4, 4).reshape(4, -1, 16)  # (c, patches, 16)
    return patches.mean(-1), patches.var(-1)  # torch's variance is unbiased


def kl(e, r):
    (m, v), (m_r, v_r) = moments(e), moments(r)
    return (torch.log((v_r + 1e-6) / (v + 1e-6)) + (v + (m - m_r) ** 2) / (v_r + 1e-6) - 1).abs().sum()


def self_correlation(e, rolls):
    total = 0.0
    for c in range(4):
        channel, level = e[c], 0
        while True:
            for axis in (0, 1):
                total = total + (channel * torch.roll(channel, int(rolls[level, c]), axis)).mean() ** 2
            if channel.shape[0] <= 8:
                break
            channel, level = torch.nn.functional.avg_pool2d(channel[None, None], 2)[0, 0], level + 1
    return total


def slope(fn, e):
    e = e.detach().clone().requires_grad_(True)
    return torch.autograd.grad(fn(e), e)[0]


def reg(e, r, rolls):
    """Return e after four rounds, given their ``rolls`` (4, 5, levels, c)."""
    for of_round in rolls:
        e = e - 0.065 * slope(lambda x: kl(x, r), e).clamp(-100, 100)
        for one in of_round:
            e = e - 20 * slope(lambda x, one=one: self_correlation(x, one), e) / 5
    return e


def tensor(x):
    """Return channels-last x as torch has it, (c, h, w), float64."""
    return torch.from_numpy(np.array(x, np.float64)).permute(2, 0, 1)


def theirs(how, row, iterations, above):
    """Return the states of one image as ReNoise finds them."""
    abar = SCHEDULE.alphas_cumprod.astype(np.float64)
    z0 = z = tensor(CLEAN[row])
    eta = tensor(how.noise((16, 16, 4))[row])
    states = [z0]

    def model(x, t):
        return tensor(linear(x.permute(1, 2, 0).numpy(), t))

    for i, t in enumerate(range(1, 1000, 200)):
        before = abar[t - 200] if t > 200 else abar[0]
        a = (abar[t] / before) ** 0.5
        b = (1 - abar[t]) ** 0.5 - a * (1 - before) ** 0.5
        n, (first, stop) = (min(iterations, 5), (0, 5)) if t < 250 else (iterations, above)
        target = model(abar[t] ** 0.5 * z0 + (1 - abar[t]) ** 0.5 * eta, t)
        y, kept = z, []
        for k in range(n + 1):
            eps = model(y, t)
            if first <= k < stop:
                kept.append(eps)
            if k >= first:
                eps = reg(eps, target, np.asarray(how.draw(i, k, 16, 4))[:, :, row])
            y = a * z + b * eps
        if kept:
            y = a * z + b * reg(sum(kept) / len(kept), target, np.asarray(how.draw(i, n + 1, 16, 4))[:, :, row])
        z = y
        states.append(z)
    return torch.stack(states).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def inversion():
    return DDIMInversion.create(SCHEDULE, STEPS)


@pytest.mark.parametrize(("iterations", "above", "rows"), [(1, (8, 10), [0, 1]), (2, (2, 3), [1])])
def test_the_states_are_those_of_the_plain_version(inversion, iterations, above, rows):
    how = ReNoise(iterations, above=above, seed=[7865, 3]).bind(SCHEDULE, STEPS, 2)
    assert [part[:2] for part in how.parts] == [(0, 2), (2, 5)]
    got = np.asarray(run(how, inversion, CLEAN))
    for row in rows:
        np.testing.assert_allclose(got[:, row], theirs(how, row, iterations, above), atol=2e-3, rtol=2e-3)


def test_regularised_noise_is_that_of_torch_and_less_like_its_neighbours():
    how = ReNoise().bind(SCHEDULE, STEPS, 2)
    e, r = (rng.standard_normal((2, 16, 16, 4)).astype("f4") for _ in range(2))
    e[:, :, 1:] = 0.6 * e[:, :, 1:] + 0.6 * e[:, :, :-1]  # neighbours alike, which noise has not
    rolls = how.draw(3, 1, 16, 4)
    assert rolls.shape == (4, 5, 2, 2, 4) and rolls[..., 0, :].max() == 7 and rolls[..., 1, :].max() == 3
    got = np.asarray(jax.jit(regularised)(e, r, rolls, 0.065, 100.0, 20.0))
    for row in range(2):
        made = reg(tensor(e[row]), tensor(r[row]), np.asarray(rolls)[:, :, row])
        np.testing.assert_allclose(got[row], made.permute(1, 2, 0).numpy(), atol=1e-3)
    step = np.ones((2, 4), int)
    before, after = (float(self_correlation(tensor(x[0]), step)) for x in (e, got))
    assert after < before / 2


def test_noise_that_is_its_own_target_stays_without_the_correlation():
    e = rng.standard_normal((2, 16, 16, 4)).astype("f4")
    rolls = ReNoise().bind(SCHEDULE, STEPS, 2).draw(0, 0, 16, 4)
    got = jax.jit(regularised)(e, e, rolls, 0.065, 100.0, 0.0)
    np.testing.assert_allclose(got, e, atol=1e-5)


def test_no_iteration_and_no_regularisation_are_the_plain_inversion_bit_for_bit(inversion):
    off = ReNoise(0, regularise=False)
    assert off.plain
    got, plain = run(off.bind(SCHEDULE, STEPS, 2), inversion, CLEAN), run(None, inversion, CLEAN, plain=True)
    np.testing.assert_array_equal(got, plain)
    assert np.abs(np.asarray(run(ReNoise(1).bind(SCHEDULE, STEPS, 2), inversion, CLEAN)) - plain).max() > 1e-2


def test_iterations_alone_find_the_fixed_point(inversion):
    """Of z = G(z_prev, eps(z, t)): a plain step of sampling leads back to where the step came from."""
    how = ReNoise(25, below=(0, 0), regularise=False).bind(SCHEDULE, STEPS, 2)
    states = np.asarray(run(dataclasses.replace(how, parts=((0, 5, how.parts[1][2]),)), inversion, CLEAN))
    i, t = 3, 601
    abar = SCHEDULE.alphas_cumprod.astype(np.float64)
    eps = linear(states[i + 1].astype(np.float64), t)
    x0 = (states[i + 1] - (1 - abar[t]) ** 0.5 * eps) / abar[t] ** 0.5
    back = abar[t - 200] ** 0.5 * x0 + (1 - abar[t - 200]) ** 0.5 * eps
    np.testing.assert_allclose(back, states[i], atol=1e-3)


def test_rows_do_not_depend_on_each_other_and_numbers_do_not_recompile(inversion):
    both = run(ReNoise(seed=[7865, 3]).bind(SCHEDULE, STEPS, 2), inversion, CLEAN)
    for row, seed in enumerate((7865, 3)):
        alone = run(ReNoise(seed=seed).bind(SCHEDULE, STEPS, 1), inversion, CLEAN[row : row + 1])
        np.testing.assert_allclose(both[:, row], alone[:, 0], atol=1e-4)
    before = run._cache_size()
    other = run(
        ReNoise(kl_rate=0.01, kl_clip=1.0, correlation_rate=2.0, seed=1).bind(SCHEDULE, STEPS, 2), inversion, CLEAN
    )
    assert run._cache_size() == before and np.abs(other - both).max() > 1e-4


def test_what_is_no_number_is_not_taken():
    how = ReNoise().bind(SCHEDULE, STEPS, 2)
    e = rng.standard_normal((2, 16, 16, 4)).astype("f4")
    towards = e.copy()
    towards[1] = np.nan
    got = jax.jit(lambda e, r: how.regularised(e, r, 0, 0))(e, towards)
    np.testing.assert_array_equal(got[1], e[1])
    assert np.isfinite(got).all() and np.abs(got[0] - e[0]).max() > 1e-4
