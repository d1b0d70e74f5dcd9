"""Composable Diffusion (arXiv 2206.01714): the equation by hand, its invariants, how AND is read, and images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import ComposableDiffusion, DenseDiffusion, InputError, Request, Segment, split_and
from jaxmix.models.unet import AddedCond
from jaxmix.pipeline.job import denoise
from jaxmix.rows import tile, to_branches
from jaxmix.samplers import ClassifierFree, Composed, SaliencyBlend, blend, make_solver, stack
from tests.jobs import predict

from . import by_hand

SCALE = jnp.asarray([7.5, 3.0, 1.0])


class Fixed:
    """A denoiser whose branches predict (n, branches, h, w, c), whatever they are asked."""

    def __init__(self, rows):
        self.rows = jnp.asarray(rows, jnp.float32)

    def branches(self, which, hw):
        return lambda x, t, step: self.rows[:, jnp.asarray(which)]


def predictions(branches=4, n=3):
    return np.random.default_rng(0).standard_normal((n, branches, 6, 5, 4)).astype(np.float32)


def guided(rows, *more, scale=SCALE, rescale=None, solver=None):
    """Return the prediction of the last of some guidances on fixed ones."""
    guidance = stack([ClassifierFree(scale, None if rescale is None else jnp.asarray(rescale)), *more])
    zero = jnp.zeros((), jnp.int32)
    return np.asarray(guidance[-1](Fixed(rows), solver, (6, 5))(jnp.zeros((len(rows), 6, 5, 4)), zero, zero))


def composed(weights, branches):
    return Composed(jnp.asarray(weights, jnp.float32), branches=branches)


WEIGHTS = [[1.1, 0.8, 0.3], [1.0, -0.7, 2.0], [0.5, 0.0, -1.5]]


@pytest.mark.parametrize("rescale", [None, [0.7, 0.0, 1.0]])
def test_the_prediction_is_that_of_the_equation(rescale):
    rows = predictions()
    got = guided(rows, composed(WEIGHTS, (1, 2, 3)), rescale=rescale)
    for i, (row, weights) in enumerate(zip(np.float64(rows), WEIGHTS, strict=True)):
        expected = by_hand.composed(row[0], row[1:], weights, float(SCALE[i]))
        if rescale is not None:  # towards the conjunction, which is what scale 1 predicts
            expected = by_hand.rescaled(expected, by_hand.composed(row[0], row[1:], weights, 1.0), rescale[i])
        np.testing.assert_allclose(got[i], expected, atol=2e-5)


def test_the_authors_rule_is_that_of_scale_one():
    """In their script every weight is a guidance scale, and no other multiplies it."""
    rows = predictions()
    got = guided(rows, composed([[7.5, 7.5, -3.0]] * 3, (1, 2, 3)), scale=jnp.ones(3))
    for row, got_row in zip(np.float64(rows), got, strict=True):
        expected = row[0] + 7.5 * (row[1] - row[0]) + 7.5 * (row[2] - row[0]) - 3.0 * (row[3] - row[0])
        np.testing.assert_allclose(got_row, expected, atol=2e-5)


def test_one_prompt_and_two_equal_halves_are_classifier_free_guidance_bit_for_bit():
    rows = predictions(2)
    for rescale in (None, [0.7, 0.2, 0.0]):
        plain = guided(rows, rescale=rescale)
        np.testing.assert_array_equal(guided(rows, composed([[1.0]] * 3, (1,)), rescale=rescale), plain)
        twice = rows[:, [0, 1, 1]]
        np.testing.assert_array_equal(guided(twice, composed([[0.5, 0.5]] * 3, (1, 2)), rescale=rescale), plain)


def test_prompts_of_weight_zero_change_no_bit():
    rows = predictions()
    rows[:, 2:] *= 1e4
    padded = guided(rows, composed([[1.3, 0.0, 0.0], [1.0, 0.0, 0.0], [-0.4, 0.0, 0.0]], (1, 2, 3)))
    np.testing.assert_array_equal(padded, guided(rows[:, :2], composed([[1.3], [1.0], [-0.4]], (1,))))
    np.testing.assert_array_equal(padded[1], guided(rows[:, :2])[1])


def test_blending_is_built_on_the_conjunction():
    """MagicFusion's general model is the composed one, wherever the branches of either stand."""
    rows, weights, ones = predictions(5), [[1.0, 0.6, -0.3]] * 3, jnp.ones(3)
    solver = make_solver("ddim", _schedule(), 4)
    for parts, branch in (((1, 2, 3), 4), ((1, 3, 4), 2)):
        got = guided(rows, composed(weights, parts), SaliencyBlend(ones, ones, ones, branch=branch), solver=solver)
        both = np.float64(rows)
        general = [by_hand.composed(row[0], row[list(parts)], weights[0], 1.0) for row in both]
        pair = np.stack([both[:, 0], general], 1), both[:, [0, branch]]
        np.testing.assert_allclose(
            got, blend(*(jnp.asarray(x, jnp.float32) for x in pair), SCALE, ones, ones, ones), atol=5e-5
        )


def _schedule():
    from jaxmix.schedule import NoiseSchedule
    from jaxmix.testing import TINY_SCHEDULE

    return NoiseSchedule.from_config(TINY_SCHEDULE)


# How AND is read


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat :1.1 AND by the sea :0.8", [("a cat", 1.1), ("by the sea", 0.8)]),
        ("a cat AND a dog:-0.5 AND fog : .25", [("a cat", 1.0), ("a dog", -0.5), ("fog", 0.25)]),
        ("a cat :+2\nAND\tfog :1e-1", [("a cat", 2.0), ("fog", 0.1)]),
        ("a cat :x AND a clock at 12:30 sharp", [("a cat :x", 1.0), ("a clock at 12:30 sharp", 1.0)]),
        ("a: b :2 AND c:", [("a: b", 2.0), ("c:", 1.0)]),
        ("a cat and a dog :2", [("a cat and a dog :2", 1.0)]),
        ("SAND ANDROID fAND (AND) :2", [("SAND ANDROID fAND (AND) :2", 1.0)]),
        ("", [("", 1.0)]),
    ],
)
def test_and_joins_prompts_and_a_number_behind_a_colon_is_a_weight(prompt, parts):
    assert split_and(prompt) == parts


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat AND", "found no text in part 2 of 2 of 'a cat AND', expected a prompt on each side of AND"),
        ("AND a cat", "found no text in part 1 of 2"),
        ("a AND  AND b", "found no text in part 2 of 3"),
        ("a AND :0.5", "found no text in part 2 of 2"),
        ("AND", "found no text in part 1 of 2"),
        ("a :nan AND b", "found the weight nan of 'a', expected a finite one"),
        ("a AND b :-inf", "found the weight -inf of 'b'"),
        ("a AND b :1e39", "found the weight 1e39 of 'b'"),
    ],
)
def test_prompts_that_cannot_be_composed_are_one_line(prompt, message):
    with pytest.raises(InputError, match=message):
        split_and(prompt)
    with pytest.raises(InputError, match=r"prompts\[1\]: found"):
        ComposableDiffusion.parse(["a dog", prompt])


def test_prompts_are_read_into_first_parts_and_the_method():
    firsts, method = ComposableDiffusion.parse(["a cat :1.1 AND fog :0.8", "a dog"])
    assert firsts == ["a cat", "a dog"]
    assert method == ComposableDiffusion([["fog"], []], [[1.1, 0.8], [1.0]])


# In the sampler

PROMPTS, FURTHER = ["a dog", "a red car"], [["by the sea", "fog"], ["an apple"]]


def draw(pipe, *methods, steps=2, prompts=PROMPTS, seeds=(1, 2), **options):
    return pipe.generate(prompts, list(seeds), steps, 4.0, methods=methods, output="latent", **options)


@pytest.mark.parametrize("family", ["one_level", "tiny_sdxl"])
def test_a_step_by_hand(family, request):
    """Each branch has its own text and, for SDXL, its own pooled text beside the sizes of the image."""
    pipe = request.getfixturevalue(family)
    weights = [[1.2, 0.7, -0.4], [1.0, 0.5]]
    got = draw(pipe, ComposableDiffusion(FURTHER, weights), steps=1, height=16, width=16)
    x, t = pipe.initial_latents([1, 2]), int(np.asarray(pipe.schedule.timesteps(1))[0])
    ids = jnp.asarray([[16.0, 16, 0, 0, 16, 16]])
    abar = pipe.schedule.alphas_cumprod.astype(np.float64)
    for row in range(2):

        def predicted(prompt, row=row):
            text = pipe.encode_prompt([prompt])
            extra = None if text.pooled is None else AddedCond(text.pooled, ids)
            made = predict(pipe.unet, pipe.params["unet"], x[row : row + 1], t, text.context, (), extra)
            return np.asarray(made, np.float64)[0]

        u, *conds = (predicted(prompt) for prompt in ("", PROMPTS[row], *FURTHER[row]))
        eps = by_hand.composed(u, conds, weights[row], 4.0)
        by = by_hand.ddim_move(np.asarray(x[row], np.float64), eps, abar[t], abar[0])
        np.testing.assert_allclose(got[row], by, rtol=1e-3, atol=1e-3 * np.abs(by).max())


def test_images_depend_on_their_own_prompts_alone_and_weights_never_recompile(one_level):
    method = ComposableDiffusion(FURTHER, [[1.2, 0.7, -0.4], [1.0, 0.5]])
    both = draw(one_level, method)
    before = denoise._cache_size()
    # The second image has one further prompt, and the same beside another image of three.
    beside = ComposableDiffusion([["snow", "night"], FURTHER[1]], [[0.1, 2.0, 1.0], [1.0, 0.5]])
    np.testing.assert_array_equal(draw(one_level, beside)[1], both[1])
    # So it has where the last is said to be none, and where the images come in the other order.
    none = ComposableDiffusion([FURTHER[0], ["an apple", "a fish"]], [[1.2, 0.7, -0.4], [1.0, 0.5, 0.0]])
    np.testing.assert_array_equal(draw(one_level, none), both)
    turned = ComposableDiffusion(FURTHER[::-1], method.weights[::-1])
    np.testing.assert_array_equal(draw(one_level, turned, prompts=PROMPTS[::-1], seeds=(2, 1))[::-1], both)
    negated = draw(one_level, ComposableDiffusion(FURTHER, [[1.2, -0.7, -0.4], [1.0, -0.5]]))
    assert min(np.abs(a - b).max() for a, b in zip(negated, both, strict=True)) > 1e-3
    assert denoise._cache_size() == before
    np.testing.assert_allclose(draw(one_level, method, batch_size=1), both, atol=2e-4)


def test_devices_draw_the_same(one_level):
    from jaxmix import data_mesh

    method = ComposableDiffusion(FURTHER, [[1.2, 0.7, -0.4], [1.0, 0.5]])
    one = draw(one_level, method)
    np.testing.assert_allclose(draw(one_level, method, mesh=data_mesh(2)), one, atol=2e-4)


def test_nothing_further_is_the_image_alone_and_costs_nothing(one_level):
    alone = draw(one_level)
    before = denoise._cache_size()
    for further, weights in (([[], []], None), (FURTHER, [[1, 0, 0], [1, 0]])):
        np.testing.assert_array_equal(draw(one_level, ComposableDiffusion(further, weights)), alone)
    assert denoise._cache_size() == before
    # A weight of the only prompt multiplies its guidance scale.
    weighed = draw(one_level, ComposableDiffusion([[], []], [[0.5], [2.0]]))
    scaled = one_level.generate(PROMPTS, [1, 2], 2, [2.0, 8.0], output="latent")
    np.testing.assert_allclose(weighed, scaled, atol=2e-4)


def test_a_layout_moves_the_words_of_the_first_prompt_alone(one_level):
    """The places of its phrases among the tokens are those of no other prompt; pixels are those of all."""
    left = np.pad(np.ones((16, 8), bool), ((0, 0), (0, 8)))
    method = DenseDiffusion([[Segment("a dog", left)], [Segment("a red car", left)]])
    request = method.apply(one_level, Request(prompts=PROMPTS).checked(one_level))
    control = to_branches(tile(request.controls, 2)[0], (0.0, 1.0, 1.0), (0.0, 1.0, 0.0))
    np.testing.assert_allclose(control.cross, [0, 1, 0] * 2)
    np.testing.assert_allclose(control.self_, np.float32([0, 0.3, 0.3] * 2))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (ComposableDiffusion([["fog"]]), r"ComposableDiffusion.prompts: found 1, expected a list for each of 2"),
        (ComposableDiffusion(["fog", "sea"]), r"prompts\[0\]: found 'fog', expected a list of prompts"),
        (ComposableDiffusion([[], [3]]), r"prompts\[1\]: found \[3\], expected a list of prompts"),
        (ComposableDiffusion([[], []], [[1]]), "weights: found 1, expected a list for each of 2 images"),
        (ComposableDiffusion([[], ["fog"]], [[1], [1]]), r"weights\[1\]: found \[1\], expected 2 finite numbers"),
        (ComposableDiffusion([[], []], [[1], [np.nan]]), r"weights\[1\]: found \[nan\], expected 1 finite numbers"),
        (ComposableDiffusion([[], []], [[1], ["x"]]), r"weights\[1\]: found \['x'\], expected 1 finite numbers"),
        (ComposableDiffusion([[], []], [1, 1]), r"weights\[0\]: found 1, expected 1 finite numbers"),
    ],
)
def test_bad_input_is_one_clear_line(one_level, method, message):
    with pytest.raises(InputError, match=message):
        draw(one_level, method)


def test_what_it_cannot_be_built_on_is_refused(one_level):
    from jaxmix.samplers import Unguided

    method = ComposableDiffusion(FURTHER)
    with pytest.raises(InputError, match="Unguided and Composed exclude each other"):
        one_level.draw(Request(prompts=PROMPTS, steps=2, guidance=(Unguided(),)), (method,))
    with pytest.raises(InputError, match="Composed and Composed exclude each other"):
        draw(one_level, method, method)
    assert jax.tree.leaves(one_level.params)
