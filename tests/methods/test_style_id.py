"""StyleID (arXiv 2312.09008): inversion and injection by hand, its invariants, its two modes, its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import InputError, Request, Site, hold, style_id
from jaxmix.control import QKV, attend
from jaxmix.controls.style_id import StyleIDControl, StyleIDRowsControl, adain_latents
from jaxmix.methods.style_id import style_id_sites, style_id_start
from jaxmix.samplers import DDIM, DDIMInversion, Phase, Unguided, invert, sample
from jaxmix.schedule import NoiseSchedule
from tests.jobs import predict

from . import by_hand

SITE = Site("up_blocks.1.attentions.0.transformer_blocks.0.attn1", 2, (3, 4))
LDM = NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                    set_alpha_to_one=False, steps_offset=1)  # fmt: skip


def features(seed, images=2, n=12):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((3, images, n, 2, 8))


def control(q, k, v, gamma=0.75, temperature=1.5, strength=1.0, rows=1, content=0, style=0):
    """One step of stored features, (images, n, h, d) each."""

    def numbers(x, dtype=jnp.float32):
        return jnp.broadcast_to(jnp.asarray(x, dtype), (rows,))

    stored = ({SITE.name: jnp.asarray(x, jnp.float32)} for x in (q, k, v))
    indices = (numbers(x, jnp.int32) for x in (content, style))
    return StyleIDControl(*stored, *indices, *(numbers(x) for x in (gamma, temperature, strength)))


def run(arrays, *controls):
    return np.asarray(attend(SITE, QKV(*(jnp.asarray(x, jnp.float32) for x in arrays)), controls)[0])


def test_injection_is_that_of_the_equations():
    q, k, v = features(0, images=3)
    fq, fk, fv = features(1)
    made = control(
        fq, fk, fv, rows=3, content=[0, 1, 1], style=[1, 1, 0], gamma=[0.75, 0.3, 1.0], temperature=[1.5, 1.0, 2.0]
    )
    got = run((q, k, v), made)
    for row, (c, s, gamma, t) in enumerate([(0, 1, 0.75, 1.5), (1, 1, 0.3, 1.0), (1, 0, 1.0, 2.0)]):
        by = by_hand.injected(q[row : row + 1], fq[c : c + 1], fk[s : s + 1], fv[s : s + 1], gamma, t)
        np.testing.assert_allclose(got[row : row + 1], by, atol=1e-5)


def test_zero_strength_is_the_base_bit_for_bit():
    arrays = features(0, images=1)
    np.testing.assert_array_equal(run(arrays, control(*features(1), strength=0.0)), run(arrays))


def test_its_own_features_reproduce_the_stored_run():
    arrays = features(2, images=1)
    same = control(*arrays, gamma=1.0, temperature=1.0)
    np.testing.assert_array_equal(run(features(3, images=1), same), run(arrays))


def test_an_endless_temperature_copies_one_style_value_a_query():
    fq, fk, fv = features(1, images=1)
    got = run(features(0, images=1), control(fq, fk, fv, temperature=1e6))
    for head in range(2):
        far = np.abs(got[0, :, None, head] - fv[0, None, :, head]).max(-1).min(1)
        assert far.max() < 1e-5


def test_the_order_of_the_style_pixels_does_not_matter():
    fq, fk, fv = features(1, images=1)
    order = np.random.default_rng(5).permutation(12)
    arrays = features(0, images=1)
    a, b = run(arrays, control(fq, fk, fv)), run(arrays, control(fq, fk[:, order], fv[:, order]))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_rows_side_by_side_give_the_numbers_of_stored_features():
    q, k, v = features(0, images=3)  # content, style, result
    per_row = [jnp.asarray(x, jnp.float32) for x in ([0.75] * 3, [1.5] * 3, [0.0, 0.0, 1.0])]
    beside = StyleIDRowsControl(jnp.asarray([0, 0, 2]), jnp.asarray([0, 0, 1]), *per_row)
    got = run((q, k, v), beside)
    stored = run((q[2:], k[2:], v[2:]), control(q[:1], k[1:2], v[1:2]))
    np.testing.assert_array_equal(got[2:], stored)
    np.testing.assert_array_equal(got[:2], run((q, k, v))[:2])


def test_the_noise_takes_the_statistics_of_the_style():
    rng = np.random.default_rng(0)
    content, style = rng.standard_normal((2, 4, 5, 3)), 2 + 3 * rng.standard_normal((2, 6, 3, 3))
    got = adain_latents(jnp.asarray(content, jnp.float32), jnp.asarray(style, jnp.float32))
    for row in range(2):
        np.testing.assert_allclose(got[row], by_hand.adain_noise(content[row], style[row]), atol=1e-5)
    same = jnp.asarray(content, jnp.float32)
    np.testing.assert_allclose(adain_latents(same, same), same, atol=1e-6)


@pytest.mark.parametrize("label", ["own", "next"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_inversion_follows_the_equations(label, kind):
    schedule = NoiseSchedule.from_config(LDM.to_config() | {"prediction_type": kind})
    made = DDIMInversion.create(schedule, 50, label)
    abar = schedule.alphas_cumprod.astype(np.float64)
    labels = np.arange(1, 1000, 20)
    np.testing.assert_array_equal(made.timesteps, labels)
    levels = [*abar[labels], abar[999]] if label == "own" else [abar[0], *abar[labels]]
    x = np.random.default_rng(1).standard_normal((2, 3, 3, 4))

    def eps(state, t):
        return np.sin(state) + t / 1000

    def predict(state, t, step):  # the model whose noise that is, at the level where the state stands
        noise = jnp.sin(state) + t / 1000
        if kind == "epsilon":
            return noise, step
        a = made.alphas_cumprod[step]
        return (noise - jnp.sqrt(1 - a) * state) / jnp.sqrt(a), step

    states, steps = invert(predict, made, jnp.asarray(x))
    np.testing.assert_array_equal(steps, np.arange(50))
    by = by_hand.inversion(eps, x, labels, levels)
    np.testing.assert_allclose(states, by, atol=2e-4 if kind == "v_prediction" else 1e-5, rtol=1e-5)


PICTURES = np.random.default_rng(7).integers(0, 255, (2, 16, 16, 3), np.uint8)


@pytest.mark.parametrize("label", ["own", "next"])
def test_a_run_is_undone_by_its_inversion(label):
    """A smooth model and many steps: what is left is the noise's change over a step."""

    def noise(x, t, step):
        return jnp.tanh(x) * 0.5 + 0.2 * jnp.cos(t / 300)

    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 4, 4, 4)), jnp.float32)
    left = []
    for steps in (25, 250):
        states, _ = invert(lambda *a: (noise(*a), ()), DDIMInversion.create(LDM, steps, label), x)
        back = sample([Phase(noise, 0, steps)], DDIM.create(LDM, steps), states[-1])
        left.append(float(jnp.abs(back - x).mean()))
    assert left[1] < 0.02 and left[1] < left[0] / 4


def unguided(pipe, noise, steps, **more):
    request = Request(prompts=[""] * len(noise), steps=steps, latents=noise, guidance=(Unguided(),), **more)
    return pipe.draw(request, output="latent")


def test_without_injection_adain_or_a_skipped_step_it_is_plain_ddim(one_level):
    pipe, steps = one_level, 5
    kwargs = {"steps": steps, "label": "own", "record": style_id_sites(pipe)}
    found = pipe.invert(PICTURES, **kwargs)
    off = style_id(found, found, [(0, 1), (1, 0)], strength=0.0)
    plain, got = (unguided(pipe, found.noise, steps, controls=controls) for controls in ((), (off,)))
    np.testing.assert_array_equal(got, plain)


def test_the_first_step_is_skipped_as_in_the_authors_code(one_level):
    """49 of 50 evaluations, from the noise at 999 given to timestep 961."""
    pipe = one_level
    found = pipe.invert(PICTURES[:1], steps=50, label="own")
    solver = DDIM.create(pipe.schedule, 50)
    assert int(solver.timesteps[1]) == 961 and found.states.shape[1] == 51
    got = unguided(pipe, found.noise, 50, span=(1, None))
    x = np.asarray(found.noise, np.float64)
    context = pipe.encode_prompt([""]).context
    abar = pipe.schedule.alphas_cumprod.astype(np.float64)
    apply = jax.jit(lambda x, t: pipe.unet.apply({"params": pipe.params["unet"]}, x, t, context))
    for t in range(961, 0, -20):
        eps = np.asarray(apply(jnp.asarray(x, jnp.float32), t), np.float64)
        x = by_hand.ddim_move(x, eps, abar[t], abar[t - 20] if t > 20 else abar[0])
    np.testing.assert_allclose(got, x, atol=1e-3)


@pytest.mark.parametrize("label", ["own", "next"])
def test_the_two_modes_draw_the_same_picture(one_level, label):
    pipe, steps = one_level, 5
    where = style_id_sites(pipe)
    found = pipe.invert(PICTURES, steps=steps, label=label, record=where)
    start = style_id_start(found, found, [(0, 1)])
    made = style_id(found, found, [(0, 1)])
    stored = unguided(pipe, start, steps, controls=(made,), span=(1, None))
    numbers = (0.75 * jnp.ones(3), 1.5 * jnp.ones(3), jnp.asarray([0.0, 0, 1]))
    beside = StyleIDRowsControl(jnp.asarray([0, 0, 2]), jnp.asarray([0, 0, 1]), *numbers, sites=where)
    rows, pinned = jnp.concatenate([found.noise, start]), hold(found.seen(), [0, 1], 3)
    both = unguided(pipe, rows, steps, controls=(beside,), edits=(pinned,), span=(1, None))
    np.testing.assert_allclose(both[2:], stored, atol=5e-5)
    np.testing.assert_array_equal(both[:2], np.asarray(pipe.encode_images(PICTURES)))


def test_recorded_features_are_those_of_the_states(one_level):
    pipe, site = one_level, style_id_sites(one_level)
    found = pipe.invert(PICTURES, ["a dog", "a car"], steps=3, guidance_scale=2.0, record=site, label="own")
    context = pipe.encode_prompt(["a dog", "a car"]).context
    t = int(DDIMInversion.create(pipe.schedule, 3, "own").timesteps[1])
    _, seen = predict(pipe.unet, pipe.params["unet"], found.states[:, 1], t, context, mutable="qkv")
    from jaxmix.models.unet import subtree

    assert len(found.features) == 2
    for name, kept in found.features.items():
        for mine, there in zip(kept, subtree(seen["qkv"], name)["qkv"], strict=True):
            np.testing.assert_allclose(mine[:, 1], there, atol=1e-5)


def test_the_default_sites_are_those_of_the_authors():
    """SD 1.5: output blocks 6 to 11, which diffusers calls up_blocks.2 and 3; its port drops the first."""
    from types import SimpleNamespace

    from jaxmix.models import UNetConfig

    pipe = SimpleNamespace(unet=SimpleNamespace(config=UNetConfig()), latent_shape=(64, 64, 4))
    names = [f"up_blocks.{i}.attentions.{j}.transformer_blocks.0.attn1" for i in (2, 3) for j in range(3)]
    import re

    assert [re.escape(name) for name in names] == [p.strip("^$") for p in style_id_sites(pipe).split("|")]
    assert len(style_id_sites(pipe, "diffusers").split("|")) == 5


def test_bad_input_is_one_clear_line(one_level):
    pipe = one_level
    where = style_id_sites(pipe)
    found = pipe.invert(PICTURES[:1], steps=2, record=where)
    with pytest.raises(InputError, match="without the same recorded sites"):
        style_id(found, pipe.invert(PICTURES[:1], steps=2), [(0, 0)])
    made = style_id(found, found, [(0, 0)])
    with pytest.raises(InputError, match="expected an image of the same size"):
        pipe.draw(Request(prompts=[""], steps=2, controls=(made,), height=24, width=24))
    with pytest.raises(InputError, match="matches none of the"):
        pipe.invert(PICTURES[:1], steps=2, record="attn3")
    with pytest.raises(InputError, match="label is 'previous', expected one of next, own"):
        pipe.invert(PICTURES[:1], steps=2, label="previous")
    with pytest.raises(InputError, match="either images or latents"):
        pipe.invert()
    with pytest.raises(InputError, match="found step 2, expected 0 to 1"):
        pipe.draw(Request(prompts=[""], steps=2, span=(2, None)))
    with pytest.raises(InputError, match="gamma: found"):
        style_id(found, found, [(0, 0)], gamma=[1.0, 2.0])
    with pytest.raises(InputError, match="offset: found 2, expected 0 to 1"):
        found.course(2)
