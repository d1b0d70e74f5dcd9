"""Low-rank additions: beside the kernels (`attach`) and in them (`merge`) they are one function; none costs nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxmix.models.layers import Conv, Linear, convolve, product
from jaxmix.testing import normal
from jaxmix.tuning import lora

LAYERS = {
    "dense": (Linear(6), (2, 5, 4)),
    "dense without bias": (Linear(6, use_bias=False), (2, 5, 4)),
    "1x1 convolution": (Linear(6, conv=True), (2, 5, 4)),
    "3x3 convolution": (Conv(6), (2, 8, 6, 4)),
    "3x3 convolution of stride 2": (Conv(6, stride=2), (2, 8, 6, 4)),
    "3x3 convolution of stride 2, padded on one side": (Conv(6, stride=2, padding=((0, 1), (0, 1))), (2, 8, 6, 4)),
}


def random_lora(params, pattern, rank=3, alpha=2.0, seed=0):
    """Return a LoRA of which nothing is zero."""
    made = lora.init(jax.random.key(seed), params, pattern, rank, alpha)
    rng = np.random.default_rng(seed)
    return {
        name: {**f, "up": jnp.asarray(0.3 * rng.standard_normal(f["up"].shape), jnp.float32)}
        for name, f in made.items()
    }


@pytest.fixture(params=LAYERS)
def layer(request):
    module, shape = LAYERS[request.param]
    x = normal(jax.random.key(1), shape)
    return module, {"m": module.init(jax.random.key(2), x)["params"]}, x


def apply(module, params, x):
    return module.apply({"params": params["m"]}, x)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_beside_the_kernel_equals_in_the_kernel(layer, dtype, tolerance):
    module, params, x = layer
    module = module.clone(dtype=dtype)
    factors = random_lora(params, "m")
    beside, within, base = (
        np.asarray(apply(module, p, x), np.float32)
        for p in (lora.attach(params, factors, 0.7), lora.merge(params, [factors], [0.7]), params)
    )
    size = np.abs(within).max()
    np.testing.assert_allclose(beside, within, atol=tolerance * size)
    assert np.abs(base - within).max() > 10 * tolerance * size


def test_gradients_reach_the_factors_as_through_the_kernel(layer):
    module, params, x = layer
    factors = random_lora(params, "m")

    def loss(factors, join):
        return (apply(module, join(params, factors), x) ** 2).sum()

    beside = jax.grad(loss)(factors, lora.attach)["m"]
    within = jax.grad(loss)(factors, lambda params, f: lora.merge(params, [f], [1.0]))["m"]
    for factor in ("down", "up"):
        assert np.abs(within[factor]).max() > 0
        np.testing.assert_allclose(beside[factor], within[factor], rtol=1e-4, atol=1e-5 * np.abs(within[factor]).max())


def test_strength_zero_and_a_fresh_lora_are_the_base_bit_for_bit(layer):
    module, params, x = layer
    factors = random_lora(params, "m")
    fresh = lora.init(jax.random.key(0), params, "m", 3)
    base = apply(module, params, x)
    for changed in (
        lora.attach(params, factors, 0.0),
        lora.merge(params, [factors], [0.0]),
        lora.attach(params, fresh),
        lora.merge(params, [fresh], [1.0]),
    ):
        np.testing.assert_array_equal(apply(module, changed, x), base)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_without_factors_a_layer_is_its_product_and_its_bias_and_nothing_else(dtype):
    def dense(params, x):
        kernel = params["kernel"].astype(dtype)
        return product(jnp.asarray(x, dtype), kernel) + params["bias"].astype(dtype)

    def convolution(params, x):
        kernel, bias = params["kernel"].astype(dtype), params["bias"].astype(dtype)
        return convolve(jnp.asarray(x, dtype), kernel, 1, ((1, 1), (1, 1))) + bias

    for module, shape, plain in ((Linear(6), (2, 5, 4), dense), (Conv(6), (2, 8, 6, 4), convolution)):
        x, module = jax.ShapeDtypeStruct(shape, jnp.float32), module.clone(dtype=dtype)
        params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]

        def ours(params, x, module=module):
            return module.apply({"params": params}, x)

        bare = count_products(ours, params, x)
        assert bare == count_products(plain, params, x) and bare["dot_general"] + bare["conv_general_dilated"] > 0
        attached = jax.eval_shape(lambda p: lora.attach({"m": p}, random_lora({"m": p}, "m"))["m"], params)
        assert count_products(ours, attached, x) != bare


def count_products(fn, *args):
    """Return the number of operations of each kind in a function's whole jaxpr."""
    counts = {"dot_general": 0, "conv_general_dilated": 0}

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            counts[eqn.primitive.name] = counts.get(eqn.primitive.name, 0) + 1
            for inner in jaxprs_in_params(eqn.params):
                walk(inner)

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return counts


@pytest.mark.slow
def test_every_module_that_can_be_a_target_is_heard_beside_its_kernel(tiny_pipeline):
    """attach equals merge through the whole UNet, with each module's part of the difference alive."""
    unet, params = tiny_pipeline.unet, tiny_pipeline.params["unet"]
    factors = random_lora(params, "")
    assert len(factors) == len(lora.targets(params)) > 40
    x, context = normal(jax.random.key(0), (1, 8, 8, 4)), tiny_pipeline.encode_prompt(["a car"]).context

    def heard(factors):
        """Return a value that depends on every factor."""
        return jnp.sum(unet.apply({"params": lora.attach(params, factors, 0.2)}, x, 500, context) ** 2)

    @jax.jit
    def both(factors):
        merged = unet.apply({"params": lora.merge(params, [factors], [0.2])}, x, 500, context)
        return jax.value_and_grad(heard)(factors), jnp.sum(merged**2)

    (beside, grads), within = both(factors)
    assert float(beside) == pytest.approx(float(within), rel=1e-4)
    assert [name for name, g in grads.items() if not np.abs(g["up"]).max() > 0] == []
