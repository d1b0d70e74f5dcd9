"""InstantStyle-Plus: its parts together and alone, its guidance by hand, what recompiles, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import (
    ComposableDiffusion,
    ControlNet,
    ImageEncoder,
    InputError,
    InstantStylePlus,
    MagicFusion,
    ReNoise,
    Request,
    StyleAligned,
    StyleID,
)
from jaxmix.models import CLIPVisionConfig, CLIPVisionModel, ControlNetConfig, ControlNetModel
from jaxmix.pipeline.descriptors import eye_of
from jaxmix.pipeline.job import Denoiser, denoise, phases
from jaxmix.samplers import ClassifierFree, Likeness, make_solver, stack
from jaxmix.testing import random_params
from tests.methods.test_ip_adapter import VISION, random_adapter

STEPS = 2
CAPTIONS = ["a red car on the snow", "a dog"]
CONTENT, STYLE = np.random.default_rng(1).integers(0, 255, (2, 2, 16, 16, 3), np.uint8)
REQUEST = Request(prompts=CAPTIONS, seeds=[1, 2], steps=STEPS, guidance_scale=5.0)


@pytest.fixture(scope="module")
def encoder():
    model = CLIPVisionModel(CLIPVisionConfig.from_dict(VISION))
    return ImageEncoder(model, random_params(model.abstract_params(), 0))


@pytest.fixture(scope="module")
def parts(one_level, encoder):
    beside = ControlNetModel(ControlNetConfig.of_unet(one_level.unet.config, (16, 32)))
    adapter = random_adapter(one_level, encoder)
    return {
        "content_adapter": adapter,
        "style_adapter": adapter,
        "tile": ControlNet(beside.config, random_params(beside, 8)),
        "style_blocks": "up_blocks.0",  # the one up block of the tiny UNet
    }


@pytest.fixture(scope="module")
def plus(parts):
    def make(**changes):
        return InstantStylePlus(**{"content": CONTENT, "style": STYLE, **parts, **changes})

    return make


def drawn(pipe, method, request=REQUEST):
    return pipe.draw(request, () if method is None else (method,), output="latent")


def test_it_is_its_parts_from_the_inverted_content(one_level, plus, parts):
    made = drawn(one_level, plus())
    start = one_level.invert(CONTENT, CAPTIONS, steps=STEPS, renoise=ReNoise()).noise
    adapter = parts["content_adapter"]
    by_hand = (
        parts["tile"].on(list(CONTENT), 0.4),
        adapter.on(list(CONTENT), 0.2),
        adapter.on(list(STYLE), 1.2, blocks="up_blocks.0"),
    )
    expected = one_level.draw(dataclasses.replace(REQUEST, latents=start), by_hand, output="latent")
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_two_methods_that_say_where_images_start_exclude_each_other_before_anything_compiles(one_level, plus):
    start = StyleID(list(CONTENT), list(STYLE))
    before = denoise._cache_size()
    for pair in [(plus(), start), (start, plus())]:
        with pytest.raises(InputError, match="exclude each other: both say where the images start"):
            one_level.draw(REQUEST, pair)
    assert denoise._cache_size() == before


def test_the_sampler_is_ddim_where_none_is_named(one_level, plus):
    other = dataclasses.replace(one_level, sampler="pndm")
    for method in (plus(), StyleID(list(CONTENT), list(STYLE)), StyleAligned([2], pictures={0: CONTENT[0]}, offset=1)):
        assert other.check(REQUEST, (method,)).sampler == "ddim"
        with pytest.raises(InputError, match="found the sampler euler, expected ddim"):
            other.check(dataclasses.replace(REQUEST, sampler="euler"), (method,))
    assert other.check(REQUEST, (plus(renoise=None),)).sampler == "pndm"


def test_rows_side_by_side_are_each_alone(one_level, plus):
    both = drawn(one_level, plus(style_scale=[1.2, 0.5], tile_scale=[0.0, 0.4]))
    for i, (style_scale, tile_scale) in enumerate([(1.2, 0.0), (0.5, 0.4)]):
        one = plus(content=CONTENT[i], style=STYLE[i], style_scale=style_scale, tile_scale=tile_scale)
        np.testing.assert_allclose(drawn(one_level, one, REQUEST.take([i]))[0], both[i], atol=1e-4)


def test_strengths_are_data_and_at_zero_they_leave_the_plain_run(one_level, plus):
    drawn(one_level, plus())
    before = denoise._cache_size()
    off = drawn(one_level, plus(content_scale=0.0, style_scale=[0.0, 0.0], tile_scale=0))
    moved = drawn(one_level, plus(content_scale=[0.9, 0.1], style_scale=0.3, tile_scale=1.0))
    assert denoise._cache_size() == before and np.abs(moved - off).max() > 1e-3
    # In float, as the method has it at the size of the images: a last bit of a picture grows in an inversion.
    seen = CONTENT.astype("f4") / 255
    start = jnp.concatenate(
        [one_level.invert(seen[i : i + 1], [CAPTIONS[i]], steps=STEPS, renoise=ReNoise()).noise for i in (0, 1)]
    )
    plain = drawn(one_level, None, dataclasses.replace(REQUEST, latents=start))
    np.testing.assert_array_equal(off, plain)


def test_a_refinement_that_is_off_is_the_plain_inversion_bit_for_bit(one_level):
    plain = one_level.invert(CONTENT, CAPTIONS, steps=STEPS)
    off = one_level.invert(CONTENT, CAPTIONS, steps=STEPS, renoise=ReNoise(0, regularise=False))
    np.testing.assert_array_equal(off.states, plain.states)
    on = one_level.invert(CONTENT, CAPTIONS, steps=STEPS, renoise=ReNoise())
    assert on.states.shape == plain.states.shape and np.abs(on.states - plain.states).max() > 1e-3
    np.testing.assert_array_equal(on.states[:, 0], plain.states[:, 0])


def test_guidance_is_the_gradient_of_the_equation(one_level, encoder):
    """One prediction in its order of operations, with a UNet that halves its input and finite differences."""
    pipe, n = one_level, 2
    eye, solver = eye_of(pipe, encoder, "x"), make_solver("ddim", pipe.schedule, STEPS)
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((n, 8, 8, 4)), jnp.float32)
    style, content = (jnp.asarray(v / np.linalg.norm(v, axis=1, keepdims=True), jnp.float32)
                      for v in rng.standard_normal((2, n, 12)))  # fmt: skip
    scales = jnp.asarray([3.0, 0.0]), jnp.asarray([0.5, 0.0])

    class Half:
        def branches(self, which, hw):
            factors = jnp.asarray([0.3, 0.5])[jnp.asarray(which)]  # unconditional, conditional
            return lambda x, t, step: factors[None, :, None, None, None] * x[:, None]

    made = Likeness(style, content, *scales, eye=eye)
    guided = stack((ClassifierFree(jnp.full(n, 5.0)), made))[-1](Half(), solver, (8, 8))
    got = np.asarray(jax.jit(lambda x: guided(x, jnp.asarray(1), jnp.asarray(0)))(x))
    signal, sigma = float(solver.signals[0]), float(solver.sigmas[0])

    @jax.jit
    def loss(x):
        x0 = (x - sigma * 0.5 * x) / signal
        f_style, f_content = eye(sigma * x0 + (1 - sigma) * x)
        return -scales[0] * (f_style * style).sum(-1) - scales[1] * (f_content * content).sum(-1)

    free = np.asarray((0.3 + 5 * 0.2) * x)
    np.testing.assert_allclose(got[1], free[1], atol=1e-6)  # of weights 0
    way = (got - free)[0]
    way = jnp.asarray(np.stack([way, 0 * way]) / np.linalg.norm(way), jnp.float32)
    slope = float((loss(x + 0.01 * way) - loss(x - 0.01 * way))[0] / 0.02)
    np.testing.assert_allclose(np.linalg.norm((got - free)[0]), sigma * slope, rtol=2e-2)


def test_weights_of_zero_make_no_second_call_and_others_guide_their_own_rows(one_level, plus, encoder, monkeypatch):
    bare = {"content_adapter": None, "style_adapter": None, "tile": plus().tile, "renoise": None, "guide": encoder}
    checked, solver = REQUEST.checked(one_level), make_solver("ddim", one_level.schedule, STEPS)

    def asked(**weights):
        """Return which branches a step predicts, one entry for each call of the UNet."""
        job = one_level.job(plus(**bare, **weights).apply(one_level, checked), solver)
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(Denoiser, "branches", lambda self, which, hw: calls.append(tuple(which)))
            list(phases(job, solver, (8, 8), 0, None))
        return calls

    assert asked(style_guidance=[0.0, 0.0], content_guidance=0.0) == [(0, 1)]
    assert asked(style_guidance=[0.0, 2.0]) == [(0, 1), (1,)]
    plain = drawn(one_level, plus(**bare))
    guided = drawn(one_level, plus(**bare, style_guidance=[0.0, 50.0]))
    np.testing.assert_array_equal(guided[0], plain[0])
    assert np.isfinite(guided).all() and np.abs(guided[1] - plain[1]).max() > 1e-4
    before = denoise._cache_size()
    drawn(one_level, plus(**bare, style_guidance=0.0, content_guidance=[7.0, 0.0]))
    assert denoise._cache_size() == before


def test_guidance_excludes_another_that_is_not_its_base(one_level, plus, encoder):
    made = plus(guide=encoder, style_guidance=1.0)
    one_level.check(REQUEST, (made, ComposableDiffusion([["fog"], []])))
    with pytest.raises(InputError, match="SaliencyBlend and Likeness exclude each other"):
        one_level.check(REQUEST, (MagicFusion(["a fish", "a boat"], switch=0), made))
    one_level.check(REQUEST, (MagicFusion(["a fish", "a boat"], switch=0), plus()))


def test_sdxl_takes_it(tiny_sdxl, encoder):
    adapter = random_adapter(tiny_sdxl, encoder)
    made = InstantStylePlus(CONTENT[0], STYLE[0], adapter, adapter, style_blocks="up_blocks.0")
    got = drawn(tiny_sdxl, made, REQUEST.take([0]))
    assert got.shape == (1, 8, 8, 4) and np.isfinite(got).all()


MISTAKES = [
    ({}, {"sampler": "euler"}, "found the sampler euler, expected ddim"),
    ({}, {"prompts": ["a dog", " "]}, r"prompts\[1\]: found ' ', expected a caption of the content"),
    ({}, {"latents": np.zeros((2, 8, 8, 4))}, "found images, latents or a span to start from"),
    ({"content": None}, {}, "content: found None, expected a picture"),
    ({"content": np.zeros((16, 32, 3), np.uint8)}, {}, r"content\[0\]: found 16 x 32 pixels, expected the shape"),
    ({"content": CONTENT[:1]}, {}, "content: found 1 values, expected 1 or one for each of the 2 prompts"),
    ({"style": None}, {}, "style: found None, expected a picture for the parts that follow it"),
    ({"style_adapter": None}, {}, "style: found a picture that nothing follows"),
    ({"renoise": None, "tile": None, "content_adapter": None}, {}, "content: found nothing that follows it"),
    ({"style_guidance": 1.0}, {}, "guide: found none with style_guidance, expected an ImageEncoder or a CSD"),
    ({"guide": "mini-clip"}, {}, "guide: found 'mini-clip', expected an ImageEncoder or a CSD"),
    ({"tile": "tile"}, {}, "tile: found 'tile', expected a ControlNet"),
    ({"renoise": ReNoise(seed=[1, 2])}, {}, r"renoise: found the seeds \[1, 2\], expected one for all"),
    ({"style_guidance": [1.0, np.nan], "guide": "mini"}, {}, "style_guidance: found .*, expected finite numbers"),
]


@pytest.mark.parametrize(("changes", "asked", "message"), MISTAKES)
def test_a_mistake_is_one_line_before_anything_compiles(one_level, plus, changes, asked, message):
    with pytest.raises(InputError, match=message):
        one_level.check(dataclasses.replace(REQUEST, **asked), (plus(**changes),))


def test_an_encoder_that_gives_no_vector_is_refused(one_level, plus, encoder):
    model = CLIPVisionModel(dataclasses.replace(encoder.model.config, projection=False))
    with pytest.raises(InputError, match="guide: found an image encoder without a projection"):
        one_level.check(REQUEST, (plus(guide=ImageEncoder(model, encoder.params)),))


def test_a_refinement_that_means_nothing_is_refused(one_level):
    with pytest.raises(InputError, match="iterations: found -1, expected a whole number of at least 0"):
        ReNoise(-1)
    with pytest.raises(InputError, match="below: found 5, expected"):
        ReNoise(below=5)
    with pytest.raises(InputError, match="found the label 'own', expected 'next'"):
        one_level.invert(CONTENT, steps=STEPS, label="own", renoise=ReNoise())
    with pytest.raises(InputError, match="renoise: found record with it"):
        one_level.invert(CONTENT, steps=STEPS, record="attn1", renoise=ReNoise())
    with pytest.raises(InputError, match="found 1 seeds, expected 1 or one for each of the 2"):
        one_level.invert(CONTENT, steps=STEPS, renoise=ReNoise(seed=[1]))
