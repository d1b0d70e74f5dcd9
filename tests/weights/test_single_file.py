"""Single-file checkpoints: small ones of each family, made here, with what community files have besides."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmix.models import AutoencoderKL, CLIPTextConfig, CLIPTextModel, UNet2DConditionModel, UNetConfig, VAEConfig
from jaxmix.testing import random_params
from jaxmix.types import InputError
from jaxmix.weights import load_tree
from jaxmix.weights.single_file import (
    CLIP_TOKENIZER,
    Extras,
    family_of_configs,
    open_single_file,
    save_extras,
    save_single_file,
)

UNET, VAE = "model.diffusion_model.", "first_stage_model."
FAMILIES = ("sd1", "sd2", "sdxl")


def text(width, layers, act, **rest):
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": 40,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": 8,
        "hidden_act": act,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 38,
        "eos_token_id": 39,
        "pad_token_id": 1,
        "projection_dim": width,
        **rest,
    }


def unet(down, channels, width, heads, size, **rest):
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": size,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in down],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(down)],
        "block_out_channels": channels,
        "layers_per_block": 1,
        "cross_attention_dim": width,
        "attention_head_dim": heads,
        "transformer_layers_per_block": 1,
        "use_linear_projection": False,
        "norm_num_groups": 32,
        **rest,
    }


def vae(size, **rest):
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": size,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
        "force_upcast": False,
        **rest,
    }


CONFIGS = {
    "sd1": {
        "unet": unet([1, 1, 0], [32, 64, 64], 32, 8, 64),
        "vae": vae(128),
        "text_encoder": text(32, 2, "quick_gelu"),
    },
    "sd2": {
        "unet": unet([1, 0], [64, 128], 64, [1, 2], 64, use_linear_projection=True),
        "vae": vae(128),
        "text_encoder": text(64, 2, "gelu"),
    },
    "sdxl": {
        "unet": unet(
            [0, 1, 1],
            [32, 64, 128],
            96,
            [1, 1, 2],
            128,
            use_linear_projection=True,
            transformer_layers_per_block=[1, 2, 3],
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=48 + 6 * 8,
        ),
        "vae": vae(256, scaling_factor=0.13025, force_upcast=True),
        "text_encoder": text(32, 2, "quick_gelu"),
        "text_encoder_2": text(64, 3, "gelu", architectures=["CLIPTextModelWithProjection"], projection_dim=48),
    },
}


@pytest.fixture(scope="module")
def targets():
    """Return the abstract parameters of every part of every family."""
    models = {
        "unet": lambda c: UNet2DConditionModel(UNetConfig.from_dict(c)),
        "vae": lambda c: AutoencoderKL(VAEConfig.from_dict(c)),
        "text_encoder": lambda c: CLIPTextModel(CLIPTextConfig.from_dict(c)),
    }
    return {
        family: {part: models[part.removesuffix("_2")](config).abstract_params() for part, config in configs.items()}
        for family, configs in CONFIGS.items()
    }


@pytest.fixture(scope="module")
def params(targets):
    """Return random float16 parameters of the same shapes."""
    return jax.tree.map(np.asarray, random_params(targets, dtype=np.float16))


def extra_tensors(family):
    """Return what else files of this family hold, in several dtypes."""
    found = {
        "alphas_cumprod": np.linspace(1, 0, 10, dtype="f4"),
        "model_ema.decay": np.array(0.9999, np.float32),
        "model_ema.num_updates": np.array(7, np.int32),
        "model_ema.diffusion_modeltime_embed0bias": np.ones(4, "f2"),
        "something.unknown": np.ones((2, 3), "f8"),
        "an_empty_mark": np.zeros(0, "f4"),
    }
    if family == "sd1":
        found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(8)[None]
    if family == "sd2":
        for name, shape in {
            "attn.in_proj_weight": (192, 64),
            "attn.in_proj_bias": (192,),
            "attn.out_proj.weight": (64, 64),
            "attn.out_proj.bias": (64,),
            "ln_1.weight": (64,),
            "mlp.c_fc.weight": (128, 64),
        }.items():
            found[f"cond_stage_model.model.transformer.resblocks.2.{name}"] = np.ones(shape, "f2")
        found["cond_stage_model.model.text_projection"] = np.ones((64, 64), "f2")
        found["cond_stage_model.model.logit_scale"] = np.array(4.6, np.float16)
    if family == "sdxl":
        found["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = np.arange(8)[None]
        found["conditioner.embedders.1.model.logit_scale"] = np.array(4.6, np.float16)
    return found


@pytest.fixture(scope="module")
def files(params, tmp_path_factory):
    """Return one community file of each family, under a name that lies and with metadata that does not fit."""
    folder = tmp_path_factory.mktemp("single")
    paths = {}
    for family in FAMILIES:
        path = folder / f"not-{family}-flux.safetensors"
        save_single_file(path, family, CONFIGS[family], params[family])
        save_file(load_file(path) | extra_tensors(family), path, {"modelspec.architecture": "flux-1-dev"})
        paths[family] = path
    return paths


def same_tensors(a, b):
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape, key
        assert a[key].tobytes() == b[key].tobytes(), key


def changed(path, to, add=(), drop=(), rename=lambda key: key):
    """Return a copy of a file with tensors added, dropped (by the beginning of their names) or renamed."""
    tensors = {rename(k): v for k, v in load_file(path).items() if not k.startswith(tuple(drop))}
    save_file(tensors | dict(add), to)
    return to


def one_line(call, *args, **kwargs):
    with pytest.raises(InputError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def loaded(single, targets):
    return {part: load_tree(source, targets[part], dtype="auto") for part, source in single.sources.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_and_configs_are_told_from_shapes(files, family):
    single = open_single_file(files[family])
    assert single.family == family
    assert single.configs == CONFIGS[family]
    assert family_of_configs(single.configs) == family
    assert set(single.extras.entries) == set(extra_tensors(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_read_bit_for_bit(files, targets, params, family):
    found = loaded(open_single_file(files[family]), targets[family])
    jax.tree.map(np.testing.assert_array_equal, found, params[family])
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float16)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_written_back_with_every_tensor(files, targets, tmp_path, family):
    single = open_single_file(files[family])
    trees = loaded(single, targets[family])
    configs = single.configs | {"scheduler": single.scheduler}
    save_single_file(tmp_path / "again.safetensors", family, configs, trees, single.extras)
    same_tensors(files[family], tmp_path / "again.safetensors")

    save_extras(single.extras, tmp_path)
    kept = Extras.open(tmp_path)
    assert kept is not None and kept.family == family
    save_single_file(tmp_path / "thrice.safetensors", family, configs, trees, kept)
    same_tensors(files[family], tmp_path / "thrice.safetensors")


def test_names_are_those_of_the_original_layout(files):
    """Names and shapes as the published checkpoints have them, spelt out."""
    keys = {family: {k: v.shape for k, v in load_file(path).items()} for family, path in files.items()}
    for key, shape in {
        UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (32, 32),
        UNET + "input_blocks.2.0.op.weight": (32, 32, 3, 3),
        UNET + "input_blocks.3.0.skip_connection.weight": (64, 32, 1, 1),
        UNET + "middle_block.2.out_layers.3.bias": (64,),
        UNET + "output_blocks.1.1.conv.weight": (64, 64, 3, 3),
        UNET + "output_blocks.3.2.conv.weight": (64, 64, 3, 3),
        VAE + "encoder.down.0.downsample.conv.weight": (32, 32, 3, 3),
        VAE + "decoder.up.1.upsample.conv.weight": (64, 64, 3, 3),
        VAE + "decoder.up.0.block.0.nin_shortcut.weight": (32, 64, 1, 1),
        VAE + "decoder.mid.attn_1.proj_out.weight": (64, 64, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight": (32, 32),
    }.items():
        assert keys["sd1"][key] == shape, key
    for key, shape in {
        "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight": (192, 64),
        "cond_stage_model.model.positional_embedding": (8, 64),
        "cond_stage_model.model.ln_final.weight": (64,),
    }.items():
        assert keys["sd2"][key] == shape, key
    for key, shape in {
        UNET + "label_emb.0.0.weight": (128, 96),
        UNET + "output_blocks.0.1.transformer_blocks.2.ff.net.0.proj.weight": (1024, 128),
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (40, 32),
        "conditioner.embedders.1.model.text_projection": (64, 48),
        "conditioner.embedders.1.model.transformer.resblocks.2.mlp.c_proj.weight": (64, 128),
    }.items():
        assert keys["sdxl"][key] == shape, key


def test_older_names_and_flat_attention_are_read_and_written_back(files, targets, params, tmp_path):
    flat = {k: v[:, :, 0, 0] for k, v in load_file(files["sd1"]).items() if ".attn_1." in k and v.ndim == 4}
    assert len(flat) == 8
    path = changed(
        files["sd1"],
        tmp_path / "old.safetensors",
        flat,
        rename=lambda key: key.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    )
    single = open_single_file(path)
    trees = loaded(single, targets["sd1"])
    jax.tree.map(np.testing.assert_array_equal, trees, params["sd1"])
    save_extras(single.extras, tmp_path)
    save_single_file(tmp_path / "new.safetensors", "sd1", single.configs, trees, Extras.open(tmp_path))
    same_tensors(path, tmp_path / "new.safetensors")


def test_a_file_can_be_written_over_itself(files, targets, tmp_path):
    path = changed(files["sd2"], tmp_path / "x.safetensors")
    single = open_single_file(path)
    trees = loaded(single, targets["sd2"])
    for _ in range(2):  # the second time the extras are no longer where they were
        save_single_file(path, "sd2", single.configs, trees, single.extras)
        same_tensors(path, files["sd2"])


def test_floats_are_cast_by_request_and_extras_are_not(files, targets, tmp_path):
    single = open_single_file(files["sd1"])
    trees = loaded(single, targets["sd1"])
    save_single_file(tmp_path / "x.safetensors", "sd1", single.configs, trees, single.extras, dtype=jnp.float32)
    found = load_file(tmp_path / "x.safetensors")
    assert found[UNET + "out.2.weight"].dtype == np.float32
    assert found["model_ema.num_updates"].dtype == np.int32
    assert found["model_ema.diffusion_modeltime_embed0bias"].dtype == np.float16


def test_stale_extras_are_removed_from_a_folder(files, tmp_path):
    save_extras(open_single_file(files["sd1"]).extras, tmp_path)
    assert Extras.open(tmp_path) is not None
    save_extras(None, tmp_path)
    assert Extras.open(tmp_path) is None


def test_lost_extras_are_named(files, targets, tmp_path):
    path = changed(files["sd1"], tmp_path / "x.safetensors")
    single = open_single_file(path)
    changed(files["sd1"], path, drop=["alphas_cumprod"])
    message = one_line(save_extras, single.extras, tmp_path / "folder")
    assert str(path) in message and "alphas_cumprod" in message


@pytest.mark.parametrize("family", FAMILIES)
def test_marks_tell_the_schedule(files, tmp_path, family):
    spread = f"{UNET}output_blocks.3.1.transformer_blocks.0.norm1.bias"
    marks = {"v_pred": np.zeros(0, "f4"), "ztsnr": np.zeros(0, "f4")}
    plain = open_single_file(files[family]).scheduler
    assert plain["prediction_type"] == "epsilon" and not plain.get("rescale_betas_zero_snr")
    marked = open_single_file(changed(files[family], tmp_path / "v.safetensors", marks)).scheduler
    assert marked["prediction_type"] == "v_prediction" and marked["rescale_betas_zero_snr"]
    asked = open_single_file(files[family], prediction_type="v_prediction")
    assert asked.scheduler["prediction_type"] == "v_prediction"
    wide = {spread: np.linspace(-1, 1, 64).astype("f2")} if family == "sd2" else {}
    told = open_single_file(changed(files[family], tmp_path / "w.safetensors", wide))
    assert told.scheduler["prediction_type"] == ("v_prediction" if family == "sd2" else "epsilon")
    assert told.configs["unet"]["sample_size"] == {"sd1": 64, "sd2": 96, "sdxl": 128}[family]


def test_a_written_file_keeps_its_schedule(params, tmp_path):
    scheduler = open_scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    for family in FAMILIES:
        path = tmp_path / f"{family}.safetensors"
        save_single_file(path, family, CONFIGS[family] | {"scheduler": scheduler}, params[family])
        again = open_single_file(path)
        assert {again.scheduler[key] for key in ("prediction_type", "rescale_betas_zero_snr")} == {"v_prediction", True}
        assert set(again.extras.entries) == {"v_pred", "ztsnr"}


def open_scheduler(**rest):
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "epsilon",
        **rest,
    }


def test_what_a_single_file_cannot_say_is_refused(params, tmp_path):
    path = tmp_path / "x.safetensors"
    heads = CONFIGS["sd1"] | {"unet": CONFIGS["sd1"]["unet"] | {"attention_head_dim": 4}}
    assert "attention_head_dim=[4, 4, 4]" in one_line(save_single_file, path, "sd1", heads, params["sd1"])
    cosine = CONFIGS["sd1"] | {"scheduler": open_scheduler(beta_schedule="squaredcos_cap_v2")}
    assert "squaredcos_cap_v2" in one_line(save_single_file, path, "sd1", cosine, params["sd1"])
    x0 = CONFIGS["sd1"] | {"scheduler": open_scheduler(prediction_type="sample")}
    assert "prediction_type=sample (a file says epsilon)" in one_line(save_single_file, path, "sd1", x0, params["sd1"])
    # These weights of 2.x are taken for v prediction.
    wide = jax.tree.map(lambda x: x * np.float16(4), params["sd2"])
    epsilon = CONFIGS["sd2"] | {"scheduler": open_scheduler()}
    assert "prediction_type=epsilon (a file says v_" in one_line(save_single_file, path, "sd2", epsilon, wide)
    assert not path.exists()


def test_settings_that_shapes_do_not_show_can_be_overridden(files):
    config = {"unet": {"attention_head_dim": 4}, "scheduler": {"timestep_spacing": "trailing"}}
    single = open_single_file(files["sd1"], config)
    assert single.configs["unet"]["attention_head_dim"] == 4
    assert single.scheduler["timestep_spacing"] == "trailing"
    assert "controlnet" in one_line(open_single_file, files["sd1"], {"controlnet": {}})


def test_an_inpainting_file_opens_with_its_nine_channels(files, tmp_path):
    wide = {UNET + "input_blocks.0.0.weight": np.zeros((32, 9, 3, 3), "f2")}
    single = open_single_file(changed(files["sd1"], tmp_path / "inpaint.safetensors", wide))
    assert single.configs["unet"]["in_channels"] == 9


def test_a_pruned_transformer_is_refused(files, tmp_path):
    path = changed(files["sdxl"], tmp_path / "x.safetensors", drop=[UNET + "middle_block.1.transformer_blocks.2."])
    assert "2 transformer blocks in the middle, expected 3" in one_line(open_single_file, path)


def test_a_missing_tensor_is_named_when_its_part_is_loaded(files, targets, tmp_path):
    path = changed(files["sd1"], tmp_path / "x.safetensors", drop=[VAE + "decoder.mid.attn_1.k.bias"])
    message = one_line(load_tree, open_single_file(path).sources["vae"], targets["sd1"]["vae"])
    assert str(path) in message and "decoder.mid_block.attentions.0.to_k.bias" in message


def tensors(*keys):
    return {key: np.zeros((2, 2), "f4") for key in keys}


OTHERS = {
    "Stable Diffusion 3": tensors(
        UNET + "joint_blocks.0.context_block.attn.qkv.weight", VAE + "decoder.conv_in.weight"
    ),
    "Flux": tensors(UNET + "double_blocks.0.img_attn.qkv.weight", UNET + "single_blocks.0.linear1.weight"),
    "Flux model": tensors("double_blocks.0.img_attn.norm.key_norm.scale"),
    "Stable Cascade": tensors("clip_txt_mapper.weight", "down_blocks.0.0.weight"),
    "PixArt": tensors("y_embedder.y_embedding", "blocks.0.attn.qkv.weight"),
    "a diffusion transformer": tensors("blocks.0.attn.qkv.weight"),
    "a LoRA": tensors("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"),
    "a LoRA or": tensors("unet.down_blocks.0.attentions.0.to_q.lora_A.weight"),
    "a VAE alone": tensors("encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"),
    "VAE alone": tensors(VAE + "encoder.conv_in.weight"),
    "a ControlNet": tensors("control_model.zero_convs.0.0.weight"),
    "ControlNet (it": tensors("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
    "a UNet in the layout of diffusers": tensors("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
    "a UNet alone": tensors("input_blocks.0.0.weight", "out.2.weight"),
    "a text encoder alone": tensors("text_model.encoder.layers.0.mlp.fc1.weight"),
    "a textual inversion": tensors("emb_params"),
    "an IP-Adapter": tensors("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"),
    "an unknown kind of model": tensors("some.thing"),
    "a file without tensors": {},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_file_is_said_to_be_what_it_is(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(OTHERS[kind], path)
    message = one_line(open_single_file, path)
    assert message.startswith(f"{path}: this is ") and kind in message and "expected a Stable Diffusion" in message


@pytest.mark.parametrize(
    ("family", "drop", "add", "expected"),
    [
        ("sd1", "cond_stage_model.", {}, "has a UNet and a VAE but no text encoder"),
        ("sdxl", "conditioner.", {}, "has a UNet and a VAE but no text encoder"),
        ("sdxl", "conditioner.embedders.1.", {}, "but no text_encoder_2"),
        ("sd2", VAE, {}, "but no VAE"),
        ("sd1", "nothing", tensors("control_model.input_hint_block.0.weight"), "a ControlNet with"),
        ("sd1", "nothing", tensors(UNET + "input_blocks.1.1.time_stack.0.weight"), "a video model"),
        ("sd1", "nothing", tensors(UNET + "strange.weight"), "in no Stable Diffusion 1.x model"),
        ("sd1", "nothing", tensors(VAE + "decoder.up.0.attn.0.q.weight"), "in no Stable Diffusion 1.x model"),
        ("sd2", "nothing", tensors(UNET + "label_emb.0.0.weight"), "an upscaler or unCLIP"),
        ("sdxl", "nothing", tensors("edm_mean"), "EDM noise schedule"),
    ],
)
def test_an_incomplete_or_changed_model_is_refused_in_one_line(files, tmp_path, family, drop, add, expected):
    path = changed(files[family], tmp_path / "model.safetensors", add, [drop])
    message = one_line(open_single_file, path)
    assert message.startswith(f"{path}: ") and expected in message


def test_a_refiner_is_refused(files, tmp_path):
    path = changed(
        files["sdxl"],
        tmp_path / "model.safetensors",
        drop=["conditioner.embedders.0."],
        rename=lambda key: key.replace("embedders.1.", "embedders.0."),
    )
    assert "an SDXL refiner" in one_line(open_single_file, path)


def test_parts_of_different_families_are_refused(files, tmp_path):
    sd2 = {k: v for k, v in load_file(files["sd2"]).items() if k.startswith("cond_stage_model.")}
    path = changed(files["sd1"], tmp_path / "model.safetensors", sd2, ["cond_stage_model."])
    assert "attends to text of width 32, but its text encoders give 64" in one_line(open_single_file, path)


def test_a_file_cut_short_is_refused(files, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(files["sd1"].read_bytes()[:-1000])
    assert "truncated" in one_line(open_single_file, path)


def test_the_tokenizer_of_single_files_is_clips():
    vocab = json.loads((CLIP_TOKENIZER / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocab) == 49408
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(CLIP_TOKENIZER))
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer.model_max_length == 77 and tokenizer.pad_token_id == 49407
    padded = CLIPTokenizer.from_pretrained(str(CLIP_TOKENIZER), pad_token="!")
    assert padded("cat", padding="max_length", max_length=5).input_ids == [49406, 2368, 49407, 0, 0]
