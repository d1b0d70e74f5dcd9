"""MagicFusion (arXiv 2303.13126): the blended noise by hand, its invariants, and in the sampler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import InputError, MagicFusion, Request
from jaxmix.samplers import Unguided
from jaxmix.samplers.fusion import blend, expert_mask, saliency
from jaxmix.testing import random_params
from tests.jobs import predict
from tests.laws.controls import make

from . import by_hand


def random_pairs(seed=0, n=3, hw=(12, 9)):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, n, 2, *hw, 4)) * rng.uniform(0.2, 1, (2, n, 1, 1, 1, 1))


def run(general, expert, scale=7.0, k_general=1.0, k_expert=1.0, strength=1.0, **options):
    n = len(general)
    numbers = [jnp.broadcast_to(jnp.asarray(x, jnp.float32), (n,)) for x in (scale, k_general, k_expert, strength)]
    return np.asarray(blend(*(jnp.asarray(x, jnp.float32) for x in (general, expert)), *numbers, **options))


@pytest.mark.parametrize("own_uncond", [False, True])
def test_the_blend_is_that_of_the_equations(own_uncond):
    general, expert = random_pairs()
    got = run(general, expert, k_general=[1.0, 3.0, 0.2], k_expert=[1.0, 1.0, 0.5], own_uncond=own_uncond)
    for row, (k_g, k_e) in enumerate([(1.0, 1.0), (3.0, 1.0), (0.2, 0.5)]):
        by, mask, omega = by_hand.snb(*general[row], *expert[row], 7.0, k_g, k_e, own_uncond)
        np.testing.assert_allclose(got[row], by, atol=1e-5)
        assert 0 < mask.mean() < 1
        np.testing.assert_allclose([o.sum() for o in omega], 1, atol=1e-9)


def test_the_saliency_map_is_that_of_the_equations():
    x = np.random.default_rng(2).standard_normal((2, 16, 16, 4))
    got = saliency(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, [by_hand.saliency(row) for row in x], atol=1e-5)


def test_the_blur_drifts_and_darkens_the_border_as_the_reference_does():
    flat = saliency(jnp.ones((1, 64, 64, 4)))[0]
    np.testing.assert_allclose([flat[0, 0], flat[0, 32], flat[32, 32]], [0.5625, 0.75, 1.0], atol=1e-6)
    impulse = np.zeros((1, 64, 64, 4), np.float32)
    impulse[0, 8] = 1
    rows = np.asarray(saliency(jnp.asarray(impulse)))[0].sum(1)
    assert (rows * np.arange(64)).sum() / rows.sum() == pytest.approx(7.64, abs=0.03)


def test_equal_models_and_prompts_are_the_general_model_bit_for_bit():
    general, _ = random_pairs()
    got = run(general, general, k_general=2.0, k_expert=0.7)
    np.testing.assert_array_equal(got, run(general, general, strength=0.0))


def test_every_pixel_is_of_one_model_in_all_channels():
    general, expert = random_pairs()
    got = run(general, expert)
    g, e = (np.asarray(run(x, x, strength=0.0)) for x in (general, expert))
    from_g, from_e = np.isclose(got, g, atol=1e-6), np.isclose(got, e, atol=1e-6)
    assert (from_g | from_e).all()
    assert all(len(np.unique(pixel)) == 1 for pixel in from_e.reshape(-1, 4))


def test_a_constant_in_the_saliency_changes_nothing():
    s = jnp.asarray(np.random.default_rng(1).random((2, 2, 8, 8)), jnp.float32)
    one = jnp.ones((2,))
    np.testing.assert_array_equal(expert_mask(s[0], s[1], one, one), expert_mask(s[0], s[1] + 3.0, one, one))


def test_a_larger_k_shrinks_the_area_of_its_own_model():
    """Of normal maps with deviation 1/2 the expert wins P(z > (k^2 - 1) / (4 sqrt(k^2 + 1)))."""
    rng = np.random.default_rng(0)
    s = [jnp.asarray(rng.standard_normal((1, 64, 64)) / 2, jnp.float32) for _ in range(2)]
    shares = [float(expert_mask(*s, jnp.ones(1), jnp.full((1,), k)).mean()) for k in (1.0, 3.0, 10.0)]
    np.testing.assert_allclose(shares, [0.5, 0.263, 0.007], atol=0.03)


def test_logarithms_decide_where_the_softmax_of_the_reference_underflows():
    rng = np.random.default_rng(0)
    s = [jnp.asarray(400 * rng.random((1, 16, 16)), jnp.float32) for _ in range(2)]
    one = jnp.ones(1)
    exact = [np.exp(np.float64(x) - np.float64(x).max()) for x in s]
    truth = exact[1] / exact[1].sum() > exact[0] / exact[0].sum()
    np.testing.assert_array_equal(expert_mask(*s, one, one), truth)
    assert expert_mask(*s, one, one, underflow=True).sum() < truth.sum()


PROMPTS = ["a dog", "a red car"]
OTHER = ["a fish by the sea", "an apple"]


@pytest.fixture(scope="module")
def expert(one_level):
    params = {**one_level.params, "unet": random_params(one_level.unet, 5, single=True)}
    return dataclasses.replace(one_level, params=params)


def draw(pipe, fusion=None, steps=5, **options):
    methods = (*options.pop("methods", ()), *([] if fusion is None else [fusion]))
    return pipe.generate(PROMPTS, [1, 2], steps, 4.0, methods=methods, output="latent", **options)


def test_the_switch_and_the_modes(one_level):
    base = draw(one_level)
    t = [801, 601, 401, 201, 1]
    for mode, switch in ((1, 0), (2, 999)):
        np.testing.assert_array_equal(draw(one_level, MagicFusion(OTHER, mode=mode, switch=switch)), base)
    whole = [draw(one_level, MagicFusion(OTHER, mode=m, switch=s)) for m, s in ((1, 999), (2, 0))]
    np.testing.assert_array_equal(*whole)
    assert np.abs(whole[0] - base).max() > 1e-4
    # At the switch itself t is not above it.
    asked = Request(prompts=PROMPTS, steps=5).checked(one_level)
    for switch, before in ((t[2], 0.4), (t[2] - 1, 0.6), (t[1] - 50, 0.4)):
        windows = [MagicFusion(OTHER, mode=m, switch=switch).window(one_level, asked) for m in (1, 2)]
        assert windows == [(before, 1.0), (0.0, before)]
    early = draw(one_level, MagicFusion(OTHER, mode=2, switch=t[2]))
    assert min(np.abs(early - other).max() for other in (base, whole[0])) > 1e-5


def test_zero_strength_is_the_general_model_bit_for_bit(one_level, expert):
    base = draw(one_level)
    for other in (None, expert):
        np.testing.assert_array_equal(draw(one_level, MagicFusion(OTHER, other, strength=0.0, switch=0)), base)
    half = draw(one_level, MagicFusion(OTHER, expert, strength=[0.0, 1.0], switch=0))
    np.testing.assert_array_equal(half[0], base[0])
    assert np.abs(half[1] - base[1]).max() > 1e-4


def test_one_model_in_three_rows_is_two_models_in_four(one_level):
    same = dataclasses.replace(one_level, params={**one_level.params})
    three, four = (draw(one_level, MagicFusion(OTHER, other, switch=0)) for other in (None, same))
    np.testing.assert_allclose(three, four, atol=2e-4)


def test_a_step_by_hand(one_level, expert):
    """One step of two models: the text of both prompts is the general model's, as in the authors' code."""
    pipe = one_level
    got = draw(pipe, MagicFusion(OTHER, expert, switch=0, k_expert=0.6), steps=1)
    x = pipe.initial_latents([1, 2])
    t = int(np.asarray(pipe.schedule.timesteps(1))[0])

    def branches(model, prompts):
        rows = [
            predict(model.unet, model.params["unet"], x, t, pipe.encode_prompt(p).context) for p in ([""] * 2, prompts)
        ]
        return np.stack([np.asarray(r, np.float64) for r in rows], 1)

    general, special = branches(pipe, PROMPTS), branches(expert, OTHER)
    abar = pipe.schedule.alphas_cumprod.astype(np.float64)
    for row in range(2):
        eps, mask, _ = by_hand.snb(*general[row], *special[row], 4.0, 1.0, 0.6)
        by = by_hand.ddim_move(np.asarray(x[row], np.float64), eps, abar[t], abar[0])
        np.testing.assert_allclose(got[row], by, rtol=1e-3, atol=1e-3 * np.abs(by).max())
        assert 0 < mask.mean() < 1


def test_v_prediction_is_weighed_as_noise(one_level, expert):
    v = [dataclasses.replace(p, schedule=dataclasses.replace(p.schedule, prediction_type="v_prediction")) for p in
         (one_level, expert)]  # fmt: skip
    got, without = (draw(v[0], MagicFusion(OTHER, v[1], switch=0, strength=s)) for s in (1.0, 0.0))
    assert np.isfinite(got).all() and np.abs(got - without).max() > 1e-4
    # The difference of two v is sqrt(abar) times less than that of two eps, which k makes up for.
    general, other = random_pairs()
    a = run(general, other, per_eps=0.25)
    np.testing.assert_array_equal(a, run(general, other, k_general=0.25, k_expert=0.25))


def test_controls_act_inside_either_model(one_level):
    inside = make("out on attn1", 1.0)
    neither = draw(one_level, MagicFusion(OTHER, controls=(), switch=0))
    general = draw(one_level, MagicFusion(OTHER, controls=(), switch=0), controls=(inside,))
    special = draw(one_level, MagicFusion(OTHER, controls=(inside,), switch=0))
    both = draw(one_level, MagicFusion(OTHER, switch=0), controls=(inside,))
    pictures = [neither, general, special, both]
    assert all(np.abs(a - b).max() > 1e-4 for i, a in enumerate(pictures) for b in pictures[:i])
    # A model with and without a control, by one prompt.
    again = draw(one_level, MagicFusion(PROMPTS, controls=(inside,), switch=0))
    assert np.abs(again - draw(one_level)).max() > 1e-4


def test_devices_and_batches_draw_the_same(one_level, expert):
    from jaxmix import data_mesh

    fusion = MagicFusion(OTHER, expert, controls=(make("out on attn1", [1.0, 0.5]),), switch=0)
    one = draw(one_level, fusion)
    np.testing.assert_allclose(draw(one_level, fusion, batch_size=1), one, atol=2e-4)
    np.testing.assert_allclose(draw(one_level, fusion, mesh=data_mesh(2)), one, atol=2e-4)


def test_numbers_never_recompile(one_level):
    from jaxmix.pipeline.job import denoise

    before = denoise._cache_size()
    for k, s in ((1.0, 1.0), (0.3, 0.0)):
        draw(one_level, MagicFusion(OTHER, k_general=k, k_expert=2 * k, strength=s, switch=0))
    assert denoise._cache_size() <= before + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["a dog"]}, "found 1 expert prompts"),
        ({"mode": 3}, "mode is 3, expected 1"),
        ({"switch": 1000}, "switch is 1000, expected a timestep from 0 to 999"),
        ({"k_expert": -1.0}, "k_expert: found -1.0, expected numbers >= 0"),
        ({"negative_prompts": [""]}, "found 1 negative prompts"),
    ],
)
def test_bad_input_is_one_clear_line(one_level, options, message):
    with pytest.raises(InputError, match=message):
        draw(one_level, MagicFusion(**{"prompts": OTHER, **options}))


def test_models_that_do_not_fit_are_refused(one_level):
    pipe = one_level
    others = {
        "prediction_type": dataclasses.replace(
            pipe, schedule=dataclasses.replace(pipe.schedule, prediction_type="v_prediction")
        ),
        "noise schedules": dataclasses.replace(pipe, schedule=dataclasses.replace(pipe.schedule, beta_end=0.02)),
        "vae scaling_factor": dataclasses.replace(
            pipe, vae=pipe.vae.clone(config=dataclasses.replace(pipe.vae.config, scaling_factor=0.13025))
        ),
    }
    for message, other in others.items():
        with pytest.raises(InputError, match=message):
            draw(pipe, MagicFusion(OTHER, other))
    with pytest.raises(InputError, match="blends guided predictions, expected no guidance_rescale"):
        draw(pipe, MagicFusion(OTHER), guidance_rescale=0.5)
    unguided = Request(prompts=PROMPTS, steps=5, guidance=(Unguided(),))
    with pytest.raises(InputError, match="Unguided and SaliencyBlend exclude each other"):
        pipe.draw(unguided, (MagicFusion(OTHER),))
    assert jax.tree.leaves(pipe.params)
