"""The CPU's own ways to convolve, multiply and average are the plain ones in other words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.models import layers
from jaxmix.models.layers import Conv, GroupNorm, Linear
from jaxmix.testing import normal

CASES = [  # (height, width), stride, padding: sizes on both sides of each threshold
    ((2, 2), 1, ((1, 1), (1, 1))),
    ((4, 4), 1, ((1, 1), (1, 1))),
    ((8, 8), 1, ((1, 1), (1, 1))),
    ((9, 8), 1, ((1, 1), (1, 1))),
    ((65, 64), 1, ((1, 1), (1, 1))),
    ((4, 6), 2, ((1, 1), (1, 1))),
    ((5, 7), 2, ((0, 1), (0, 1))),
    ((40, 18), 2, ((0, 1), (0, 1))),
]


@pytest.mark.parametrize(("hw", "stride", "padding"), CASES)
@pytest.mark.parametrize("features", [3, 24])
def test_convolutions_and_their_gradients_are_those_of_lax(hw, stride, padding, features, monkeypatch):
    monkeypatch.setattr(layers, "_MANY", 0)  # products for few channels too
    conv = Conv(features, stride, padding)
    x = normal(jax.random.key(0), (2, *hw, 5))
    params = conv.init(jax.random.key(1), x)["params"]

    def ours(params, x):
        return conv.apply({"params": params}, x)

    def plain(params, x):
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, params["kernel"], (stride, stride), padding, dimension_numbers=dims)
        return y + params["bias"]

    def both(fn):
        return jax.jit(lambda *args: (fn(*args), jax.grad(lambda *a: (fn(*a) ** 2).sum(), argnums=(0, 1))(*args)))

    got, expected = both(ours)(params, x), both(plain)(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)
    np.testing.assert_allclose(got[0], expected[0], atol=5e-6)


@pytest.mark.parametrize(("of", "convolutions"), [(0, 2), (1, 2), ((0, 1), 3)])
def test_gradients_do_without_the_extra_column_that_is_slow_there(of, convolutions):
    """The forward pass alone has it; what is not differentiated costs nothing."""
    x, kernel = jnp.ones((2, 16, 16, 32)), jnp.ones((3, 3, 32, 32))
    loss = lambda x, kernel: (layers.convolve(x, kernel, 1, ((1, 1), (1, 1))) ** 2).sum()  # noqa: E731
    text = jax.jit(jax.grad(loss, of)).lower(x, kernel).as_text()
    assert text.count("stablehlo.convolution") == convolutions
    assert text.count("[1, 1], [1, 2]") == (1 if jax.default_backend() == "cpu" else 0)


def test_convolutions_have_forward_derivatives_too():
    x, kernel = (normal(jax.random.key(k), shape) for k, shape in ((0, (1, 4, 4, 9)), (1, (3, 3, 9, 16))))
    convolve = lambda x: layers.convolve(x, kernel, 1, ((1, 1), (1, 1)))  # noqa: E731
    y, dy = jax.jvp(convolve, (x,), (x,))
    np.testing.assert_allclose(dy, y, rtol=1e-5, atol=1e-5)  # linear


def test_products_over_any_number_of_axes_agree():
    linear = Linear(7)
    x = normal(jax.random.key(0), (2, 3, 4, 5))
    params = linear.init(jax.random.key(1), x)["params"]
    got = jax.jit(lambda x: linear.apply({"params": params}, x))(x)
    np.testing.assert_allclose(got, jnp.einsum("abci,io->abco", x, params["kernel"]) + params["bias"], atol=2e-6)
    np.testing.assert_allclose(linear.apply({"params": params}, x[0, 0]), got[0, 0], atol=2e-6)


@pytest.mark.parametrize(("side", "features", "products"), [(4, 512, 1), (4, 256, 0), (8, 512, 0)])
def test_products_take_the_place_of_small_convolutions_of_many_channels(side, features, products):
    conv = Conv(features)
    x = jax.ShapeDtypeStruct((1, side, side, features), jnp.float32)
    params = jax.eval_shape(conv.init, jax.random.key(0), x)
    text = jax.jit(conv.apply).lower(params, x).as_text()
    assert text.count("stablehlo.dot_general") == products and text.count("stablehlo.convolution") == 1 - products


@pytest.mark.parametrize("hw", [(6, 5), (40, 32)])
def test_group_norm_with_a_large_mean_keeps_its_digits(hw):
    norm = GroupNorm(4, 1e-5)
    x = 1e3 + normal(jax.random.key(0), (2, *hw, 8))
    params = norm.init(jax.random.key(1), x)["params"]
    y = np.asarray(x, np.float64).reshape(2, -1, 4, 2)
    expected = (y - y.mean((1, 3), keepdims=True)) / np.sqrt(y.var((1, 3), keepdims=True) + 1e-5)
    got = jax.jit(lambda x: norm.apply({"params": params}, x))(x)
    np.testing.assert_allclose(got.reshape(2, -1, 4, 2), expected, atol=2e-3)
