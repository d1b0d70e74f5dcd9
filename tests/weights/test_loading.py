"""What `jaxmix.load` makes of folders and names: everything that it takes, and one line for everything else."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file

import jaxmix
from jaxmix.pipeline.saving import save_pipeline
from jaxmix.types import CheckpointWarning, InputError
from jaxmix.weights import names

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def saved(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    save_pipeline(tiny_pipeline, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """Return a copy that a test may change."""
    return shutil.copytree(saved, tmp_path / "pipeline")


def change(path, **values):
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (config | values).items() if value != "absent"}))


def one_line(*args, **kwargs):
    with pytest.raises(InputError) as error:
        jaxmix.load(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def one_warning(said):
    assert len(said) == 1 and "\n" not in str(said[0].message)
    return str(said[0].message)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def to_half(folder, part, dtype=np.float16):
    for path in (folder / part).glob("*.safetensors"):
        save_file({key: x.astype(dtype) for key, x in load_file(path).items()}, path, {"format": "pt"})


def test_a_folder_comes_back_as_it_was_saved(tiny_pipeline, saved):
    pipe = jaxmix.load(saved)
    assert same(pipe.params, tiny_pipeline.params)
    for field in (
        "unet",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "default_steps",
        "default_guidance_scale",
        "sampler",
    ):
        assert getattr(pipe, field) == getattr(tiny_pipeline, field), field
    assert pipe.tokenize(["a red apple"])[0].tolist() == tiny_pipeline.tokenize(["a red apple"])[0].tolist()


def test_defaults_are_kept_and_arguments_win(tiny_pipeline, tmp_path):
    save_pipeline(
        dataclasses.replace(tiny_pipeline, sampler="euler", default_steps=7, default_guidance_scale=2.5), tmp_path
    )
    pipe = jaxmix.load(tmp_path)
    assert (pipe.sampler, pipe.default_steps, pipe.default_guidance_scale) == ("euler", 7, 2.5)
    pipe = jaxmix.load(tmp_path, sampler="dpmpp_2m_karras", prediction_type="v_prediction")
    assert pipe.sampler == "dpmpp_2m_karras"
    assert pipe.schedule.prediction_type == "v_prediction"


def test_the_scheduler_names_the_sampler_where_nothing_was_saved(folder):
    change(folder / "model_index.json", _jaxmix="absent")
    change(folder / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler")
    assert jaxmix.load(folder).sampler == "euler"


def test_auto_keeps_the_precision_of_each_part(folder):
    to_half(folder, "unet")
    to_half(folder, "text_encoder", jnp.bfloat16)
    pipe = jaxmix.load(folder, "auto")
    assert [jnp.dtype(getattr(pipe, part).dtype).name for part in PARTS] == ["float16", "float32", "bfloat16"]
    assert [{x.dtype.name for x in jax.tree.leaves(pipe.params[part])} for part in PARTS] == [
        {"float16"},
        {"float32"},
        {"bfloat16"},
    ]


def test_a_vae_that_overflows_in_float16_is_computed_in_float32(folder, tmp_path):
    pipe = jaxmix.load(folder, "float16")
    assert pipe.vae.config.force_upcast
    assert (pipe.vae.dtype, pipe.unet.dtype) == (jnp.float32, jnp.float16)
    assert {x.dtype for x in jax.tree.leaves(pipe.params["vae"])} == {jnp.dtype(jnp.float16)}
    assert jaxmix.load(folder, "bfloat16").vae.dtype == jnp.bfloat16
    change(folder / "vae" / "config.json", force_upcast=False)
    assert jaxmix.load(folder, "float16").vae.dtype == jnp.float16


def test_of_mixed_precisions_auto_takes_the_widest_and_says_so(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"conv_in.bias": tensors["conv_in.bias"].astype(np.float16)}, path, {"format": "pt"})
    with pytest.warns(CheckpointWarning) as said:
        pipe = jaxmix.load(folder, "auto")
    assert "unet/diffusion_pytorch_model.safetensors: mixed precisions: found " in one_warning(said)
    assert pipe.params["unet"]["conv_in"]["bias"].dtype == jnp.float32
    assert jaxmix.load(folder).params["unet"]["conv_in"]["bias"].dtype == jnp.float32


def flax_tree(params):
    """Return our parameters under Flax names: list indices after an underscore, the VAE's attention by old names."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    leaves = {}
    for path, leaf in names.flatten(params):
        vae = "attentions.0" in path and path[0] in ("encoder", "decoder")
        modules = [old[m] if vae and m in old else m.replace(".", "_") for m in path[:-1]]
        leaves[(*modules, path[-1])] = np.asarray(leaf)
    return names.unflatten(leaves)


def clip_tree(params):
    """Return the same for transformers' Flax text encoder, which nests by every dot."""
    return names.unflatten({(*".".join(p[:-1]).split("."), p[-1]): np.asarray(x) for p, x in names.flatten(params)})


def test_a_folder_of_flax_weights_loads(tiny_pipeline, folder):
    for part in PARTS:
        for path in (folder / part).glob("*.safetensors"):
            path.unlink()
    for part in ("unet", "vae"):
        data = serialization.to_bytes(flax_tree(tiny_pipeline.params[part]))
        (folder / part / "diffusion_flax_model.msgpack").write_bytes(data)
    data = serialization.to_bytes(clip_tree(tiny_pipeline.params["text_encoder"]))
    (folder / "text_encoder" / "flax_model.msgpack").write_bytes(data)
    change(folder / "model_index.json", _class_name="FlaxStableDiffusionPipeline")
    change(
        folder / "unet" / "config.json",
        _class_name="FlaxUNet2DConditionModel",
        only_cross_attention=[False, False],
        split_head_dim=True,
        use_memory_efficient_attention=True,
    )
    change(folder / "vae" / "config.json", _class_name="FlaxAutoencoderKL")
    change(folder / "scheduler" / "scheduler_config.json", _class_name="FlaxDDIMScheduler")
    assert same(jaxmix.load(folder).params, tiny_pipeline.params)


@pytest.mark.parametrize("part", ["text_encoder", "vae", "unet", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    assert one_line(folder).startswith(f"{folder}: found no {part} folder in this StableDiffusionPipeline, expected ")


OTHERS = {
    "StableDiffusion3Pipeline": {"unet": "absent", "transformer": ["diffusers", "SD3Transformer2DModel"]},
    "KolorsPipeline": {"text_encoder": ["kolors", "ChatGLMModel"]},
    "StableVideoDiffusionPipeline": {"unet": ["diffusers", "UNetSpatioTemporalConditionModel"], "text_encoder": 7},
}


@pytest.mark.parametrize("cls", OTHERS)
def test_other_pipelines_are_named(folder, cls):
    change(folder / "model_index.json", _class_name=cls, **OTHERS[cls])
    expected = f"{folder}/model_index.json: found a {cls} (its "
    assert one_line(folder).startswith(expected) and "expected a StableDiffusionPipeline or a" in one_line(folder)


@pytest.mark.parametrize("cls", ["StableDiffusionPAGPipeline", "StableDiffusionInpaintPipeline", ["mine", "My"], None])
def test_pipelines_that_hold_a_plain_model_open(folder, cls):
    change(folder / "model_index.json", _class_name=cls)
    assert jaxmix.load(folder).sampler == "ddim"
    change(folder / "model_index.json", controlnet=["diffusers", "ControlNetModel"], image_encoder=["x", "Y"])
    with pytest.warns(CheckpointWarning) as said:
        jaxmix.load(folder)
    assert one_warning(said).endswith(", of which the controlnet are left out")


def test_an_inpainting_unet_is_named_before_its_weights_are_read(folder):
    change(folder / "unet" / "config.json", in_channels=9)
    text = one_line(folder)
    assert "an inpainting model: its UNet has 9 input channels, expected 4 (text-to-image)" in text


def test_folders_that_hold_one_model_are_named(saved, tmp_path):
    expected = "expected a diffusers pipeline (model_index.json)"
    assert one_line(saved / "vae") == f"{saved / 'vae'}: found a single model, AutoencoderKL, {expected}"
    assert "found a single model, CLIPTextModel" in one_line(saved / "text_encoder")
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert "found a LoRA" in one_line(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "model.safetensors")
    assert f"to load a single file give its path, such as {tmp_path}/model.safetensors" in one_line(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert one_line(tmp_path) == f"{tmp_path}: found no model_index.json, {expected}"


@pytest.mark.parametrize(
    ("name", "what"),
    [("a.ckpt", "a Python pickle"), ("a.gguf", "a GGUF file"), ("a.msgpack", "the Flax weights"), ("a.txt", "a file")],
)
def test_other_files_are_named(tmp_path, name, what):
    (tmp_path / name).write_bytes(b"x")
    assert one_line(tmp_path / name).startswith(f"{tmp_path / name}: found {what}")


def test_a_config_that_is_not_supported_is_named_with_its_file(folder):
    change(folder / "unet" / "config.json", class_embed_type="timestep")
    assert one_line(folder).startswith(f"{folder}/unet/config.json: UNet2DConditionModel config: class_embed_type")


def test_names_and_options_that_mean_nothing_are_one_line(tmp_path):
    assert "found no such folder or file, expected 'mini', a diffusers folder" in one_line(tmp_path / "nothing")
    assert "sampler: found 'eulr', expected one of ddim, " in one_line("mini", sampler="eulr")
    assert "dtype: found 'int8', expected float32, bfloat16, float16 or 'auto'" in one_line("mini", "int8")
    assert "prediction_type" in one_line("mini", prediction_type="flow")
