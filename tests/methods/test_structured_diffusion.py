"""Structured Diffusion (arXiv 2212.05032): its attention by hand, its invariants, and what a user may get wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmix
from jaxmix import InputError, MagicFusion, Request, StructuredDiffusion
from jaxmix.control import QKV, attend
from jaxmix.controls.structured_diffusion import StructuredControl
from jaxmix.models.unet import sites, subtree
from jaxmix.pipeline.job import Denoiser, denoise
from jaxmix.rows import tile, to_branches
from jaxmix.samplers import DDIM
from tests.jobs import Unconditional, plain_job
from tests.laws.controls import FavourFirst

from . import by_hand

PROMPTS = ["a red car left of a white dog on the snow", "a dog"]
PHRASES = [["a red car", "a white dog", "dog"], ["dog"]]


def first_attn2(pipe):
    """Return the first attn2 of a UNet and its projections, float64."""
    site = next(s for s in sites(pipe.unet.config, (8, 8)) if s.name.endswith("attn2"))
    params = subtree(pipe.params["unet"], site.name)
    kernels = [np.asarray(params[name]["kernel"], np.float64) for name in ("to_k", "to_v")]
    return site, [lambda c, w=w: (c @ w).reshape(len(c), site.heads, -1) for w in kernels]


def controls_of(pipe, method, prompts=PROMPTS):
    return method.apply(pipe, Request(prompts=prompts).checked(pipe)).controls


def test_attention_is_the_mean_over_the_phrases(one_level):
    """The paper's sum of separate attentions, the nested phrase and all, is one with the mean of the values."""
    pipe = one_level
    site, (to_k, to_v) = first_attn2(pipe)
    (control,) = controls_of(pipe, StructuredDiffusion(PHRASES))
    context = pipe.encode_prompt(PROMPTS).context
    kv = pipe.unet.precompute(pipe.params["unet"], context, (8, 8), (control,))[site.name]
    q = np.random.default_rng(0).standard_normal((2, 64, *kv.k.shape[2:]))
    got = attend(site, QKV(jnp.asarray(q, jnp.float32), *kv))[0]
    for row, (prompt, phrases) in enumerate(zip(PROMPTS, PHRASES, strict=True)):
        ids, spans = pipe.tokenize([prompt])[0][0].tolist(), []
        for phrase in phrases:
            mine = pipe.token_ids(phrase)
            start = next(i for i in range(len(ids)) if ids[i : i + len(mine)] == mine)
            alone = np.asarray(pipe.encode_prompt([phrase]).context[0], np.float64)
            spans.append((start, alone[1 : 1 + len(mine)]))
        told = np.asarray(context[row], np.float64)
        expected = by_hand.structured_attention(q[row], to_k(told), told, spans, to_v)
        np.testing.assert_allclose(got[row], expected, atol=1e-5)
        plain = by_hand.structured_attention(q[row], to_k(told), told, [], to_v)
        assert np.abs(plain - expected).max() > 1e-3


def test_each_encoder_of_sdxl_is_told_its_own_half(tiny_sdxl):
    (control,) = controls_of(tiny_sdxl, StructuredDiffusion([["a dog"]]), ["the snow, a dog"])
    plain, alone = (np.asarray(tiny_sdxl.encode_prompt([text]).context[0]) for text in ("the snow, a dog", "a dog"))
    expected = np.zeros_like(plain)
    expected[4:6] = (alone[1:3] - plain[4:6]) / 2
    np.testing.assert_allclose(control.change[0], expected, atol=1e-6)
    assert np.abs(expected[:, :16]).max() > 1e-3 and np.abs(expected[:, 16:]).max() > 1e-3


def test_keys_rows_without_phrases_and_unconditional_rows_stay_bit_for_bit(one_level):
    pipe = one_level
    method = StructuredDiffusion([PHRASES[0], []])
    request = Request(prompts=PROMPTS).checked(pipe)
    context = request.states(pipe).context.reshape(4, 32, 16)
    controls = to_branches(tile(method.apply(pipe, request).controls, 2))
    base, got = (pipe.unet.precompute(pipe.params["unet"], context, (8, 8), c) for c in ((), controls))
    for name, kv in base.items():
        np.testing.assert_array_equal(got[name].k, kv.k)
        change = np.abs(np.asarray(got[name].v - kv.v)).max((1, 2, 3))
        assert change[[0, 2, 3]].tolist() == [0, 0, 0] and change[1] > 1e-3
    assert StructuredDiffusion([[], []]).apply(pipe, request) is request


def test_a_row_does_not_depend_on_its_neighbours(one_level):
    (both,) = controls_of(one_level, StructuredDiffusion(PHRASES))
    (alone,) = controls_of(one_level, StructuredDiffusion(PHRASES[1:]), PROMPTS[1:])
    np.testing.assert_allclose(both.change[1], alone.change[0], atol=1e-6)


def draw(pipe, *methods):
    request = Request(prompts=PROMPTS, seeds=[3, 4], steps=4, guidance_scale=3.0)
    return pipe.draw(request, methods, output="latent")


def test_pictures_are_the_base_at_zero_and_unguided_and_no_strength_traces_again(one_level):
    base, on = draw(one_level), draw(one_level, StructuredDiffusion(PHRASES))
    assert min(np.abs(on - base).max((1, 2, 3))) > 1e-4
    before = denoise._cache_size()
    np.testing.assert_array_equal(draw(one_level, StructuredDiffusion(PHRASES, strength=0.0)), base)
    one = draw(one_level, StructuredDiffusion([PHRASES[0], []], strength=[1.0, 0.7]))
    np.testing.assert_allclose(one[0], on[0], atol=1e-4)  # its phrases were encoded beside others
    np.testing.assert_array_equal(one[1], base[1])
    loud = StructuredDiffusion(PHRASES, strength=9.0)
    draw(one_level, loud)
    assert denoise._cache_size() == before, "one trace for any strengths and numbers of phrases"
    alone = Unconditional()
    np.testing.assert_allclose(draw(one_level, loud, alone), draw(one_level, alone), atol=1e-6)


def test_no_step_does_more_work(one_level):
    """The control is nowhere in the loop: its equations are those of the sampler without it."""
    pipe = one_level
    request = Request(prompts=PROMPTS).checked(pipe)

    def loop(*controls):
        noise, text = pipe.initial_latents([0, 1]), request.states(pipe)
        job = plain_job(pipe.unet, pipe.params["unet"], noise, text.context, jnp.ones(2), controls)
        jaxpr = jax.make_jaxpr(denoise.__wrapped__)(job, DDIM.create(pipe.schedule, 4))
        (scan,) = (e for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan")
        return [(e.primitive.name, tuple(v.aval.shape for v in e.outvars)) for e in scan.params["jaxpr"].jaxpr.eqns]

    assert loop(*controls_of(pipe, StructuredDiffusion(PHRASES))) == loop()


def test_further_branches_keep_their_own_words(one_level):
    """A place in the image's prompt is another word in the expert's of MagicFusion, by either model."""
    pipe, seen = one_level, []

    @jaxmix.dataclass
    class Spy(StructuredControl):
        def prepare(self, text, hw):
            seen.append(np.asarray(self.strength).tolist())
            return self

    request = Request(prompts=PROMPTS, branches=(["a fish", "a boat"],)).checked(pipe)
    control = Spy(jnp.ones((2, 32, 16)), jnp.asarray([0.5, 2.0]), sites=r"attn2$")
    Denoiser(pipe.unet, pipe.params["unet"], request.states(pipe), (control,)).branches((0, 1, 2), (8, 8))
    assert seen == [[0, 0.5, 0, 0, 2, 0]]
    blended = Request(prompts=PROMPTS, controls=(control, FavourFirst(jnp.ones(2)))).checked(pipe)
    (blend,) = MagicFusion(["a fish", PROMPTS[1]], expert=pipe).apply(pipe, blended).guidance
    words, other = blend.expert.controls
    assert (np.asarray(words.strength).tolist(), np.asarray(other.scale).tolist()) == ([0, 2], [1, 1])


@pytest.mark.parametrize(
    ("phrases", "message"),
    [
        (["a cat"], r"image 0, phrase 0 \('a cat'\): the phrase is not in the prompt 'a dog'"),
        (["a dog", " "], r"image 0, phrase 1 \(' '\): the phrase is not in the prompt"),
        ("a dog", "image 0: phrases: found 'a dog', expected a list"),
        ([["a", "dog"]], "expected a list of parts of its prompt"),
    ],
)
def test_bad_phrases_are_one_clear_line(one_level, phrases, message):
    with pytest.raises(InputError, match=message):
        one_level.check(Request(prompts=["a dog"]), StructuredDiffusion([phrases]))


def test_bad_options_are_one_clear_line(one_level):
    for options, message in (
        ({"phrases": PHRASES[:1]}, "phrases: found 1, expected a list for each of the 2 prompts"),
        ({"strength": float("nan")}, "strength: found nan, expected finite numbers"),
        ({"sites": "attn1$"}, "matches none of the .* sites"),
    ):
        with pytest.raises(InputError, match=message):
            one_level.check(Request(prompts=PROMPTS), StructuredDiffusion(**{"phrases": PHRASES, **options}))
