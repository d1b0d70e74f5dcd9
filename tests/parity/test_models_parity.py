"""The models against torch diffusers and transformers: small ones by number, Stable Diffusion 1.5 by census."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import InputError
from jaxmix.models import (
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextModel,
    UNet2DConditionModel,
    UNetConfig,
    VAEConfig,
)
from jaxmix.released import RELEASED
from jaxmix.testing import random_params
from jaxmix.weights.names import flatten, match, to_torch_key, to_torch_shape
from tests.parity.oracle import assert_close, loaded, nhwc, run

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 2,
    "norm_num_groups": 8,
}
CLIP = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "bos_token_id": 97,
    "eos_token_id": 98,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_linear_projection": True, "attention_head_dim": (2, 4, 4)},
        {"transformer_layers_per_block": (1, 2, 1), "flip_sin_to_cos": False, "freq_shift": 1},
        {"down_block_types": ("DownBlock2D",) + UNET["down_block_types"][1:], "layers_per_block": 1,
         "up_block_types": UNET["up_block_types"][:2] + ("UpBlock2D",)},
    ],
    ids=["sd15", "linear projections", "deeper", "no attention at full size"],
)  # fmt: skip
def test_unet_agrees(tmp_path, changes):
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**{**UNET, **changes})
    ours = UNet2DConditionModel(UNetConfig.from_dict(dict(theirs.config)))
    params = loaded(theirs, ours, tmp_path)
    apply = jax.jit(lambda *a: ours.apply({"params": params}, *a))
    for hw in ((16, 16), (13, 10)) if not changes else ((16, 16),):
        x, t, context = torch.randn(2, 4, *hw), torch.tensor([3, 977]), torch.randn(2, 7, 24)
        with torch.no_grad():
            expected = nhwc(theirs(x, t, context).sample)
        assert_close(apply(nhwc(x), t.numpy(), context.numpy()), expected)


def test_vae_agrees_both_ways(tmp_path):
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**VAE)
    ours = AutoencoderKL(VAEConfig.from_dict(dict(theirs.config)))
    params = loaded(theirs, ours, tmp_path)
    images = torch.rand(2, 3, 32, 24) * 2 - 1
    with torch.no_grad():
        moments = theirs.encode(images).latent_dist
        decoded = nhwc(theirs.decode(moments.mean).sample)
    mean, logvar = run(ours, params, nhwc(images), method="encode")
    assert_close(mean, nhwc(moments.mean))
    assert_close(logvar, nhwc(moments.logvar))
    assert_close(run(ours, params, nhwc(moments.mean), method="decode"), decoded)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_text_encoder_agrees(tmp_path, act):
    torch.manual_seed(0)
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP, hidden_act=act))
    ours = CLIPTextModel(CLIPTextConfig.from_dict(theirs.config.to_dict()))
    params = loaded(theirs, ours, tmp_path)
    ids = torch.randint(0, 97, (2, 20))
    ids[0, 7:], ids[1, 19] = 98, 98
    with torch.no_grad():
        expected = theirs(ids)
    got = run(ours, params, ids.numpy())
    assert_close(got.last_hidden_state, expected.last_hidden_state)
    assert_close(got.pooled, expected.pooler_output)


def test_bfloat16_stays_close_to_float32_with_and_without_remat():
    config = UNetConfig.from_dict({**UNET, "layers_per_block": 1})
    x, context = jax.random.normal(jax.random.key(0), (2, 16, 16, 4)), jax.random.normal(jax.random.key(1), (2, 7, 24))
    params = random_params(UNet2DConditionModel(config), 2)
    full = run(UNet2DConditionModel(config), params, x, 400, context)
    for remat in (False, True):
        half = run(UNet2DConditionModel(config, jnp.bfloat16, remat), params, x, 400, context)
        assert half.dtype == jnp.float32
        error = float(jnp.abs(full - half).max() / jnp.abs(full).max())
        assert 0 < error < 0.05


SD15 = {
    "unet": (
        UNet2DConditionModel(UNetConfig.from_dict(RELEASED["sd15"]["unet"])),
        lambda: diffusers.UNet2DConditionModel(cross_attention_dim=768),
        859_520_964,
    ),
    "vae": (
        AutoencoderKL(VAEConfig.from_dict(RELEASED["sd15"]["vae"])),
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        ),
        83_653_863,
    ),
    "text_encoder": (
        CLIPTextModel(CLIPTextConfig.from_dict(RELEASED["sd15"]["text_encoder"])),
        lambda: transformers.CLIPTextModel(
            transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        ),
        123_060_480,
    ),
}


@pytest.mark.parametrize("part", SD15)
def test_every_tensor_of_stable_diffusion_15_is_used_once_with_the_right_shape(part):
    ours, build, count = SD15[part]
    with torch.device("meta"):
        theirs = {k: tuple(v.shape) for k, v in build().named_parameters()}
    target = {to_torch_key(path): to_torch_shape(path, leaf.shape) for path, leaf in flatten(ours.abstract_params())}
    used = {match(key, target): shape for key, shape in theirs.items()}
    assert None not in used and len(used) == len(theirs)
    assert used == target
    assert sum(int(np.prod(s)) for s in target.values()) == count


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (UNetConfig, {"down_block_types": ["KDownBlock2D"] * 4}, "down_block_types has 'KDownBlock2D'"),
        (UNetConfig, {"addition_embed_type": "image"}, "addition_embed_type='image' is not supported"),
        (UNetConfig, {"act_fn": "gelu"}, "act_fn='gelu' is not supported, expected 'silu' or 'swish'"),
        (UNetConfig, {"layers_per_block": -1}, "layers_per_block is -1, expected a whole number"),
        (VAEConfig, {"block_out_channels": [128, 256, 512, 30]}, "has 30, which is not a multiple of 32 norm groups"),
        (UNetConfig, {"attention_head_dim": [8, 8]}, "attention_head_dim has 2 entries, expected 4"),
        (UNetConfig, {"_class_name": "SD3Transformer2DModel"}, "_class_name is 'SD3Transformer2DModel'"),
        (VAEConfig, {"shift_factor": 0.1}, "shift_factor=0.1 is not supported"),
        (CLIPTextConfig, {"hidden_act": "relu"}, "hidden_act='relu'"),
    ],
)
def test_an_unsupported_config_value_is_named(kind, changes, message):
    with pytest.raises(InputError) as e:
        kind.from_dict(changes)
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("config", [UNetConfig(), VAEConfig(), CLIPTextConfig()])
def test_a_config_survives_being_written_and_read(config):
    assert type(config).from_dict(config.to_dict()) == config
