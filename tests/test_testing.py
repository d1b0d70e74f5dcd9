"""`jaxmix.testing`: what its random weights are, and that they stay."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.testing import moved, normal, quick_params, random_params

SHAPES = {
    "a": {"kernel": (3, 3, 32, 64), "bias": (64,)},
    "norm": {"scale": (640,), "bias": (640,)},
    "token": {"embedding": (90, 32)},
}
TREE = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
)


def test_quick_weights_have_variance_one_over_fan_in_and_norms_that_do_nothing():
    made = quick_params(TREE)
    assert float(made["a"]["kernel"].std()) * math.sqrt(3 * 3 * 32) == pytest.approx(1, abs=0.03)
    assert float(abs(made["a"]["bias"]).max()) == 0 and float(made["norm"]["scale"].min()) == 1


def test_random_weights_keep_the_scale_of_products_and_leave_nothing_at_its_default():
    made = random_params(TREE)
    assert float(made["a"]["kernel"].std()) * math.sqrt(3 * 3 * 32) == pytest.approx(1, abs=0.03)
    assert float(made["token"]["embedding"].std()) == pytest.approx(0.5, abs=0.03)
    for name, around in (("scale", 1.0), ("bias", 0.0)):
        assert float(made["norm"][name].mean()) == pytest.approx(around, abs=0.01)
        assert float(made["norm"][name].std()) == pytest.approx(0.05, abs=0.01)
        assert not (made["norm"][name] == around).any()


@pytest.mark.parametrize("make", [random_params, quick_params])
def test_a_seed_is_its_weights_and_a_dtype_is_kept_or_named(make):
    first, again, other = make(TREE, 1), make(TREE, np.random.default_rng(1)), make(TREE, 2)
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert not np.array_equal(first["a"]["kernel"], other["a"]["kernel"])
    assert jax.tree.structure(first) == jax.tree.structure(TREE)
    assert {x.dtype for x in jax.tree.leaves(first)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(make(TREE, 1, jnp.bfloat16))} == {jnp.dtype("bfloat16")}


def test_the_normals_of_second_models_differ_in_the_last_bit_alone():
    plain, single = random_params(TREE, 5), random_params(TREE, 5, single=True)
    close = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=3e-7, atol=1e-9), plain, single)
    assert jax.tree.all(close)


def test_a_module_tells_its_own_shapes(tiny_pipeline):
    unet = tiny_pipeline.unet
    assert jax.tree.all(jax.tree.map(np.array_equal, random_params(unet, 3), random_params(unet.abstract_params(), 3)))


@pytest.mark.parametrize("shape", [(), (7,), (3, 3, 16, 9), (1025,)])
def test_normals_of_any_shape_are_those_of_jax(shape):
    np.testing.assert_array_equal(normal(jax.random.key(5), shape), jax.random.normal(jax.random.key(5), shape))


def test_what_is_moved_is_moved_everywhere():
    tree = {"up": jnp.zeros((40, 50)), "down": jnp.ones((40, 50))}
    made = moved(tree, jax.random.key(0), 0.3)
    for name, start in tree.items():
        assert float((made[name] - start).std()) == pytest.approx(0.3, abs=0.03)


def test_the_numbers_of_the_tiny_pipelines_stay(tiny_pipeline, tiny_sdxl):
    """Recorded: other tests have recorded what comes of them."""

    def size(tree):
        return sum(float(np.abs(np.asarray(x, np.float64)).sum()) for x in jax.tree.leaves(tree))

    assert size(tiny_pipeline.params["unet"]) == pytest.approx(15710.778345420724, rel=1e-9)
    assert size(tiny_pipeline.params["vae"]) == pytest.approx(3732.642820767811, rel=1e-9)
    assert size(tiny_pipeline.params["text_encoder"]) == pytest.approx(51449.068076075186, rel=1e-9)
    assert size(tiny_sdxl.params["unet"]) == pytest.approx(33536.541629297295, rel=1e-9)
    assert size(tiny_sdxl.params["text_encoder_2"]) == pytest.approx(78148.3288404147, rel=1e-9)


def test_both_families_share_their_first_text_encoder_and_autoencoder(tiny_pipeline, tiny_sdxl):
    for part in ("text_encoder", "vae"):
        same = jax.tree.map(np.array_equal, tiny_pipeline.params[part], tiny_sdxl.params[part])
        assert jax.tree.all(same)
    assert tiny_sdxl.params.keys() == {"unet", "vae", "text_encoder", "text_encoder_2"}


def test_it_needs_neither_torch_nor_pytest():
    heavy = ("torch", "pytest", "transformers", "chex", "diffusers")
    code = f"import sys, jaxmix.testing; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
