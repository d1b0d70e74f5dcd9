"""The laws that every control obeys, on a tiny UNet and a tiny pipeline."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxmix import QKV, Control, InputError, Site
from jaxmix.control import attend, cut, matches, rounded, validate, whole_steps
from jaxmix.models import UNet2DConditionModel
from jaxmix.models.unet import norm_sites, sites, subtree
from jaxmix.pipeline.job import denoise
from jaxmix.rows import tile, to_branches
from jaxmix.samplers import DDIM
from jaxmix.testing import normal
from tests.jobs import plain_job, predict

from .controls import CASES, Claiming, FavourFirst, FlipKeys, ShiftValues, make

HW = (8, 8)


def with_inputs(pipe):
    """Return (module, params, inputs of four rows)."""
    keys = jax.random.split(jax.random.key(3), 3)
    x = normal(keys[0], (4, *HW, 4))
    t = jnp.asarray([1, 400, 700, 981])
    context = normal(keys[1], (4, 7, 16))
    return pipe.unet, pipe.params["unet"], (x, t, context)


@pytest.fixture(scope="module")
def unet(one_level):
    return with_inputs(one_level)


@pytest.fixture(scope="module")
def two_levels(tiny_pipeline):
    return with_inputs(tiny_pipeline)


@functools.partial(jax.jit, static_argnums=0)
def predict_at(module, params, inputs, controls, step):
    return module.apply({"params": params}, *inputs, tuple(c.at(step, inputs[1]) for c in controls))


def run(unet, controls=(), step=0):
    return np.asarray(predict_at(*unet, controls, step))


def on_rows(case, scale, **kwargs):
    """Return the control of a case with a strength for each of the four rows: one program for all strengths."""
    return make(case, np.broadcast_to(np.float32(scale), 4), **kwargs)


def only(case, scale):
    """Return a control of every case, all but one at strength 0: one program for all of them."""
    return tuple(on_rows(name, scale if name == case else 0.0) for name in CASES)


def differ(a, b):
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("case", CASES)
def test_each_stage_changes_the_prediction(unet, case):
    assert differ(run(unet, only(case, 1.0)), run(unet)) > 1e-4


def test_zero_strength_is_identity_bit_for_bit(unet):
    np.testing.assert_array_equal(run(unet, only(None, 0.0)), run(unet))


@pytest.mark.parametrize("case", CASES)
def test_rows_with_a_closed_gate_are_untouched_bit_for_bit(unet, case):
    base, got = run(unet), run(unet, only(case, [0.0, 1.0, 0.0, 1.0]))
    np.testing.assert_array_equal(got[::2], base[::2])
    assert differ(got[1::2], base[1::2]) > 1e-4


def test_disjoint_sites_commute_bit_for_bit(unet):
    a = make("logits on attn1", 1.0)
    b = make("out on attn2", 0.7)
    c = make("moments on norms", 0.3)
    np.testing.assert_array_equal(run(unet, (a, b, c)), run(unet, (c, b, a)))


def test_controls_at_one_site_see_what_the_one_before_left(unet):
    flip = on_rows("qkv on attn1", 1.0)  # which alone changes the prediction, as is shown above
    np.testing.assert_allclose(run(unet, (flip, flip)), run(unet), atol=1e-5)


def test_controls_at_one_site_apply_left_to_right():
    site, x = Site("a.attn1", 1, (1, 4)), jnp.arange(4.0).reshape(1, 4, 1, 1)

    @struct.dataclass
    class First(Control):
        def qkv(self, site, a):
            return QKV(a.q, a.k, a.v.at[:, 0].set(9.0))

    @struct.dataclass
    class Reverse(Control):
        def qkv(self, site, a):
            return QKV(a.q, a.k, a.v[:, ::-1])

        def out(self, site, a, o):
            return a.v

    got = [attend(site, QKV(x, x, x), c)[0].ravel().tolist() for c in ((First(), Reverse()), (Reverse(), First()))]
    assert got == [[3, 2, 1, 9], [9, 2, 1, 0]]


def test_a_field_with_the_name_of_a_stage_is_refused_when_the_class_is_made():
    with pytest.raises(TypeError, match="Shadow: found a field 'kv', expected another name than a method's"):
        type("Shadow", (Control,), {"__annotations__": {"kv": "Array"}})


def test_a_pattern_limits_a_control_to_its_sites(two_levels):
    module, params, inputs = two_levels
    base, seen = predict(module, params, *inputs, mutable=("probs", "qkv"))
    control = on_rows("qkv on attn1", 1.0, sites=r"up_blocks\.1.*attn1$")
    got, seen_with = predict(module, params, *inputs, (control,), mutable=("probs", "qkv"))
    down = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    for kind in ("probs", "qkv"):
        chex.assert_trees_all_equal(subtree(seen[kind], down), subtree(seen_with[kind], down))
    assert differ(np.asarray(got), np.asarray(base)) > 1e-4


def test_time_enters_a_control_through_at_alone(unet):
    controls = only("out on attn1", 1.0)
    early, late = run(unet, controls, step=0), run(unet, controls, step=5)
    assert differ(early, late) > 1e-4


ONE_A_STAGE = ["kv on attn2", "qkv on attn1", "logits on attn2", "out on attn1", "moments on norms"]


@pytest.mark.slow
def test_gradients_reach_every_strength_and_agree_under_remat(unet):
    module, params, inputs = unet
    remat = UNet2DConditionModel(module.config, remat=True)
    controls = tuple(make(case, 0.5) for case in ONE_A_STAGE)

    def loss(m):
        return lambda p, c: jnp.mean(jnp.square(m.apply({"params": p}, *inputs, c)))

    plain = jax.jit(jax.value_and_grad(loss(module), argnums=(0, 1)))(params, controls)
    again = jax.jit(jax.value_and_grad(loss(remat), argnums=(0, 1)))(params, controls)
    chex.assert_trees_all_close(plain, again, rtol=1e-4, atol=1e-6)
    for case, control in zip(ONE_A_STAGE, plain[1][1], strict=True):
        assert float(jnp.abs(control.scale).max()) > 0.0, case


def test_probabilities_and_projections_are_recorded_by_sow(two_levels):
    module, params, inputs = two_levels
    _, seen = predict(module, params, *inputs, mutable=("probs", "qkv"))
    layer = seen["probs"]["down_blocks.0"]["attentions.0"]["transformer_blocks.0"]["attn2"]["probs"]
    assert layer.shape == (4, 4, 64, 7)
    np.testing.assert_allclose(layer.sum(-1), 1.0, atol=1e-5)
    a = seen["qkv"]["mid_block"]["attentions.0"]["transformer_blocks.0"]["attn1"]["qkv"]
    assert a.q.shape == a.k.shape == (4, 16, 4, 8)


def test_the_listed_sites_are_those_that_run(two_levels):
    seen, norms = [], []

    class Spy(Control):
        sites = ".*"

        def __init__(self):
            pass

        def out(self, site, a, o):
            seen.append(site)
            return o

        def moments(self, site, m):
            norms.append(site)
            return m

    module, params, (_, t, context) = two_levels
    for hw in (HW, (10, 7)):
        seen.clear(), norms.clear()
        rows = jax.ShapeDtypeStruct((4, *hw, 4), jnp.float32)
        jax.eval_shape(lambda p, x, t, c: module.apply({"params": p}, x, t, c, (Spy(),)), params, rows, t, context)
        assert seen == list(sites(module.config, hw))
        assert set(norms) == set(norm_sites(module.config, hw)) and len(norms) == len(set(norms))


def test_the_sampler_compiles_once_for_any_numbers(one_level):
    before = denoise._cache_size()
    for i in range(3):
        strengths = [make(case, [0.3 * i, 1.0]) for case in CASES]
        one_level.generate([f"a car {i}", "a dog"], [i, 5], 4, 2.0 + i, controls=strengths, output="latent")
    assert denoise._cache_size() == before + 1


def test_unconditional_rows_get_closed_gates():
    control = to_branches(tile(make("out on attn1", 0.5), 3))
    np.testing.assert_array_equal(control.scale, [0, 0.5, 0, 0.5, 0, 0.5])


def test_tiling_refuses_a_wrong_number_of_rows():
    with pytest.raises(InputError, match=r"FadeOut.scale: found 2 rows, expected 1 or 3"):
        tile(make("out on attn1", [1.0, 2.0]), 3)


def test_a_window_gets_its_own_phase():
    assert cut([(0, 3), (0, 10)], 10) == [(0, 3, frozenset({0, 1})), (3, 10, frozenset({1}))]
    assert cut([(0, 10)], 10) == [(0, 10, frozenset({0}))]


def test_windows_that_meet_share_out_every_step():
    for steps in (1, 7, 25, 50):
        for share in np.linspace(0, 1, 41):
            assert rounded((0.0, share), steps)[1] == rounded((share, 1.0), steps)[0]
    assert rounded((0.0, 0.3), 25) == (0, 8)


@pytest.mark.parametrize(
    ("window", "steps", "live"),
    [
        ((0.0, 0.3), 25, (0, 7)),
        ((0.3, 1.0), 25, (8, 25)),
        ((0.07, 0.58), 100, (7, 58)),  # 0.07 * 100 and 0.58 * 100 are not 7 and 58 in floating point
        ((0.1, 0.5), 50, (5, 25)),
        ((0.3, 0.33), 25, (0, 0)),
        ((0.0, 1.0), 3, (0, 3)),
    ],
)
def test_whole_steps_is_the_rule_of_diffusers_controlnets(window, steps, live):
    assert whole_steps(window, steps) == live
    keep = [1.0 - float(i / steps < window[0] or (i + 1) / steps > window[1]) for i in range(steps)]  # theirs
    assert [float(live[0] <= i < live[1]) for i in range(steps)] == keep


@pytest.mark.slow
def test_later_phases_run_without_the_control(one_level):
    pipe = one_level
    prompts, seeds = ["a red apple"], [3]

    def draw(*controls):
        return pipe.generate(prompts, seeds, 4, 2.0, controls=controls, output="latent")

    early = make("kv on attn2", 1.0, window=(0.0, 0.5))
    late = make("kv on attn2", 1.0, window=(0.5, 1.0))
    whole = draw(make("kv on attn2", 1.0))
    assert min(differ(draw(early), other) for other in (draw(), whole)) > 1e-5
    # Both halves together are the whole, though each half is a scan of its own.
    np.testing.assert_allclose(draw(early, late), whole, atol=2e-6)
    # A control outside of its window is not in the program of that phase at all.
    job = _small_job(pipe, (make("logits on attn1", 1.0, window=(0.0, 0.5)),))
    assert denoise.lower(job, DDIM.create(pipe.schedule, 4)).as_text().count("stablehlo.while") == 2


def _small_job(pipe, controls=()):
    context = pipe.encode_prompt(["", "a car"]).context.reshape(1, 2, 32, 16)
    return plain_job(pipe.unet, pipe.params["unet"], pipe.initial_latents([0]), context, jnp.ones((1,)), controls)


def test_keys_and_values_of_attn2_are_computed_outside_the_loop(one_level):
    pipe = one_level
    jaxpr = jax.make_jaxpr(denoise.__wrapped__)(_small_job(pipe), DDIM.create(pipe.schedule, 4))
    loops = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan"]
    assert len(loops) == 1

    def text_products(eqns):
        # Products over the 2 x 32 text tokens' channels, as the CPU has them: (64, 16) @ (16, inner).
        return sum(
            e.primitive.name == "dot_general" and e.invars[0].aval.shape == (2 * 32, 16) for e in _all_eqns(eqns)
        )

    attn2 = [s for s in sites(pipe.unet.config, HW) if s.name.endswith("attn2")]
    outside = [e for e in jaxpr.jaxpr.eqns if e.primitive.name != "scan"]
    assert text_products(loops[0].params["jaxpr"].jaxpr.eqns) == 0
    assert text_products(outside) == 2 * len(attn2)


def _all_eqns(eqns):
    for e in eqns:
        yield e
        for v in jax.tree.leaves(list(e.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")):
            if hasattr(v, "jaxpr"):
                yield from _all_eqns(v.jaxpr.eqns)
            elif hasattr(v, "eqns"):
                yield from _all_eqns(v.eqns)


SITES = (Site("up_blocks.1.attentions.0.transformer_blocks.0.attn1", 4, HW),)


def test_a_pattern_that_matches_nothing_is_an_error_with_near_misses():
    with pytest.raises(InputError, match=r"matches none of the 1 sites; near misses: up_blocks\.1\.att"):
        validate((make("qkv on attn1", 1.0, sites=r"up_block\.1\.attn1"),), SITES)


def test_a_pattern_that_is_no_regular_expression_is_an_error():
    with pytest.raises(InputError, match="is not a regular expression"):
        matches(make("qkv on attn1", 1.0, sites="("), "x")


def test_two_controls_that_claim_the_same_site_exclude_each_other():
    def claiming(where):
        return Claiming(scale=jnp.ones(1), sites=where)

    two = (*SITES, Site("mid_block.attentions.0.transformer_blocks.0.attn1", 4, (4, 4)))
    with pytest.raises(InputError, match=r"exclude each other at up_blocks\.1.*both set its keys"):
        validate((claiming("attn1"), claiming("up_blocks")), two)
    validate((claiming("mid_block"), claiming("up_blocks")), two)


@pytest.mark.parametrize("window", [(0.5, 0.5), (-0.1, 1.0), (0.2, 1.1)])
def test_an_impossible_window_is_an_error(window):
    with pytest.raises(InputError, match=re.escape(f"window={window}")):
        validate((make("qkv on attn1", 1.0, window=window),), SITES)


def test_something_that_is_no_control_is_an_error():
    with pytest.raises((InputError, AttributeError)):
        validate((object(),), SITES)


def test_kv_controls_look_at_attn2_only():
    with pytest.raises(InputError, match="matches none"):
        validate((ShiftValues(scale=jnp.ones(1), sites="attn1"),), SITES)
    validate((FavourFirst(scale=jnp.ones(1)), FlipKeys(scale=jnp.ones(1))), SITES)
