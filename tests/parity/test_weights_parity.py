"""Torch diffusers and transformers folders load here, and what is saved here loads there."""

import jax
import numpy as np
import pytest

from jaxmix.models import AutoencoderKL, CLIPTextConfig, CLIPTextModel, UNet2DConditionModel, UNetConfig, VAEConfig
from jaxmix.testing import random_params
from jaxmix.weights import load_tree, read_config, save_tree, write_config

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file


def small_unet():
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1}
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 24, "attention_head_dim": 4}
    theirs = diffusers.UNet2DConditionModel(sample_size=8, **blocks, **sizes)
    return theirs, lambda config: UNet2DConditionModel(UNetConfig.from_dict(config))


def small_vae():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    theirs = diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **blocks)
    return theirs, lambda config: AutoencoderKL(VAEConfig.from_dict(config))


def small_text_encoder():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(vocab_size=99, bos_token_id=97, eos_token_id=98, pad_token_id=98, **sizes)
    return transformers.CLIPTextModel(config), lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config))


MODELS = [small_unet, small_vae, small_text_encoder]


def save_theirs(theirs, folder):
    theirs.save_pretrained(folder, safe_serialization=True)
    return read_config(folder)


@pytest.mark.parametrize("make", MODELS)
def test_torch_folders_load_and_save_to_the_same_file(make, tmp_path):
    theirs, ours_of = make()
    ours = ours_of(save_theirs(theirs, tmp_path / "torch"))
    params = load_tree(tmp_path / "torch", ours.abstract_params())
    save_tree(params, tmp_path / "ours" / "model.safetensors")
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    expected = theirs.state_dict()
    prefix = "text_model." if not set(saved) & set(expected) else ""
    assert {key.removeprefix(prefix) for key in saved} == set(expected)
    for key, value in saved.items():
        assert torch.equal(value, expected[key.removeprefix(prefix)])


@pytest.mark.parametrize("make", MODELS)
def test_torch_opens_what_we_save(make, tmp_path):
    theirs, ours_of = make()
    config = save_theirs(theirs, tmp_path / "torch")
    ours = ours_of(config)
    params = random_params(ours)
    is_text = make is small_text_encoder
    name = "model.safetensors" if is_text else "diffusion_pytorch_model.safetensors"
    save_tree(params, tmp_path / "ours" / name)
    write_config(ours.config.to_dict(), tmp_path / "ours" / "config.json")

    opened, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    save_theirs(opened, tmp_path / "again")
    again = load_tree(tmp_path / "again", ours.abstract_params())
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


@pytest.mark.parametrize("make", [small_unet, small_vae])
def test_our_file_loads_strictly_into_the_torch_module(make, tmp_path):
    theirs, ours_of = make()
    ours = ours_of(save_theirs(theirs, tmp_path / "torch"))
    save_tree(random_params(ours), tmp_path / "model.safetensors")
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)


def test_half_precision_folders_load_without_torch_types(tmp_path):
    theirs, ours_of = small_vae()
    for dtype in (torch.float16, torch.bfloat16):
        config = save_theirs(theirs.to(dtype), tmp_path)
        params = load_tree(tmp_path, ours_of(config).abstract_params())
        bias = theirs.state_dict()["encoder.conv_in.bias"].float().numpy()
        assert params["encoder"]["conv_in"]["bias"].dtype == np.float32
        assert np.array_equal(params["encoder"]["conv_in"]["bias"], bias)
