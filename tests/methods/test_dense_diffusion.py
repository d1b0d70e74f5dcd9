"""DenseDiffusion (arXiv 2308.12964): the modulated logits by hand, its invariants, and what a user may get wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import DenseDiffusion, InputError, Request, Segment, Site, dense_diffusion
from jaxmix.control import QKV, attend, cut
from jaxmix.controls import dense_diffusion as dense
from jaxmix.models.unet import sites
from jaxmix.pipeline.batching import inside
from jaxmix.pipeline.job import denoise
from jaxmix.samplers import DDIM
from tests.jobs import Unconditional, plain_job, with_context

from . import by_hand

HW, TOKENS = (8, 6), 7
CROSS, SELF = Site("a.attn2", 2, (4, 3)), Site("a.attn1", 2, (4, 3))
T = jnp.asarray(941)


def layout(seed=0, **options):
    """Two rows of three segments, the last of them without words; the first two overlap."""
    rng = np.random.default_rng(seed)
    masks = rng.random((2, 3, *HW)) < 0.5
    owners = np.asarray([[-1, 0, 0, -1, 1, 1, -1], [-1, 1, -1, 0, 0, 0, -1]])
    return masks, owners, dense.bind(masks, owners, [(4, 3), HW], kappa=[1.0, 0.6], **options)


def logits_of(control, site, x, t=T):
    return np.asarray(control.at(jnp.asarray(0), t).logits(site, jnp.asarray(x, jnp.float32)))


@pytest.mark.parametrize("site", [CROSS, SELF], ids=["cross", "self"])
def test_the_logits_are_those_of_the_equations(site):
    masks, owners, control = layout(cross=[1.0, 1.7], self_=[0.3, 0.9])
    keys = TOKENS if site is CROSS else 12
    x = np.random.default_rng(1).standard_normal((2, 2, 12, keys))
    got = logits_of(control, site, x)
    for row, kappa in enumerate((1.0, 0.6)):
        small = np.stack([by_hand.nearest_down(m.astype(float), (4, 3)).ravel() for m in masks[row]])
        tokens = np.stack([small[o] if o >= 0 else np.zeros(12) for o in owners[row]])
        weight = ((1.0, 1.7) if site is CROSS else (0.3, 0.9))[row]
        kind = "cross" if site is CROSS else "self"
        for head in range(2):
            by = by_hand.dense_logits(x[row, head], small, tokens, weight, kappa, 941, kind)
            np.testing.assert_allclose(got[row, head], by, atol=1e-5)


def test_a_phrase_owns_the_tokens_of_its_first_occurrence_and_the_last_segment_wins(tiny_pipeline):
    prompt = "a red car left of a red car on the snow"
    phrases = ["a red car", "car", "the snow", ""]
    masks = [
        np.pad(np.ones((4, 4), bool), ((4 * (i // 2), 12 - 4 * (i // 2)), (4 * (i % 2), 12 - 4 * (i % 2))))
        for i in range(4)
    ]
    made = dense_diffusion(tiny_pipeline, [prompt], [[Segment(p, m) for p, m in zip(phrases, masks, strict=True)]])
    ids = tiny_pipeline.tokenize([prompt])[0][0].tolist()
    small = [m[::2, ::2].astype(float) for m in masks]
    maps = by_hand.token_map(ids, [tiny_pipeline.token_ids(p) if p else [] for p in phrases], small)
    got = np.asarray(made.control.tokens)[0]
    pixels = np.asarray(made.control.pixels["8x8"])[0]
    np.testing.assert_array_equal((got[:, None] & pixels[None]) != 0, maps.reshape(len(ids), -1) > 0)
    assert got[0] == 0 and (got[len(tiny_pipeline.token_ids(prompt)) + 1 :] == 0).all()  # start, end and padding
    car = tiny_pipeline.token_ids("car")
    assert (got[3 : 3 + len(car)] == 2).all()  # the second segment, bit 1, took it over


def test_the_states_of_a_phrase_alone_stand_in_its_place(tiny_pipeline):
    pipe, prompt = tiny_pipeline, "a red car on the snow"
    mask = np.ones((16, 16), bool)
    made = dense_diffusion(pipe, [prompt], [[Segment("the snow", mask)]])
    plain, alone = (np.asarray(pipe.encode_prompt([text]).context)[0] for text in (prompt, "the snow"))
    n, whole = len(pipe.token_ids("the snow")), len(pipe.token_ids(prompt))
    expected = plain.copy()
    expected[1 + whole - n : 1 + whole] = alone[1 : 1 + n]
    np.testing.assert_array_equal(made.context[0], expected)
    assert np.abs(expected - plain).max() > 1e-3
    whole_prompt = dense_diffusion(pipe, [prompt], [[Segment("the snow", mask)]], splice=False)
    np.testing.assert_array_equal(whole_prompt.context[0], plain)


def test_the_reference_modulates_15_of_50_steps():
    _, _, control = layout()
    assert [(a, b, len(live)) for a, b, live in cut([control.span(50)], 50)] == [(0, 15, 1), (15, 50, 0)]


def test_zero_weights_are_identity_bit_for_bit():
    _, _, control = layout(cross=0.0, self_=0.0)
    x = np.random.default_rng(2).standard_normal((2, 2, 12, 12)).astype(np.float32)
    np.testing.assert_array_equal(logits_of(control, SELF, x), x)
    np.testing.assert_array_equal(logits_of(control, CROSS, x[..., :TOKENS]), x[..., :TOKENS])


def test_full_strength_leaves_two_values_in_a_row():
    masks, owners, _ = layout()
    control = dense.bind(masks, owners, [(4, 3)], cross=1.0, kappa=0.0)
    x = np.random.default_rng(3).standard_normal((2, 2, 12, TOKENS))
    got = logits_of(control, CROSS, x, jnp.asarray(1000))
    high, low = x.max(-1, keepdims=True), x.min(-1, keepdims=True)
    assert np.minimum(np.abs(got - high), np.abs(got - low)).max() < 1e-5


def test_one_segment_over_everything_changes_nothing():
    control = dense.bind(np.ones((1, 1, *HW), bool), np.asarray([[-1, 0, 0, 0, -1, -1, -1]]), [(4, 3)])
    x = np.random.default_rng(4).standard_normal((1, 2, 12, TOKENS)).astype(np.float32)
    np.testing.assert_array_equal(logits_of(control, CROSS, x), x)


def test_overlapping_masks_turn_the_modulation_round_unless_strict():
    masks, owners = np.ones((1, 2, *HW), bool), np.asarray([[-1, 0, 1, -1, -1, -1, -1]])
    assert float(1 - dense.bind(masks, owners, [(4, 3)]).area["4x3"].max()) == -1.0
    assert float(1 - dense.bind(masks, owners, [(4, 3)], strict=True).area["4x3"].max()) == 0.0


def test_places_without_words_are_flattened_unless_strict():
    masks = np.zeros((1, 2, *HW), bool)
    masks[0, 0, :, :3], masks[0, 1, :, 3:] = True, True  # the second has no words
    owners = np.asarray([[-1, 0, 0, -1, -1, -1, -1]])
    x = np.random.default_rng(5).standard_normal((1, 1, 12, TOKENS)).astype(np.float32)
    bare = (np.asarray(dense.bind(masks, owners, [(4, 3)]).pixels["4x3"])[0] & 1) == 0
    assert bare.any() and not bare.all()
    loose = logits_of(dense.bind(masks, owners, [(4, 3)]), CROSS, x)[0, 0, bare]
    assert np.ptp(loose, axis=-1).max() < np.ptp(x[0, 0, bare], axis=-1).max()
    strict = logits_of(dense.bind(masks, owners, [(4, 3)], strict=True), CROSS, x)[0, 0]
    np.testing.assert_array_equal(strict[bare], x[0, 0, bare])
    assert np.abs(strict[~bare] - x[0, 0, ~bare]).max() > 0.1


def test_only_the_own_keys_are_modulated_where_a_reference_follows():
    _, _, control = layout()
    x = np.random.default_rng(6).standard_normal((2, 2, 12, 24)).astype(np.float32)
    got = logits_of(control, SELF, x)
    np.testing.assert_array_equal(got[..., 12:], x[..., 12:])
    np.testing.assert_array_equal(got[..., :12], logits_of(control, SELF, x[..., :12]))


def test_heads_of_different_rows_have_their_own_layouts():
    """The reference tiles its masks over heads first, which only a single layout a batch survives."""
    _, _, control = layout()
    rng = np.random.default_rng(7)
    a = QKV(*(jnp.asarray(rng.standard_normal((2, 12, 2, 4)), jnp.float32) for _ in range(3)))
    both = attend(SELF, a, (control.at(jnp.asarray(0), T),))[0]
    for row in range(2):
        mine = jax.tree.map(lambda x, row=row: x[row : row + 1] if jnp.ndim(x) else x, control)
        alone = attend(SELF, QKV(*(x[row : row + 1] for x in a)), (mine.at(jnp.asarray(0), T),))[0]
        np.testing.assert_allclose(both[row], alone[0], atol=1e-6)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("reference", [0, 1])
def test_many_scores_are_edited_block_by_block(strict, reference):
    """23 x 31 pixels are two blocks of 357, the last with one query too many; keys of a reference may follow."""
    rng, hw = np.random.default_rng(8), (23, 31)
    site = Site("a.attn1", 2, hw)
    control = dense.bind(rng.random((2, 3, 46, 62)) < 0.5, np.full((2, 7), -1), [hw], self_=[0.9, 3.0], strict=strict)
    control = control.at(jnp.asarray(0), T)
    n = hw[0] * hw[1]
    q, k, v = (jnp.asarray(rng.standard_normal((2, m, 2, 4)), jnp.float32) for m in (n, *[(1 + reference) * n] * 2))
    blocks = jax.jit(lambda *a: attend(site, QKV(*a), (control,))[0])
    whole, probs = attend(site, QKV(q, k, v), (control,), return_probs=True)
    np.testing.assert_allclose(blocks(q, k, v), whole, atol=1e-5)
    assert "while" in blocks.lower(q, k, v).as_text() and probs.shape == (2, 2, n, (1 + reference) * n)
    off = dataclasses.replace(control, self_=jnp.zeros(2))
    base, zero = (jax.jit(lambda *a, c=c: attend(site, QKV(*a), c)[0])(q, k, v) for c in ((), (off,)))
    np.testing.assert_array_equal(zero, base)


def draw(pipe, made=None, steps=4, prompts=("a red car on the snow", "a dog"), **options):
    how = {name: options.pop(name) for name in ("mesh", "batch_size", "methods") if name in options}
    request = Request(prompts=list(prompts), seeds=[3, 4], steps=steps, guidance_scale=3.0, **options)
    if made is not None:
        request = with_context(pipe, request.add(controls=(made.control,)), made.context)
    return pipe.draw(request, output="latent", **how)


def halves(pipe, **options):
    left = np.zeros((16, 16), np.uint8)
    left[:, :8] = 255
    rows = [[Segment("a red car", left), Segment("the snow", 255 - left)], [Segment("a dog", left)]]
    return dense_diffusion(pipe, ["a red car on the snow", "a dog"], rows, **options)


def test_zero_strength_without_splicing_draws_the_same_image_bit_for_bit(tiny_pipeline):
    off = halves(tiny_pipeline, cross=0.0, self_=0.0, splice=False)
    np.testing.assert_array_equal(draw(tiny_pipeline, off), draw(tiny_pipeline))
    spliced = halves(tiny_pipeline, cross=0.0, self_=0.0)
    assert np.abs(draw(tiny_pipeline, spliced) - draw(tiny_pipeline)).max() > 1e-5  # as in the reference
    on = halves(tiny_pipeline, splice=False)
    assert np.abs(draw(tiny_pipeline, on) - draw(tiny_pipeline)).max() > 1e-5


def test_the_unconditional_branch_stays_as_it_was(tiny_pipeline):
    strong = halves(tiny_pipeline, cross=9.0, self_=9.0)
    base, on = (draw(tiny_pipeline, made, methods=[Unconditional()]) for made in (None, strong))
    np.testing.assert_allclose(on, base, atol=1e-6)


def test_layouts_of_other_heights_and_widths(tiny_pipeline):
    mask = np.zeros((24, 12), bool)
    mask[:10] = True
    layout = [[Segment("a dog", mask)]]
    made = dense_diffusion(tiny_pipeline, ["a dog"], layout)
    got = tiny_pipeline.generate(
        ["a dog"], [3], 4, 3.0, height=24, width=12, output="latent", methods=(DenseDiffusion(layout),)
    )
    assert got.shape == (1, 12, 6, 4) and np.isfinite(got).all()
    assert set(made.control.pixels) == {
        f"{h}x{w}" for h, w in {s.hw for s in sites(tiny_pipeline.unet.config, (12, 6))}
    }


def test_steps_outside_the_window_run_the_plain_program(tiny_pipeline):
    """Two loops: in the second every operation is one of the sampler's without a layout, so the fused kernels run."""
    pipe = tiny_pipeline
    made = halves(pipe)
    context = pipe.encode_prompt(["", "a red car on the snow", "", "a dog"]).context.reshape(2, 2, 32, 16)

    def loops(*controls):
        job = plain_job(pipe.unet, pipe.params["unet"], pipe.initial_latents([0, 1]), context, jnp.ones((2,)), controls)
        jaxpr = jax.make_jaxpr(denoise.__wrapped__)(job, DDIM.create(pipe.schedule, 10))
        bodies = [e.params["jaxpr"].jaxpr.eqns for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan"]
        return [[(e.primitive.name, tuple(v.aval.shape for v in e.outvars)) for e in body] for body in bodies]

    (plain,), (inside, outside) = loops(), loops(made.control)
    assert outside == plain
    assert len(inside) > len(plain)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.bool_])
def test_a_pixel_is_inside_from_half_of_the_whole_on(dtype):
    values = {np.float32: [0.0, 0.49, 0.5, 1.0], np.uint8: [0, 127, 128, 255], np.bool_: [0, 0, 1, 1]}[dtype]
    np.testing.assert_array_equal(inside(np.asarray(values, dtype)), [False, False, True, True])
    np.testing.assert_array_equal(inside(np.asarray([0, 1], np.uint8)), [False, True])


HALF = np.pad(np.ones((16, 8), bool), ((0, 0), (0, 8)))


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment("a cat", HALF)], r"image 0, segment 0 \('a cat'\): the phrase is not in the prompt 'a dog'"),
        (
            [Segment("a dog", HALF), Segment("", HALF[:8])],
            r"segment 1 \(''\): found a mask of shape \(8, 16\), expected",
        ),
        ([Segment("a dog", HALF & False)], r"segment 0 \('a dog'\): the mask is empty"),
        ([Segment("a dog", HALF[:15])], "expected multiples of 2"),
        ([Segment("", HALF)] * 33, "found 33 segments, expected at most 32"),
        ([], "found no segment"),
    ],
)
def test_bad_layouts_are_one_clear_line(tiny_pipeline, segments, message):
    with pytest.raises(InputError, match=message):
        dense_diffusion(tiny_pipeline, ["a dog"], [segments])


def test_masks_of_another_image_size_are_refused_before_anything_compiles(tiny_pipeline):
    with pytest.raises(InputError, match="expected masks of the size of the image"):
        draw(tiny_pipeline, halves(tiny_pipeline), height=24, width=24)
