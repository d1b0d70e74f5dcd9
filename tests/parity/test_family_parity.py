"""Stable Diffusion 2.x and XL against torch: small models by number, the released ones by census."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import InputError
from jaxmix.models import (
    AddedCond,
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextModel,
    UNet2DConditionModel,
    UNetConfig,
    VAEConfig,
)
from jaxmix.models.unet import norm_sites, sites
from jaxmix.released import RELEASED
from jaxmix.weights import read_config
from jaxmix.weights.names import flatten, match, to_torch_key, to_torch_shape
from tests.parity.oracle import assert_close, loaded, nhwc, run

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

# What the config.json files of the released models hold besides `RELEASED`, key by key: together they are the files.
SD21_UNET = {
    **RELEASED["sd21"]["unet"],
    "_diffusers_version": "0.10.0.dev0",
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "upcast_attention": True,
}
SDXL_UNET = {
    **RELEASED["sdxl"]["unet"],
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": None,
}
SD21_VAE = {
    **{key: value for key, value in RELEASED["sd21"]["vae"].items() if key != "scaling_factor"},  # not in that file
    "_diffusers_version": "0.10.0.dev0",
    "act_fn": "silu",
}
SDXL_VAE = {
    **RELEASED["sdxl"]["vae"],
    "_diffusers_version": "0.20.0.dev0",
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_TEXT = {
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "torch_dtype": "float16",
    "transformers_version": "4.32.0.dev0",
}
SD21_TEXT = _TEXT | RELEASED["sd21"]["text_encoder"]
SDXL_TEXT = _TEXT | RELEASED["sdxl"]["text_encoder"]
SDXL_TEXT_2 = _TEXT | RELEASED["sdxl"]["text_encoder_2"]

_SMALL = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 48),
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "use_linear_projection": True,
    "upcast_attention": True,
}
SMALL_SD2 = _SMALL | {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (2, 4, 6),
}
SMALL_SDXL = _SMALL | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 3),
    "transformer_layers_per_block": (1, 2, 3),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}


def test_the_unet_of_stable_diffusion_2_agrees(tmp_path):
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**SMALL_SD2)
    ours = UNet2DConditionModel(UNetConfig.from_dict(dict(theirs.config)))
    params = loaded(theirs, ours, tmp_path)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([3, 977]), torch.randn(2, 7, 24)
    with torch.no_grad():
        expected = nhwc(theirs(x, t, context).sample)
    assert_close(run(ours, params, nhwc(x), t.numpy(), context.numpy()), expected)


def test_the_unet_of_sdxl_agrees_and_takes_what_is_computed_once(tmp_path):
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**SMALL_SDXL)
    ours = UNet2DConditionModel(UNetConfig.from_dict(dict(theirs.config)))
    params = loaded(theirs, ours, tmp_path)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([3, 977]), torch.randn(2, 7, 24)
    text = torch.randn(2, 20)
    numbers = torch.tensor([[1024.0, 768, 0, 13, 1024, 1024], [512, 512, 7, 0, 1024, 1536]])
    with torch.no_grad():
        expected = nhwc(theirs(x, t, context, added_cond_kwargs={"text_embeds": text, "time_ids": numbers}).sample)
        moved = nhwc(theirs(x, t, context, added_cond_kwargs={"text_embeds": text, "time_ids": 0 * numbers}).sample)
    assert np.abs(moved - expected).max() > 1e-2 * np.abs(expected).max()

    @jax.jit
    def both(params, x, t, context, added):
        kv, embedded = ours.precompute(params, context, (16, 16)), ours.embed_added(params, added)
        return (
            ours.apply({"params": params}, x, t, context, (), added),
            ours.apply({"params": params}, x, t, kv, (), embedded),
        )

    added = AddedCond(text.numpy(), numbers.numpy())
    for got in both(params, nhwc(x), t.numpy(), context.numpy(), added):
        assert_close(got, expected)


@pytest.mark.parametrize("eos", [98, 2])
def test_the_text_encoder_with_projection_agrees(tmp_path, eos):
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=20,
        projection_dim=24,
        hidden_act="gelu",
        bos_token_id=97,
        eos_token_id=eos,
        pad_token_id=0,
    )
    theirs = transformers.CLIPTextModelWithProjection(config)
    ids = torch.randint(1, 97, (3, 20))
    ids[0, 7], ids[0, 8:] = 98, 0  # padded by another token
    ids[1, 9:] = 98  # padded by the end of the text itself: the first counts
    ids[2, 19] = 98
    theirs.save_pretrained(tmp_path)
    ours = CLIPTextModel(CLIPTextConfig.from_dict(read_config(tmp_path)))
    assert ours.config.projection
    params = loaded(theirs, ours, tmp_path)
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
    got = run(ours, params, ids.numpy())
    assert_close(got.last_hidden_state, expected.last_hidden_state)
    assert_close(got.penultimate, expected.hidden_states[-2])
    assert_close(got.projected, expected.text_embeds)
    first = [7, 9, 19]
    np.testing.assert_array_equal(got.pooled, got.last_hidden_state[np.arange(3), first])


def test_a_text_encoder_without_projection_has_none_and_its_penultimate_state(tmp_path):
    torch.manual_seed(0)
    config = {k: v for k, v in SD21_TEXT.items() if k not in ("torch_dtype", "transformers_version", "architectures")}
    config |= {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config | {"num_attention_heads": 4}))
    ours = CLIPTextModel(CLIPTextConfig.from_dict(theirs.config.to_dict()))
    params = loaded(theirs, ours, tmp_path)
    ids = torch.randint(3, 98, (1, 77))
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
    got = run(ours, params, ids.numpy())
    assert got.projected is None and "text_projection" not in params
    assert_close(got.last_hidden_state, expected.last_hidden_state)
    assert_close(got.penultimate, expected.hidden_states[-2])
    assert_close(got.pooled, expected.pooler_output)


def torch_unet(config):
    return diffusers.UNet2DConditionModel.from_config(config)


def torch_vae(config):
    return diffusers.AutoencoderKL.from_config(config)


def torch_text(config):
    kind = getattr(transformers, config["architectures"][0])
    return kind(transformers.CLIPTextConfig(**{k: v for k, v in config.items() if k != "torch_dtype"}))


PARTS = {
    "sd21 unet": (UNet2DConditionModel, UNetConfig, SD21_UNET, torch_unet, 865_910_724),
    "sd21 vae": (AutoencoderKL, VAEConfig, SD21_VAE, torch_vae, 83_653_863),
    "sd21 text_encoder": (CLIPTextModel, CLIPTextConfig, SD21_TEXT, torch_text, 340_387_840),
    "sdxl unet": (UNet2DConditionModel, UNetConfig, SDXL_UNET, torch_unet, 2_567_463_684),
    "sdxl vae": (AutoencoderKL, VAEConfig, SDXL_VAE, torch_vae, 83_653_863),
    "sdxl text_encoder": (CLIPTextModel, CLIPTextConfig, SDXL_TEXT, torch_text, 123_060_480),
    "sdxl text_encoder_2": (CLIPTextModel, CLIPTextConfig, SDXL_TEXT_2, torch_text, 694_659_840),
}


@pytest.mark.parametrize("part", PARTS)
def test_every_tensor_of_the_released_models_is_used_once_with_the_right_shape(part):
    kind, config_kind, config, build, count = PARTS[part]
    ours = kind(config_kind.from_dict(config))
    with torch.device("meta"):
        theirs = build(config)
    found = {k: tuple(v.shape) for k, v in theirs.named_parameters()}
    target = {to_torch_key(path): to_torch_shape(path, leaf.shape) for path, leaf in flatten(ours.abstract_params())}
    used = {match(key, target): shape for key, shape in found.items()}
    assert None not in used and len(used) == len(found)
    assert used == target
    assert sum(int(np.prod(s)) for s in target.values()) == count
    if kind is UNet2DConditionModel:
        modules = {name for name, _ in theirs.named_modules()}
        # The norms inside a transformer block are LayerNorms, which no control reaches.
        norms = {n for n in modules if n.rpartition(".")[2].startswith("norm") and "transformer_blocks" not in n}
        hw = (ours.config.sample_size,) * 2
        listed, listed_norms = sites(ours.config, hw), norm_sites(ours.config, hw)
        assert {s.name for s in listed} == {n for n in modules if n.endswith((".attn1", ".attn2"))}
        assert {s.name for s in listed_norms} == norms | {"conv_norm_out"}
        assert len({s.name for s in listed}) == len(listed)
        for s in listed:
            assert theirs.get_submodule(s.name).heads == s.heads


@pytest.mark.parametrize("part", PARTS)
def test_a_released_config_survives_being_written_and_read(part):
    _, kind, config, _, _ = PARTS[part]
    read = kind.from_dict(config)
    written = read.to_dict()
    assert kind.from_dict(written) == read
    for key in written.keys() & config.keys() - {"upcast_attention"}:
        assert written[key] == config[key], key


def test_the_upcast_of_the_autoencoder_is_read_and_written():
    assert VAEConfig.from_dict(SD21_VAE).force_upcast  # diffusers' default, where old files do not say
    read = VAEConfig.from_dict(SDXL_VAE | {"force_upcast": False})
    assert not read.force_upcast and read.to_dict()["force_upcast"] is False


def test_an_inpainting_unet_can_be_built():
    unet = UNet2DConditionModel(UNetConfig.from_dict(SMALL_SD2 | {"in_channels": 9}))
    assert unet.abstract_params()["conv_in"]["kernel"].shape == (3, 3, 9, 16)
    out = jax.eval_shape(
        unet.apply, {"params": unet.abstract_params()}, jnp.zeros((1, 8, 8, 9)), 0, jnp.zeros((1, 7, 24))
    )
    assert out.shape == (1, 8, 8, 4)


def test_added_conditioning_that_does_not_fit_is_named():
    plain = UNet2DConditionModel(UNetConfig.from_dict(SMALL_SD2))
    xl = UNet2DConditionModel(UNetConfig.from_dict(SMALL_SDXL))
    x, context = jnp.zeros((1, 16, 16, 4)), jnp.zeros((1, 7, 24))
    good = AddedCond(jnp.zeros((1, 20)), jnp.zeros((1, 6)))
    for unet, added, message in (
        (xl, None, "found none, expected AddedCond"),
        (plain, good, "found AddedCond, expected none"),
        (
            xl,
            good._replace(time_ids=jnp.zeros((1, 5))),
            "found 20 text features and 5 numbers of 8, expected 68 in total",
        ),
    ):
        with pytest.raises(InputError) as e:
            jax.eval_shape(unet.init, jax.random.key(0), x, 0, context, (), added)
        assert message in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(InputError, match="expected none for this model"):
        plain.embed_added({}, good)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"addition_embed_type": "text_image"}, "addition_embed_type='text_image' is not supported"),
        ({"addition_time_embed_dim": None}, "addition_time_embed_dim is None, expected an integer"),
        ({"projection_class_embeddings_input_dim": None}, "projection_class_embeddings_input_dim is None"),
        (
            {"transformer_layers_per_block": [1, [2, 1], 3]},
            "transformer_layers_per_block is (1, (2, 1), 3), expected a whole number",
        ),
        ({"layers_per_block": [2, 2, 2]}, "layers_per_block is (2, 2, 2), expected a whole number"),
        ({"time_cond_proj_dim": 0}, "time_cond_proj_dim is 0, expected a whole number"),
    ],
)
def test_an_unsupported_value_is_named(changes, message):
    with pytest.raises(InputError) as e:
        UNetConfig.from_dict(SMALL_SDXL | changes)
    assert message in str(e.value) and "\n" not in str(e.value)
