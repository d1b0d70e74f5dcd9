"""StyleAligned (arXiv 2312.02133) and its swapped variant: shared attention by hand, its invariants, its refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import InputError, Moments, Request, Segment, Site, StyleAligned, dense_diffusion, hold, style_aligned
from jaxmix.control import QKV, attend, matches, validate
from jaxmix.controls import style_aligned as aligned
from jaxmix.models.unet import sites
from jaxmix.rows import check_together, tile, to_branches

from . import by_hand

SITE = Site("a.attn1", 2, (3, 4))


def random_qkv(rows, seed=0, n=12, d=8):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((rows, n, 2, d)) for _ in range(3))


def run(control, arrays, branches=1):
    control = to_branches(tile(control, len(arrays[0]) // branches), (1.0,) * branches)
    return np.asarray(attend(SITE, QKV(*(jnp.asarray(x, jnp.float32) for x in arrays)), (control,))[0])


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.5, 0.0), (1.0, math.log(2)), (0.7, -0.4)])
def test_shared_attention_is_that_of_the_equations(scale, shift):
    arrays = random_qkv(5)
    got = run(aligned.bind([3, 2], scale=scale, shift=shift), arrays)
    for rows in (slice(0, 3), slice(3, 5)):
        by = by_hand.shared_attention(*(x[rows] for x in arrays), scale=scale, shift=shift)
        np.testing.assert_allclose(got[rows], by, atol=1e-5)


def test_full_sharing_is_attention_over_all_tokens_of_a_group():
    arrays = random_qkv(6)
    got = run(aligned.bind([3, 3], full=True), arrays)
    for rows in (slice(0, 3), slice(3, 6)):
        np.testing.assert_allclose(got[rows], by_hand.full_attention(*(x[rows] for x in arrays)), atol=1e-5)


def test_swapping_takes_the_keys_and_values_of_the_reference():
    q, k, v = random_qkv(3)
    got = run(aligned.bind([3], swap=True, adain=()), (q, k, v))
    by = by_hand.attention(q, np.broadcast_to(k[:1], k.shape), np.broadcast_to(v[:1], v.shape))
    np.testing.assert_allclose(got, by, atol=1e-5)
    np.testing.assert_array_equal(
        got[:1], np.asarray(attend(SITE, QKV(*(jnp.asarray(x[:1], jnp.float32) for x in (q, k, v))))[0])
    )


def test_branches_never_mix():
    """Rows are (sample, branch), branch minor: the unconditional rows share with the unconditional reference."""
    arrays = random_qkv(6)  # three samples of two branches
    got = run(aligned.bind([3], shift=0.3), arrays, branches=2)
    for branch in range(2):
        by = by_hand.shared_attention(*(x[branch::2] for x in arrays), shift=0.3)
        np.testing.assert_allclose(got[branch::2], by, atol=1e-5)


def test_pooled_norms_are_the_statistics_of_both_images():
    rng = np.random.default_rng(1)
    images = rng.standard_normal((3, 4, 5, 8))
    rows = images.reshape(3, 20, 4, 2)
    own = Moments(*(jnp.asarray(f(rows, (1, 3)), jnp.float32) for f in (np.mean, np.var)))
    got = aligned.bind([3], norms=True).moments(SITE, own)
    for row in range(3):
        mean, var = by_hand.pooled_moments(images[row], images[0], 4)
        np.testing.assert_allclose(got.mean[row], mean, atol=1e-5)
        np.testing.assert_allclose(got.var[row], var, atol=1e-5)


def test_a_reference_shares_with_itself_and_stays_as_it_was():
    arrays = random_qkv(3)
    alone = np.asarray(attend(SITE, QKV(*(jnp.asarray(x[:1], jnp.float32) for x in arrays)))[0])
    for options in ({}, {"scale": 0.3}, {"shift": 2.0}, {"shift": -3.0, "scale": 2.0}):
        np.testing.assert_allclose(run(aligned.bind([3], **options), arrays)[:1], alone, atol=2e-6)


def test_a_reference_without_weight_leaves_aligned_queries_and_keys():
    q, k, v = random_qkv(2)
    got = run(aligned.bind([2], shift=-1000.0), (q, k, v))
    aligned_qk = [x.copy() for x in (q, k)]
    for x in aligned_qk:
        for head in range(2):
            x[1, :, head] = by_hand.adain(x[1, :, head], x[0, :, head])
    np.testing.assert_allclose(got[1:], by_hand.attention(*aligned_qk, v)[1:], atol=1e-5)


def test_zero_strength_is_the_base_bit_for_bit_and_strength_is_continuous():
    arrays = random_qkv(3)
    base = np.asarray(attend(SITE, QKV(*(jnp.asarray(x, jnp.float32) for x in arrays)))[0])
    np.testing.assert_array_equal(run(aligned.bind([3], strength=0.0), arrays), base)
    mixed = run(aligned.bind([3], strength=[0.0, 0.0, 1.0]), arrays)
    np.testing.assert_allclose(mixed[:2], base[:2], atol=2e-6)
    np.testing.assert_allclose(mixed[2], by_hand.shared_attention(*arrays)[2], atol=1e-5)
    small, smaller = (np.abs(run(aligned.bind([3], strength=s), arrays) - base).max() for s in (1e-2, 1e-4))
    assert smaller < small / 20


@pytest.mark.parametrize("rows", [(0, 2, 1, 3), (0, 3, 1, 2)])
def test_permuting_the_others_permutes_the_results(rows):
    arrays, rows = random_qkv(4), list(rows)
    got = run(aligned.bind([4], shift=0.2), [x[rows] for x in arrays])
    np.testing.assert_allclose(got, run(aligned.bind([4], shift=0.2), arrays)[rows], atol=1e-6)


def draw(pipe, controls=(), prompts=("a dog", "a red car", "an apple"), seeds=(1, 2, 3), **options):
    return pipe.generate(list(prompts), list(seeds), 4, 3.0, controls=controls, output="latent", **options)


@pytest.mark.parametrize("norms", [True, False])
def test_the_reference_is_drawn_as_if_alone(one_level, norms):
    got = draw(one_level, (style_aligned(one_level, [3], share_group_norm=norms, shift=0.5),))
    alone = draw(one_level, prompts=["a dog"], seeds=[1])
    np.testing.assert_allclose(got[:1], alone, atol=2e-5)
    assert np.abs(got[1:] - draw(one_level)[1:]).max() > 1e-3


def test_a_swapped_reference_is_the_one_drawn_alone_and_equal_images_stay_equal(one_level):
    control = style_aligned(one_level, [3], swap=True)
    got = draw(one_level, (control,))
    np.testing.assert_array_equal(draw(one_level, methods=(StyleAligned([3], swap=True),)), got)
    np.testing.assert_allclose(got[:1], draw(one_level, prompts=["a dog"], seeds=[1]), atol=2e-5)
    same = draw(one_level, (control,), prompts=["a dog"] * 3, seeds=[1] * 3)
    np.testing.assert_array_equal(same[1:], np.broadcast_to(same[:1], same[1:].shape))


@pytest.mark.parametrize("options", [{}, {"full": True}, {"shift": 0.7}, {"shift": 0.7, "share_group_norm": False}])
def test_equal_images_stay_equal(one_level, options):
    control = style_aligned(one_level, [3], **options)
    got = draw(one_level, (control,), prompts=["a dog"] * 3, seeds=[1] * 3)
    np.testing.assert_allclose(got, np.broadcast_to(got[:1], got.shape), atol=2e-5)


def test_everything_off_is_the_base_bit_for_bit(one_level):
    base = draw(one_level)
    for options in ({"level": 1.0, "share_group_norm": False}, {"strength": 0.0}, {"strength": 0.0, "swap": True}):
        np.testing.assert_array_equal(draw(one_level, (style_aligned(one_level, [3], **options),)), base)


def test_at_level_one_the_norms_alone_are_shared(one_level):
    control = style_aligned(one_level, [3], level=1.0)
    reached = [s.name for s in sites(one_level.unet.config, (8, 8)) if matches(control, s.name)]
    assert not reached and control.norms and float(control.strength.min()) == 1
    got = draw(one_level, (control,))
    assert np.abs(got[1:] - draw(one_level)[1:]).max() > 1e-3
    assert np.abs(got[1:] - draw(one_level, (style_aligned(one_level, [3]),))[1:]).max() > 1e-3


@pytest.mark.parametrize(
    ("layers", "level", "alone"),
    [(16, 0.0, 0), (16, 1.0, 16), (16, 0.4, 8), (70, 0.4, 35), (11, 0.4, 6), (10, 0.75, 8)],
)
def test_a_level_leaves_layers_alone_by_the_rule_of_the_reference(layers, level, alone):
    assert sum(aligned.unshared(layers, level)) == alone


def test_a_level_of_less_than_a_layer_is_an_error():
    with pytest.raises(InputError, match="less than one of 16 layers"):
        aligned.unshared(16, 0.05)


def test_groups_batches_and_devices_draw_the_same(one_level):
    from jaxmix import data_mesh

    prompts, seeds = [f"a dog {i}" for i in range(4)], list(range(4))
    pair, control = style_aligned(one_level, [2]), style_aligned(one_level, [2, 2])
    whole = draw(one_level, (control,), prompts, seeds)
    parts = [draw(one_level, (pair,), prompts[i : i + 2], seeds[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(whole, np.concatenate(parts), atol=2e-5)
    np.testing.assert_allclose(draw(one_level, (control,), prompts, seeds, batch_size=2), whole, atol=2e-5)
    np.testing.assert_allclose(draw(one_level, (control,), prompts, seeds, mesh=data_mesh(2)), whole, atol=2e-5)
    for options in ({"batch_size": 3}, {"mesh": data_mesh(4)}):
        with pytest.raises(InputError, match="expected a batch size, and a share of each device, of whole groups"):
            draw(one_level, (control,), prompts, seeds, **options)
    check_together(aligned.bind([2, 2]), 4, 2)


def test_a_real_reference_is_held_to_its_inversion(one_level):
    pipe = one_level
    picture = np.random.default_rng(0).integers(0, 255, (1, 16, 16, 3), np.uint8)
    found = pipe.invert(picture, ["a dog"], steps=4, guidance_scale=2.0)
    control = style_aligned(pipe, [3], shift=math.log(2))
    for offset in (0, 2):
        course = found.course(offset)
        assert course.shape == (1, 5, 8, 8, 4)
        np.testing.assert_array_equal(course[:, -1], pipe.encode_images(picture))
        np.testing.assert_array_equal(course[:, 0], found.states[:, 4 - offset])
        request = Request(prompts=["a dog", "a red car", "an apple"], seeds=[1, 2, 3], steps=4, guidance_scale=3.0)
        got = pipe.draw(request.add(controls=(control,), edits=(hold(course, [0], 3),)), output="latent")
        np.testing.assert_array_equal(got[:1], course[:, -1])
        method = StyleAligned([3], shift=math.log(2), pictures={0: picture[0]}, offset=offset)
        np.testing.assert_array_equal(pipe.draw(request, (method,), output="latent"), got)
        assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ([3, 1], {}, r"groups: found sizes \[3, 1\], expected at least two images"),
        ([], {}, "expected at least two images"),
        ([2, 3], {"full": True}, "expected groups of one size"),
        ([2], {"full": True, "swap": True}, "expected the one or the other"),
        ([2], {"full": True, "shift": 1.0}, "all keys count alike"),
        ([2], {"strength": 1.5}, "expected numbers from 0 to 1"),
        ([2], {"scale": [1.0, 2.0, 3.0]}, "found 3 values, expected 1 or one for each of the 2 rows"),
        ([2], {"adain": ("x",)}, "found 'x', expected some of q, k, v"),
        ([2], {"level": 0.5, "sites": "attn1"}, "expected the one or the other"),
    ],
)
def test_bad_groups_are_one_clear_line(one_level, groups, options, message):
    with pytest.raises(InputError, match=message):
        style_aligned(one_level, groups, **options)


def test_groups_must_be_those_of_the_batch(one_level):
    with pytest.raises(InputError, match=r"peers: found 4 rows, expected 1 or 3"):
        draw(one_level, (style_aligned(one_level, [4]),))


def test_a_layout_needs_the_own_keys_first(one_level):
    made = dense_diffusion(one_level, ["a dog"] * 2, [[Segment("a dog", np.eye(16))]] * 2)
    validate((style_aligned(one_level, [2]), made.control), sites(one_level.unet.config, (8, 8)))
    for options in ({"full": True}, {"swap": True}):
        control = style_aligned(one_level, [2], share_group_norm=False, **options)
        with pytest.raises(InputError, match=r"exclude each other at .*attn1: both set its places of the keys"):
            validate((control, made.control), sites(one_level.unet.config, (8, 8)))


def test_one_trace_for_any_numbers(one_level):
    made = [style_aligned(one_level, [3], scale=s, strength=w) for s, w in ((1.0, 1.0), (0.4, 0.0))]
    assert jax.tree.structure(made[0]) == jax.tree.structure(made[1])  # static fields are in it, too
