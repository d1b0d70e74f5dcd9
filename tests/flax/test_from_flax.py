"""Live Flax models of diffusers 0.36 to 0.39, adopted: the same outputs from the same parameters.

The Flax UNet has the tanh approximation of GELU and epsilon 1e-5 in the norms before attention, where torch, with which
every published checkpoint was trained, has the exact GELU and 1e-6. Ours are torch's. The comparison to float32
precision therefore gives Flax's attention module those two; how far apart they are otherwise is tested as well.
"""

import logging
import types
import warnings

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.models import AddedCond, AutoencoderKL, UNet2DConditionModel, UNetConfig
from jaxmix.pipeline.loading import from_flax
from jaxmix.testing import random_params
from jaxmix.types import InputError
from jaxmix.weights import load_tree, read_config

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of diffusers about its Flax classes
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "FlaxUNet2DConditionModel"):
        pytest.skip("this diffusers has no Flax models, 0.39 was the last that had", allow_module_level=True)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    from diffusers import FlaxAutoencoderKL, FlaxUNet2DConditionModel
    from diffusers.models import attention_flax

TOLERANCE = 2e-5  # of the largest absolute value of the output
WITH_FLAX_GELU = 5e-4

COMMON = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1}
UNETS = {
    "sd1": COMMON
    | {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
    },
    "sd2": COMMON
    | {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "split_head_dim": True,
        "only_cross_attention": (False, False),
    },
    "sdxl": COMMON
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    },
}
VAE = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


def fast_jit(fn):
    """Compile without optimising: these programs run once, and compiling them is what takes the time."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def params_of(module):
    """Return random parameters in the module's own tree; its shapes are found without running it."""
    return random_params(flax.core.unfreeze(jax.eval_shape(module.init_weights, jax.random.key(0))))


def inputs(name):
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    t = np.asarray([3, 801], np.int32)
    context = rng.standard_normal((2, 5, 24)).astype(np.float32)
    added = None
    if name == "sdxl":
        time_ids = np.asarray([[64, 64, 0, 0, 64, 64], [80, 48, 4, 8, 64, 64]], np.float32)
        added = AddedCond(rng.standard_normal((2, 16)).astype(np.float32), time_ids)
    return latents, t, context, added


def their_output(module, params, name):
    latents, t, context, added = inputs(name)
    cond = None if added is None else {"text_embeds": added.text_embeds, "time_ids": added.time_ids}
    out = fast_jit(module.apply)({"params": params}, latents.transpose(0, 3, 1, 2), jnp.asarray(t), context, cond)
    return np.asarray(out.sample).transpose(0, 2, 3, 1)


def our_output(module, params, name):
    latents, t, context, added = inputs(name)
    return np.asarray(fast_jit(lambda p: module.apply({"params": p}, latents, t, context, added=added))(params))


def difference(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("name", list(UNETS))
def test_an_adopted_unet_gives_the_same_output(name, monkeypatch):
    theirs = FlaxUNet2DConditionModel(**UNETS[name])
    params = params_of(theirs)
    ours, our_params = from_flax(theirs, {"params": params})
    assert isinstance(ours, UNet2DConditionModel)
    found = our_output(ours, our_params, name)

    if name == "sd1":
        off = difference(found, their_output(theirs, params, name))
        assert TOLERANCE < off <= WITH_FLAX_GELU, off

    like_torch = types.SimpleNamespace(**vars(flax.linen))
    like_torch.gelu = lambda x: jax.nn.gelu(x, approximate=False)
    like_torch.GroupNorm = lambda num_groups, epsilon: flax.linen.GroupNorm(num_groups, epsilon=1e-6)
    monkeypatch.setattr(attention_flax, "nn", like_torch)
    off = difference(found, their_output(theirs, params, name))
    assert off <= TOLERANCE, off


def test_an_adopted_vae_gives_the_same_output():
    theirs = FlaxAutoencoderKL(**VAE)
    params = params_of(theirs)
    ours, our_params = from_flax(theirs, flax.core.freeze(params))
    assert isinstance(ours, AutoencoderKL)
    image = np.random.default_rng(2).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)

    @fast_jit
    def run_theirs(params):
        latent = theirs.apply({"params": params}, image.transpose(0, 3, 1, 2), method=theirs.encode).latent_dist
        return latent.mean, latent.logvar, theirs.apply({"params": params}, latent.mean, method=theirs.decode).sample

    @fast_jit
    def run_ours(params):
        mean, logvar = ours.apply({"params": params}, image, method="encode")
        return mean, logvar, ours.apply({"params": params}, mean, method="decode")

    mean, logvar, decoded = map(np.asarray, run_theirs(params))
    for found, expected in zip(run_ours(our_params), (mean, logvar, decoded.transpose(0, 2, 3, 1)), strict=True):
        off = difference(np.asarray(found), expected)
        assert off <= TOLERANCE, off


def test_precision_of_parameters_and_of_computation_are_kept():
    theirs = FlaxAutoencoderKL(**VAE, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params_of(theirs))
    ours, our_params = from_flax(theirs, params)
    assert ours.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(our_params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(("cls", "config"), [(FlaxUNet2DConditionModel, UNETS["sdxl"]), (FlaxAutoencoderKL, VAE)])
def test_folders_that_flax_saved_load_to_the_same_parameters(cls, config, tmp_path):
    theirs = cls(**config)
    params = params_of(theirs)
    theirs.save_pretrained(tmp_path, params=params)
    assert read_config(tmp_path)["_class_name"] == cls.__name__
    ours, expected = from_flax(theirs, params)
    loaded = load_tree(tmp_path, ours.abstract_params())
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, expected))


def test_what_cannot_be_adopted_is_named():
    theirs = FlaxUNet2DConditionModel(**UNETS["sd1"])
    params = params_of(theirs)
    with pytest.raises(InputError, match="from_flax: found a Dense, expected a FlaxUNet2DConditionModel or"):
        from_flax(flax.linen.Dense(3), params)
    with pytest.raises(InputError, match=r"FlaxUNet2DConditionModel params: does not fit the model: .*1 missing"):
        from_flax(theirs, params | {"conv_in": {"kernel": params["conv_in"]["kernel"]}})
    crossed = FlaxUNet2DConditionModel(**UNETS["sd1"], only_cross_attention=True)
    with pytest.raises(InputError, match=r"FlaxUNet2DConditionModel: .*only_cross_attention=True is not supported"):
        from_flax(crossed, params)
    with pytest.raises(InputError, match="found list params, expected a nested mapping"):
        from_flax(theirs, [])


def test_a_config_from_flax_is_written_for_torch():
    ours, _ = from_flax(theirs := FlaxUNet2DConditionModel(**UNETS["sd2"]), params_of(theirs))
    again = UNetConfig.from_dict(ours.config.to_dict())
    assert again == ours.config
    assert ours.config.to_dict()["_class_name"] == "UNet2DConditionModel"
