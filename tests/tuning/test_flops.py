import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxmix import kernels
from jaxmix.tuning.flops import memory_of, model_flops, peak


def flops(fn, *arguments):
    return model_flops(jax.make_jaxpr(fn)(*arguments))


def conv(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_products_and_convolutions_count_two_a_multiplication():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 16))
    assert flops(jnp.matmul, x, w) == 2 * 4 * 8 * 16
    assert flops(conv, jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))) == 2 * 2 * 8 * 8 * 5 * 9 * 3


@pytest.mark.parametrize("stride", [1, 2])
def test_both_gradients_of_a_convolution_cost_what_it_costs(stride):
    x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    forward = flops(lambda x, k: conv(x, k, stride), x, kernel)
    both = flops(jax.grad(lambda x, k: (conv(x, k, stride) ** 2).sum(), (0, 1)), x, kernel)
    assert both == pytest.approx(3 * forward, rel=0.3)  # the edges differ


def test_loops_count_as_often_as_they_run():
    x, w = jnp.ones((4, 8)), jnp.ones((5, 8, 8))
    scan = flops(lambda x, w: jax.lax.scan(lambda c, k: (c @ k, None), x, w)[0], x, w)
    assert scan == 5 * 2 * 4 * 8 * 8


def test_of_branches_the_costliest_counts():
    x = jnp.ones((4, 4))
    assert flops(lambda i: jax.lax.cond(i > 0, lambda: x @ x @ x, lambda: x @ x), 1) == 2 * 2 * 4**3


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16)(nn.silu(nn.Dense(32)(x)))


def test_recomputation_is_no_work_of_the_model():
    x = jnp.ones((4, 16))
    params = Block().init(jax.random.key(0), x)

    def gradient(block):
        twice = lambda p, x: (block.apply(p, block.apply(p, x)) ** 2).sum()  # noqa: E731
        return flops(jax.grad(twice), params, x)

    plain = gradient(Block())
    forward = 2 * 2 * (4 * 16 * 32 * 2)
    assert plain == 3 * forward - 4 * 16 * 32 * 2  # the input needs no gradient
    assert gradient(nn.remat(Block)()) == plain


@pytest.mark.parametrize("tokens", [256, 2048])
def test_recomputation_of_attention_is_no_work_of_the_model_either(tokens):
    """Its kernels are branches by platform; those of long sequences on the CPU are loops."""
    x = jnp.ones((1, tokens, 1, 8))
    attention = kernels.choose(tokens, tokens, 8, x.dtype)

    def gradient(fn):
        return flops(jax.grad(lambda w: (fn(x * w, x, x) ** 2).sum()), jnp.ones(8))

    forward = 2 * 2 * tokens**2 * 8
    assert flops(attention, x, x, x) == forward
    assert gradient(attention) == pytest.approx(2 * forward)  # the gradient is of the queries alone
    assert gradient(jax.checkpoint(attention)) == gradient(attention)


def test_loops_without_a_carry_are_recognised_when_they_run_again():
    x, w = jnp.ones((5, 4, 8)), jnp.ones((8, 8))
    loop = lambda x, w: jax.lax.map(lambda row: jnp.sin(row @ w), x)  # noqa: E731
    gradient = lambda fn: flops(jax.grad(lambda w: fn(x, w).sum()), w)  # noqa: E731
    assert gradient(loop) == 2 * 5 * 2 * 4 * 8 * 8
    assert gradient(jax.checkpoint(loop)) == gradient(loop)


def test_the_count_is_near_the_compiler_s():
    x, w = jnp.ones((64, 128)), jnp.ones((128, 128))
    fn = jax.grad(lambda w, x: ((jax.nn.silu(x @ w) @ w) ** 2).sum())
    analysis = jax.jit(fn).lower(w, x).compile().cost_analysis()
    assert flops(fn, w, x) == pytest.approx(analysis["flops"], rel=0.1)


def test_peaks_are_of_the_data_sheet_or_measured():
    class Device:
        platform, process_index = "tpu", 0

        def __init__(self, kind):
            self.device_kind = kind

    assert peak([Device("TPU v5 lite")] * 4, jnp.bfloat16).flops == pytest.approx(4 * 197e12)
    assert peak([Device("TPU v5p")], jnp.float32).flops == pytest.approx(459e12)
    assert peak([Device("NVIDIA H100 80GB HBM3")], jnp.bfloat16).flops == pytest.approx(989.4e12)
    assert peak([Device("NVIDIA A100-SXM4-80GB")], jnp.float32).flops == pytest.approx(156e12)
    here = peak(jax.devices(), jnp.float32)
    assert "measured" in here.label
    assert 1e8 < here.flops < 1e14


def test_memory_is_told_in_one_line():
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((256, 256))).compile()
    assert "arguments 0.000244" in memory_of(compiled)[1]
