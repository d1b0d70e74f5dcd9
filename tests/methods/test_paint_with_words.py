"""Paint-with-words (arXiv 2211.01324, section 5): its attention by hand, its invariants, bad input."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import InputError, PaintWithWords, Request, Segment, Site
from jaxmix.control import QKV, attend
from jaxmix.controls import paint_with_words as paint
from jaxmix.pipeline.job import denoise
from jaxmix.rows import to_branches
from jaxmix.samplers.sigmas import training_sigmas
from jaxmix.schedule import NoiseSchedule
from tests.jobs import Unconditional

from . import by_hand

HW, TOKENS, GRID = (16, 12), 7, (4, 3)
SITE = Site("a.attn2", 2, GRID)
WEIGHTS = [[0.5, 2.0], [1.0, 0.2]]
WORDS = [[np.asarray([1, 2, 5]), np.asarray([2, 4])], [np.asarray([3]), np.asarray([1, 6])]]
SIGMAS = np.geomspace(0.03, 14.6, 1000)


def masks(seed=0):
    """Two images of two soft masks."""
    return np.random.default_rng(seed).random((2, 2, *HW))


def control_of(weights=WEIGHTS, **options):
    drawn = [paint.paint(m, f, w, TOKENS, [GRID]) for m, f, w in zip(masks(), weights, WORDS, strict=True)]
    return paint.bind({"4x3": np.stack([one["4x3"] for one in drawn])}, SIGMAS, **options)


def inputs(seed=1, rows=2, queries=12, keys=TOKENS):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((rows, n, 2, 4)) for n in (queries, keys, keys)]


def run(control, q, k, v, t=500):
    a = QKV(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    return np.asarray(attend(SITE, a, () if control is None else (control.at(jnp.asarray(0), jnp.asarray(t)),))[0])


@pytest.mark.parametrize("by", paint.BY)
def test_attention_is_that_of_the_equation(by):
    q, k, v = inputs()
    got = run(control_of(weight=[0.4, 0.9], by=by), q, k, v)
    for row, c in enumerate((0.4, 0.9)):
        region = np.zeros((12, TOKENS))
        for mask, f, places in zip(masks()[row], WEIGHTS[row], WORDS[row], strict=True):
            region[:, places] += by_hand.corners(f * mask, GRID).reshape(-1, 1)
        expected = by_hand.painted_attention(q[row], k[row], v[row], region, c, SIGMAS[500], by)
        np.testing.assert_allclose(got[row], expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3), (8, 8), (1, 2), (5, 7), (16, 12)])
def test_masks_keep_their_corners(shape):
    mask = masks()[0, 0]
    got = paint.resize(mask, *shape)
    np.testing.assert_allclose(got, by_hand.corners(mask, shape), atol=1e-12)
    if shape == HW:
        np.testing.assert_array_equal(got, mask)


def test_scaling_all_phrases_is_scaling_the_weight():
    q, k, v = inputs()
    twice = [[2 * f for f in row] for row in WEIGHTS]
    np.testing.assert_allclose(run(control_of(twice), q, k, v), run(control_of(weight=0.8), q, k, v), atol=1e-6)


def test_a_row_does_not_depend_on_its_neighbours_nor_on_where_it_stands():
    q, k, v = inputs()
    both, control = run(control_of(), q, k, v), control_of()
    louder = [x.copy() for x in (q, k, v)]
    louder[0][1] *= 9  # the maximum of the other row
    np.testing.assert_array_equal(run(control, *louder)[0], both[0])
    alone = dataclasses.replace(control, painted={"4x3": control.painted["4x3"][1:]}, weight=control.weight[1:])
    np.testing.assert_allclose(run(alone, q[1:], k[1:], v[1:])[0], both[1], atol=1e-6)


def test_weight_zero_and_unconditional_rows_are_the_base_bit_for_bit():
    q, k, v = inputs(rows=4)
    base, both = run(None, q, k, v), run(to_branches(control_of()), q, k, v)
    np.testing.assert_array_equal(both[::2], base[::2])
    assert np.abs(both[1::2] - base[1::2]).max() > 1e-2
    np.testing.assert_array_equal(run(to_branches(control_of(weight=0.0)), q, k, v), base)


def test_many_queries_see_the_maximum_of_all_and_not_of_their_block():
    """2048 x 257 scores are done in blocks where a control edits each query by itself; this one does not."""
    rng, hw, keys = np.random.default_rng(2), (64, 32), 257
    site, n = Site("a.attn2", 1, hw), hw[0] * hw[1]
    q, k, v = (jnp.asarray(rng.standard_normal((1, m, 1, 4)), jnp.float32) for m in (n, keys, keys))
    q = q.at[0, -1].multiply(20)
    control = paint.bind({"64x32": rng.random((1, n, keys))}, SIGMAS).at(jnp.asarray(0), jnp.asarray(700))
    got = np.asarray(attend(site, QKV(q, k, v), (control,))[0])[0]
    region = np.asarray(control.painted["64x32"], np.float64)[0]
    expected = by_hand.painted_attention(*(np.asarray(x, np.float64)[0] for x in (q, k, v)), region, 0.4, SIGMAS[700])
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_keys_after_those_of_the_prompt_are_no_words():
    x = np.random.default_rng(3).standard_normal((2, 2, 12, TOKENS + 4)).astype(np.float32)
    control = control_of().at(jnp.asarray(0), jnp.asarray(500))
    got = np.asarray(control.logits(SITE, jnp.asarray(x)))
    np.testing.assert_array_equal(got[..., TOKENS:], x[..., TOKENS:])
    np.testing.assert_array_equal(got[..., :TOKENS], control.logits(SITE, jnp.asarray(x[..., :TOKENS])))


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ],
    ids=["epsilon", "v without any signal at the end"],
)
def test_the_noise_is_that_of_the_schedule(config):
    schedule = NoiseSchedule.from_config(config)
    control = paint.bind({"4x3": np.zeros((1, 12, TOKENS))}, training_sigmas(schedule))
    for t in (0, 500, 998, 999):
        abar = np.float64(schedule.alphas_cumprod[t]) or 2.0**-24
        got = control.at(jnp.asarray(0), jnp.asarray(t)).time
        np.testing.assert_allclose(got, np.log(1 + np.sqrt((1 - abar) / abar)), rtol=1e-4)
    between = [float(control.at(jnp.asarray(0), jnp.asarray(t, jnp.float32)).time) for t in (500, 500.5, 501)]
    assert between == sorted(between) and between[0] < between[2]
    if "beta_start" in config:
        assert float(control.at(jnp.asarray(0), jnp.asarray(999)).time) == pytest.approx(2.75, abs=0.01)


PROMPTS = ["a red car left of a red car on the snow", "a dog"]
LEFT = np.pad(np.ones((16, 8)), ((0, 0), (0, 8)))
LAYOUTS = [
    [Segment("a red car", LEFT, 1.5), Segment("the snow", 1 - LEFT), Segment("", LEFT)],
    [Segment("a dog", LEFT)],
]


def test_every_occurrence_of_a_phrase_is_painted(tiny_pipeline):
    control = PaintWithWords(LAYOUTS).control(tiny_pipeline, PROMPTS)
    ids = tiny_pipeline.tokenize(PROMPTS[:1])[0][0].tolist()
    red = tiny_pipeline.token_ids("a red car")
    twice = [i for i in range(len(ids)) if ids[i : i + len(red)] == red]
    places = [p for i in twice for p in range(i, i + len(red))]
    assert len(twice) == 2
    corner = np.asarray(control.painted["8x8"])[0, 0]
    np.testing.assert_array_equal(np.nonzero(corner)[0], places)
    np.testing.assert_array_equal(corner[places], 1.5)
    assert {*control.painted} == {"8x8", "4x4"}


def draw(pipe, *methods):
    request = Request(prompts=PROMPTS, seeds=[3, 4], steps=4, guidance_scale=3.0)
    return pipe.draw(request, methods, output="latent")


def test_pictures_are_the_base_at_zero_and_unguided_and_no_strength_traces_again(tiny_pipeline):
    base = draw(tiny_pipeline)
    on = draw(tiny_pipeline, PaintWithWords(LAYOUTS))
    assert min(np.abs(on - base).max((1, 2, 3))) > 1e-4
    before = denoise._cache_size()
    np.testing.assert_array_equal(draw(tiny_pipeline, PaintWithWords(LAYOUTS, weight=0.0)), base)
    one = draw(tiny_pipeline, PaintWithWords(LAYOUTS, weight=[0.4, 0.0]))
    np.testing.assert_array_equal(one[1], base[1])
    np.testing.assert_array_equal(one[0], on[0])
    more = [[Segment("car", LEFT)] * 5, []]
    again = draw(tiny_pipeline, PaintWithWords(more))
    np.testing.assert_array_equal(again[1], base[1])
    assert denoise._cache_size() == before, "numbers, and how many segments there are, are no part of the program"
    loud, alone = PaintWithWords(LAYOUTS, weight=9.0), Unconditional()
    np.testing.assert_allclose(draw(tiny_pipeline, loud, alone), draw(tiny_pipeline, alone), atol=1e-6)


def test_a_batch_in_which_nothing_is_painted_runs_the_plain_program(tiny_pipeline):
    request = Request(prompts=PROMPTS[1:]).checked(tiny_pipeline)
    assert PaintWithWords([[]]).apply(tiny_pipeline, request) is request


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment("a cat", LEFT)], r"image 0, segment 0 \('a cat'\): the phrase is not in the prompt 'a dog'"),
        (
            [Segment("a dog", LEFT), Segment("", LEFT[:8])],
            r"segment 1 \(''\): found a mask of shape \(8, 16\), expected",
        ),
        ([Segment("a dog", 0 * LEFT)], r"segment 0 \('a dog'\): the mask is empty"),
        ([Segment("a dog", 2 * LEFT)], "found a mask of 0 to 2, expected values from 0 to 1"),
        ([Segment("a dog", LEFT, float("nan"))], r"segment 0 \('a dog'\): weight: found nan, expected a number"),
        ([Segment("a dog", LEFT, True)], "weight: found True, expected a number"),
        ([Segment("a dog", LEFT, "x")], "weight: found 'x', expected a number"),
        ([Segment("a dog", LEFT[:8])], "expected masks of the size of the image"),
        ([], "found no segment"),
    ],
)
def test_bad_layouts_are_one_clear_line(tiny_pipeline, segments, message):
    request = Request(prompts=["a dog"])
    with pytest.raises(InputError, match=message):
        tiny_pipeline.check(request, PaintWithWords([segments]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": float("inf")}, "weight: found inf, expected finite numbers"),
        ({"weight": [0.4, 0.4, 0.4]}, "found 3 values, expected 1 or one for each of the 2 prompts"),
        ({"by": "mean"}, "by: found 'mean', expected one of max, std"),
        ({"sites": r"mid_block.*attn"}, "found mid_block.*attn1 among its sites, expected attn2 alone"),
    ],
)
def test_bad_options_are_one_clear_line(tiny_pipeline, options, message):
    with pytest.raises(InputError, match=message):
        tiny_pipeline.check(Request(prompts=PROMPTS), PaintWithWords(LAYOUTS, **options))
