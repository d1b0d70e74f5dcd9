"""LoRA as the weights seam: merged and attached alike, nothing at strength 0, one program for any numbers."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import InputError, LoRA, apply_loras
from jaxmix.methods.lora import _add
from jaxmix.pipeline.job import denoise
from jaxmix.testing import normal
from jaxmix.tuning import lora as low_rank

PATTERN = r"attn2\.to_|proj_in|conv1$|mid_block.*conv2"  # dense layers, 1x1 and 3x3 convolutions
LAST = "mid_block.resnets.1.conv2"
STRENGTHS = jnp.asarray([0.5, -1.5])

merge = jax.jit(low_rank.merge)


def factors_for(params, seed, pattern=PATTERN, ranks=(3, 5)):
    """Return random factors for the modules that a pattern is found in, of two ranks in turn, alpha 2."""
    rng = np.random.default_rng(seed)
    out = {}
    for i, (module, (_, kernel)) in enumerate(sorted(low_rank.targets(params).items())):
        if re.search(pattern, module):
            *space, fan, o = kernel.shape
            rank = ranks[i % 2]
            down, up = rng.standard_normal((*space, fan, rank)), rng.standard_normal((*[1] * len(space), rank, o))
            out[module] = {role: jnp.asarray(0.2 * x, jnp.float32) for role, x in (("down", down), ("up", up))}
            out[module]["alpha"] = jnp.float32(2)
    return out


@pytest.fixture(scope="module")
def pair(tiny_pipeline):
    return tuple(factors_for(tiny_pipeline.params["unet"], seed) for seed in (0, 1))


@pytest.fixture(scope="module")
def predict(tiny_pipeline):
    x, t, context = jax.random.normal(jax.random.key(0), (2, 8, 8, 4)), 500, jnp.ones((2, 32, 16))
    apply = jax.jit(lambda params: tiny_pipeline.unet.apply({"params": params}, x, t, context))
    return lambda params: np.asarray(apply(params))


def assert_same_tree(a, b):
    jax.tree.map(np.testing.assert_array_equal, dict(a), dict(b))


def draw(pipe):
    return pipe.generate(["a red apple"], [3], 2, 4.0, output="latent")


def test_targets_hold_dense_layers_and_both_kinds_of_convolution(tiny_pipeline, pair):
    shapes = {f["down"].shape[:-2] for f in pair[0].values()}
    assert shapes == {(), (1, 1), (3, 3)}
    assert {f["down"].shape[-1] for f in pair[0].values()} == {3, 5}
    assert LAST in pair[0]


def test_merged_and_attached_compute_the_same(tiny_pipeline, pair, predict):
    params = tiny_pipeline.params["unet"]
    base = predict(params)
    merged = predict(merge(params, pair, jnp.asarray([0.7, 0.0])))
    attached = predict(low_rank.attach(params, pair[0], 0.7))
    assert np.abs(merged - base).max() > 0.05
    np.testing.assert_allclose(attached, merged, atol=1e-5 * np.abs(merged).max())


def test_zero_strength_is_identity(tiny_pipeline, pair, predict):
    params = tiny_pipeline.params["unet"]
    assert_same_tree(merge(params, pair, jnp.zeros(2)), params)
    # Attached is another program, whose sums the compiler may fuse in another order.
    np.testing.assert_allclose(predict(low_rank.attach(params, pair[0], 0.0)), predict(params), atol=2e-6)


def test_a_fresh_lora_is_identity(tiny_pipeline, pair, predict):
    params = tiny_pipeline.params["unet"]
    made = jax.jit(lambda key: low_rank.init(key, params, r"proj_in|mid_block.*conv2", 4))(jax.random.key(0))
    assert made.keys() == {name for name in pair[0] if "proj_in" in name or name.endswith("conv2")}
    for f in made.values():
        assert float(f["alpha"]) == 4 and not np.any(f["up"]) and np.abs(f["down"]).max() > 0
    fresh = {module: {**f, "up": jnp.zeros_like(f["up"])} for module, f in pair[0].items()}
    assert_same_tree(merge(params, (fresh, fresh), jnp.ones(2)), params)
    attached = predict(low_rank.attach(params, fresh))
    np.testing.assert_array_equal(attached, predict(low_rank.attach(params, pair[0], 0.0)))  # one program: to the bit
    np.testing.assert_allclose(attached, predict(params), atol=2e-6)


def test_zero_strength_keeps_bfloat16_weights_to_the_bit(tiny_pipeline, pair):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dict(tiny_pipeline.params["unet"]))
    merged = merge(params, pair, jnp.zeros(2))
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    assert_same_tree(merged, params)


def test_several_loras_add(tiny_pipeline, pair):
    params = tiny_pipeline.params["unet"]
    together = merge(params, pair, STRENGTHS)
    in_turn = merge(merge(params, pair, jnp.asarray([0.5, 0.0])), pair, jnp.asarray([0.0, -1.5]))
    chex.assert_trees_all_close(together, in_turn, atol=1e-6)


def test_the_delta_is_the_scaled_product_of_the_factors(tiny_pipeline, pair):
    params = tiny_pipeline.params["unet"]
    merged = merge(params, pair, STRENGTHS)
    before, after = (np.asarray(low_rank.targets(tree)[LAST][1]) for tree in (params, merged))
    expected = np.zeros_like(before)
    for lora, strength in zip(pair, (0.5, -1.5), strict=True):
        down, up = (np.asarray(lora[LAST][role]) for role in ("down", "up"))
        expected += strength * 2.0 / down.shape[-1] * np.einsum("hwir,ro->hwio", down, up[0, 0])
    np.testing.assert_allclose(after - before, expected, atol=1e-6)


def test_a_pipeline_with_loras_shares_what_they_leave_alone(tiny_pipeline, pair):
    made = apply_loras(tiny_pipeline, [(LoRA({"unet": pair[0]}), 1.0)])
    changed = set()
    for name, (_, kernel) in low_rank.targets(made.params["unet"]).items():
        if kernel is not low_rank.targets(tiny_pipeline.params["unet"])[name][1]:
            changed.add(name)
    assert changed == set(pair[0])
    assert made.params["vae"] is tiny_pipeline.params["vae"]
    assert made.params["text_encoder"] is tiny_pipeline.params["text_encoder"]
    expected = merge(tiny_pipeline.params["unet"], pair, jnp.asarray([1.0, 0.0]))
    chex.assert_trees_all_close(dict(made.params["unet"]), dict(expected), atol=1e-6)


def test_a_text_encoder_lora_changes_the_text_states(tiny_pipeline):
    params = tiny_pipeline.params["text_encoder"]
    factors = factors_for(params, 0, "q_proj|fc1")
    made = apply_loras(tiny_pipeline, [(LoRA({"text_encoder": factors}), 1.0)])
    before, after = (np.asarray(pipe.encode_prompt(["a car"]).context) for pipe in (tiny_pipeline, made))
    assert np.abs(after - before).max() > 1e-3
    back = apply_loras(made, [(LoRA({"text_encoder": factors}), -1.0)])
    np.testing.assert_allclose(back.encode_prompt(["a car"]).context, before, atol=1e-5)


def test_strengths_and_swaps_compile_neither_merge_nor_sampler(tiny_pipeline, pair):
    """One merge and one drawing compile what there is; after it only numbers change."""
    first, second = LoRA({"unet": pair[0]}), LoRA({"unet": pair[1]})
    base = draw(tiny_pipeline)  # already with the weights as they are: the sampler's program is the same
    drawn = [draw(apply_loras(tiny_pipeline, [(first, 1.0)]))]
    merges, draws = _add._cache_size(), denoise._cache_size()
    for lora, strength in ((first, 0.5), (first, 0), (second, -1.0), (second, 2)):
        drawn.append(draw(apply_loras(tiny_pipeline, [(lora, strength)])))
    assert _add._cache_size() == merges
    assert denoise._cache_size() == draws
    np.testing.assert_array_equal(drawn[2], base)
    assert min(np.abs(drawn[i] - base).max() for i in (0, 1, 3, 4)) > 1e-3
    # Nor do other forms of the same modules compile the sampler.
    module, f = next((name, f) for name, f in pair[0].items() if f["down"].ndim == 2)
    i, o = f["down"].shape[0], f["up"].shape[1]
    halves = {"hada_w1_a": (o, 2), "hada_w1_b": (2, i), "hada_w2_a": (o, 2), "hada_w2_b": (2, i)}
    loha = {role: normal(jax.random.key(n), shape) for n, (role, shape) in enumerate(halves.items())}
    dora = {**f, "magnitude": jnp.ones((1, o))}
    for form in ({**loha, "alpha": jnp.float32(2)}, {"diff": normal(jax.random.key(9), (i, o))}, dora):
        assert np.abs(draw(apply_loras(tiny_pipeline, [(LoRA({"unet": {module: form}}), 1.0)])) - base).max() > 1e-3
    assert denoise._cache_size() == draws


def test_one_trace_of_the_merge_for_any_strengths_and_loras(tiny_pipeline, pair):
    params = tiny_pipeline.params["unet"]
    once = jax.jit(chex.assert_max_traces(low_rank.merge, n=1))
    for loras, strengths in ((pair, (1.0, 0.0)), (pair[::-1], (0.3, 2.0))):
        once(params, loras, jnp.asarray(strengths))


@pytest.mark.parametrize(
    ("pattern", "rank", "message"),
    [
        ("attn9", 2, "'attn9' matches none of the"),
        ("attn[", 2, "is not a regular expression"),
        ("attn1", 0, "lora rank: found 0, expected 1 or more"),
    ],
)
def test_a_pattern_or_rank_that_makes_no_lora_is_refused(tiny_pipeline, pattern, rank, message):
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        low_rank.init(jax.random.key(0), tiny_pipeline.params["unet"], pattern, rank)


def test_a_lora_that_does_not_fit_is_refused(tiny_pipeline, pair):
    pipe, factors = tiny_pipeline, pair[0][LAST]
    with pytest.raises(InputError, match=r"1 of its 1 modules are not in this model, such as mid_block\.none"):
        apply_loras(pipe, [(LoRA({"unet": {"mid_block.none": factors}}), 1.0)])
    with pytest.raises(InputError, match=r"to_q: found down \(3, 3, 32, 3\) .* a LoRA for another base"):
        name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        apply_loras(pipe, [(LoRA({"unet": {name: factors}}), 1.0)])
    with pytest.raises(InputError, match="found factors for text_encoder_2, which this pipeline lacks"):
        apply_loras(pipe, [(LoRA({"text_encoder_2": {"text_projection": factors}}), 1.0)])
    with pytest.raises(InputError, match="found the part 'vae', expected one of unet"):
        LoRA({"vae": {}})
    with pytest.raises(InputError, match="lora strengths: found 1, expected one for each of the 2"):
        low_rank.merge(pipe.params["unet"], pair, [1.0])


def test_factors_are_the_draws_of_jax_whatever_their_shape(tiny_pipeline):
    made = low_rank.init(jax.random.key(5), tiny_pipeline.params["unet"], r"attn1\.to_q$|conv1$", 2)
    modules = low_rank.targets(tiny_pipeline.params["unet"])
    for i, name in list(enumerate(sorted(made)))[:3]:
        *space, fan, _ = modules[name][1].shape
        bound, key = (math.prod(space) * fan) ** -0.5, jax.random.fold_in(jax.random.key(5), i)
        own = jax.random.uniform(key, (*space, fan, 2), jnp.float32, -bound, bound)
        np.testing.assert_array_equal(made[name]["down"], own)
