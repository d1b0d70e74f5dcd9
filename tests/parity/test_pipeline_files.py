"""Whole pipelines between torch diffusers, diffusers folders and single files: every tensor comes back bit for bit."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxmix
from jaxmix.pipeline.loading import ASSETS
from jaxmix.pipeline.saving import save_pipeline

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

# Of diffusers and torch about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

CROSS_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (64, 128),
    "layers_per_block": 2,
    "sample_size": 64,
}
CROSS_LAST = CROSS_FIRST | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
UNETS = {
    "sd1": CROSS_FIRST | {"cross_attention_dim": 32, "attention_head_dim": 8},
    "sd2": CROSS_FIRST | {"cross_attention_dim": 64, "attention_head_dim": (1, 2), "use_linear_projection": True},
    "sdxl": CROSS_LAST
    | {
        "cross_attention_dim": 96,
        "attention_head_dim": (1, 2),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
    },
}
PADS_WITH_ZEROS = {("sd2", "tokenizer"), ("sdxl", "tokenizer_2")}
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def text_config(tokenizer, width, act, **rest):
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=77,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **rest,
    )


def torch_pipeline(family):
    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(ASSETS / "mini" / "tokenizer"))
    parts = {
        "unet": diffusers.UNet2DConditionModel(**UNETS[family]),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        ),
        "tokenizer": tokenizer,
        "scheduler": diffusers.DDIMScheduler(
            **SCHEDULE, prediction_type="v_prediction" if family == "sd2" else "epsilon"
        ),
    }
    if family != "sdxl":
        act, width = ("gelu", 64) if family == "sd2" else ("quick_gelu", 32)
        parts["text_encoder"] = transformers.CLIPTextModel(text_config(tokenizer, width, act))
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return diffusers.StableDiffusionPipeline(**parts, **unused)
    parts["text_encoder"] = transformers.CLIPTextModel(text_config(tokenizer, 32, "quick_gelu"))
    second = text_config(tokenizer, 64, "gelu", projection_dim=48)
    parts["text_encoder_2"] = transformers.CLIPTextModelWithProjection(second)
    return diffusers.StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, force_zeros_for_empty_prompt=False)


def assert_same_torch(a, b):
    assert type(a) is type(b)
    for part in [name for name, module in a.components.items() if isinstance(module, torch.nn.Module)]:
        found, expected = b.components[part].state_dict(), a.components[part].state_dict()
        assert set(found) == set(expected), part
        assert all(torch.equal(found[key], expected[key]) for key in expected), part


def assert_same(a, b):
    assert jax.tree.structure(dict(a)) == jax.tree.structure(dict(b))
    assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), dict(a), dict(b)))


@pytest.mark.slow
@pytest.mark.parametrize("family", list(UNETS))
def test_pipelines_come_back_from_folders_and_single_files(family, tmp_path):
    theirs = torch_pipeline(family)
    # Small shards, so that this is also the test of theirs.
    theirs.save_pretrained(tmp_path / "torch", max_shard_size="200KB")
    assert (tmp_path / "torch" / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()

    # torch -> ours -> torch
    ours = jaxmix.load(tmp_path / "torch")
    assert ours.default_guidance_scale == (5.0 if family == "sdxl" else 7.5)
    assert ours.zeros_for_empty_prompt is False
    save_pipeline(ours, tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    assert_same_torch(theirs, again)
    if family == "sdxl":
        assert again.config.force_zeros_for_empty_prompt is False
    assert again.scheduler.config.prediction_type == theirs.scheduler.config.prediction_type

    # ours -> torch -> ours
    again.save_pretrained(tmp_path / "again")
    assert_same(jaxmix.load(tmp_path / "again").params, ours.params)

    # ours -> single file -> folder -> single file
    single = tmp_path / "single.safetensors"
    save_pipeline(ours, single, np.float16)
    opened = jaxmix.load(single, "auto")
    assert {x.dtype.name for x in jax.tree.leaves(dict(opened.params))} == {"float16"}
    assert_same(opened.params, jaxmix.load(tmp_path / "ours", np.float16).params)
    save_pipeline(opened, tmp_path / "folder")
    save_pipeline(jaxmix.load(tmp_path / "folder", "auto"), tmp_path / "back.safetensors")
    before, after = load_file(single), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and np.array_equal(before[key], after[key]) for key in before)

    # and what torch reads of a folder that came from a single file
    from_single = type(theirs).from_pretrained(tmp_path / "folder", torch_dtype=torch.float16)
    assert_same_torch(theirs.to(torch.float16), from_single)
    # CLIP's own tokenizer is not the one of these small models, but it is a whole tokenizer.
    for name in ("tokenizer", "tokenizer_2") if family == "sdxl" else ("tokenizer",):
        tokenizer = getattr(from_single, name)
        assert tokenizer("a photo")["input_ids"] == [49406, 320, 1125, 49407]
        assert tokenizer.pad_token == ("!" if (family, name) in PADS_WITH_ZEROS else "<|endoftext|>")
