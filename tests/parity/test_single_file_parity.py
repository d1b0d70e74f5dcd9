"""Single-file checkpoints against torch diffusers: its converters and pipelines read what ours wrote, bit for bit."""

import numpy as np
import pytest
from safetensors.numpy import load_file as load_arrays

from jaxmix.models import AutoencoderKL, CLIPTextConfig, CLIPTextModel, UNet2DConditionModel, UNetConfig, VAEConfig
from jaxmix.released import RELEASED
from jaxmix.weights import load_tree, read_config
from jaxmix.weights.single_file import CLIP_TOKENIZER, PAD_TOKENS, open_single_file, save_single_file
from jaxmix.weights.single_file_configs import read_configs, scheduler_config
from jaxmix.weights.single_file_kinds import family_of
from jaxmix.weights.single_file_names import canonical, tables

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

FAMILIES = ("sd1", "sd2", "sdxl")
CROSS = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
OPEN_CLIP = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}


def unet(down, **rest):
    return {
        "down_block_types": tuple(CROSS[0][i] for i in down),
        "up_block_types": tuple(CROSS[1][i] for i in reversed(down)),
        "layers_per_block": 2,
        "sample_size": 64,
        **rest,
    }


def text(width, layers, act, intermediate_size, vocab=49408, positions=77, **rest):
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": positions,
        "hidden_act": act,
        "projection_dim": width,
        "bos_token_id": vocab - 2,
        "eos_token_id": vocab - 1,
        **rest,
    }


VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
SDXL = {"use_linear_projection": True, "addition_embed_type": "text_time"}

SMALL = {
    "sd1": {
        "unet": unet([1, 1, 0], block_out_channels=(32, 64, 64), cross_attention_dim=32, attention_head_dim=8),
        "text_encoder": text(32, 2, "quick_gelu", 64),
    },
    "sd2": {
        "unet": unet(
            [1, 0],
            block_out_channels=(64, 128),
            cross_attention_dim=64,
            attention_head_dim=(1, 2),
            use_linear_projection=True,
        ),
        "text_encoder": text(64, 2, "gelu", 128),
    },
    "sdxl": {
        "unet": unet(
            [0, 1, 1],
            block_out_channels=(32, 64, 128),
            cross_attention_dim=96,
            attention_head_dim=(1, 1, 2),
            transformer_layers_per_block=(1, 2, 3),
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=48 + 6 * 8,
            **SDXL,
        ),
        "text_encoder": text(32, 2, "quick_gelu", 64),
        "text_encoder_2": text(64, 3, "gelu", 128, projection_dim=48),
    },
}
SMALL = {
    family: parts | {"vae": VAE | {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1}}
    for family, parts in SMALL.items()
}

# The released models as a single file tells them: texts end with the last piece of the vocabulary, and an encoder
# without a projection says nothing about its width.
FULL = {
    family: {part: config for part, config in RELEASED[model].items() if part != "scheduler"}
    for family, model in {"sd1": "sd15", "sd2": "sd21_base", "sdxl": "sdxl"}.items()
}
TOLD = {"bos_token_id": 49406, "eos_token_id": 49407}
FULL = {
    family: {
        part: config | TOLD | {"projection_dim": config["hidden_size"]} if part.startswith("text") else config
        for part, config in parts.items()
    }
    for family, parts in FULL.items()
}


def torch_models(parts):
    config = {part: transformers.CLIPTextConfig(**parts[part]) for part in parts if part.startswith("text")}
    models = {
        "unet": diffusers.UNet2DConditionModel.from_config(parts["unet"]),
        "vae": diffusers.AutoencoderKL.from_config(parts["vae"]),
        "text_encoder": transformers.CLIPTextModel(config["text_encoder"]),
    }
    if "text_encoder_2" in parts:
        models["text_encoder_2"] = transformers.CLIPTextModelWithProjection(config["text_encoder_2"])
    return models


def our_model(part, config):
    if part == "unet":
        return UNet2DConditionModel(UNetConfig.from_dict(config))
    if part == "vae":
        return AutoencoderKL(VAEConfig.from_dict(config))
    return CLIPTextModel(CLIPTextConfig.from_dict(config))


def state(part, model):
    """Return torch's tensors under the names that have `text_model.`; buffers that no checkpoint needs are left out."""
    return {canonical(part, k): v for k, v in model.state_dict().items() if not k.endswith("position_ids")}


@pytest.fixture(scope="module", params=FAMILIES)
def written(request, tmp_path_factory):
    """Return a diffusers folder of a small random pipeline, its torch models, and the single file we made of it."""
    family = request.param
    torch.manual_seed(0)
    models = torch_models(SMALL[family])
    with torch.no_grad():  # norms and biases start at ones and zeros, where a swap would go unnoticed
        for model in models.values():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
    tokenizers = {
        name: transformers.CLIPTokenizer.from_pretrained(str(CLIP_TOKENIZER), pad_token=pad)
        for name, pad in PAD_TOKENS[family].items()
    }
    config = scheduler_config(family, "epsilon", zero_terminal_snr=False)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    models["vae"].register_to_config(scaling_factor=0.13025 if family == "sdxl" else 0.18215)
    folder = tmp_path_factory.mktemp(family)
    if family == "sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(**models, **tokenizers, scheduler=scheduler, add_watermarker=False)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **models,
            **tokenizers,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)

    configs, params = {}, {}
    for part in models:
        config = read_config(folder / part / "config.json")
        ours = our_model(part, config)
        configs[part] = ours.config.to_dict()
        params[part] = load_tree(folder / part, ours.abstract_params())
    path = folder / "single.safetensors"
    save_single_file(path, family, configs, params)
    return family, folder, models, path


def test_ours_reads_back_what_torch_had(written):
    family, _, models, path = written
    single = open_single_file(path)
    assert single.family == family and not single.extras.entries
    for part, model in models.items():
        expected = state(part, model)
        source = single.sources[part]
        assert set(source.entries) == set(expected), part
        for key, tensor in expected.items():
            np.testing.assert_array_equal(source.read(key), tensor.numpy(), err_msg=key)
            assert tuple(source.entries[key].shape) == tuple(tensor.shape), key


def test_diffusers_converters_map_the_file_to_the_same_tensors(written):
    from diffusers.loaders import single_file_utils as theirs

    family, _, models, path = written
    checkpoint = safetensors_torch.load_file(path)
    found = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(checkpoint), models["unet"].config),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(checkpoint), models["vae"].config),
    }
    if family != "sd2":
        found["text_encoder"] = theirs.convert_ldm_clip_checkpoint(dict(checkpoint))
    if family in OPEN_CLIP:
        part = "text_encoder" if family == "sd2" else "text_encoder_2"
        # Without text_projection in the file they take the width of the model from its config.
        found[part] = theirs.convert_open_clip_checkpoint(models[part], dict(checkpoint), OPEN_CLIP[family])
    assert found.keys() == models.keys()
    for part, model in models.items():
        expected = state(part, model)
        assert set(found[part]) == set(expected), part
        for key, tensor in expected.items():
            assert torch.equal(found[part][key], tensor), f"{part} {key}"


def test_a_torch_pipeline_opens_the_file(written):
    family, folder, models, path = written
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    extra = {} if family == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}
    pipe = kind.from_single_file(str(path), config=str(folder), local_files_only=True, **extra)
    for part, model in models.items():
        expected, found = state(part, model), state(part, getattr(pipe, part))
        assert set(found) == set(expected), part
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), part


@pytest.fixture(scope="module")
def full_shapes():
    """Return names and shapes of the real models' tensors by family and part, under torch's names."""
    with torch.device("meta"):
        return {
            family: {
                part: {k: tuple(v.shape) for k, v in state(part, model).items()}
                for part, model in torch_models(parts).items()
            }
            for family, parts in FULL.items()
        }


def file_shapes(family, shapes):
    """Return the single file of a model: every tensor of ours must have one place in it."""
    found = {}
    for part, table in tables(family, FULL[family]).items():
        for key, shape in shapes[part].items():
            link = table.of_ours(key)
            assert link is not None, key
            assert table.of_file(link.key) == link and key in link.ours, key
            assert set(link.ours) <= set(shapes[part]), key
            found[link.key] = {
                "same": shape,
                "pointwise": (*shape, 1, 1),
                "thirds": (3 * shape[0], *shape[1:]),
                "transposed": shape[::-1],
            }[link.how]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_of_the_real_models_are_a_bijection(full_shapes, family):
    found = file_shapes(family, full_shapes[family])
    count = {
        prefix: sum(key.startswith(prefix) for key in found)
        for prefix in ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
    }
    # As counted in the published files, less their buffers and what is not used of OpenCLIP.
    assert (
        list(count.values())
        == {
            "sd1": [686, 248, 196, 0],
            "sd2": [686, 248, 0 + 23 * 12 + 4, 0],
            "sdxl": [1680, 248, 0, 196 + 32 * 12 + 5],
        }[family]
    )
    by_part = tables(family, FULL[family])
    for part, shapes in full_shapes[family].items():
        ours = [k for key in found if (link := by_part[part].of_file(key)) for k in link.ours]
        assert sorted(ours) == sorted(shapes), part


@pytest.mark.parametrize("family", FAMILIES)
def test_the_real_models_are_told_from_their_shapes(full_shapes, family):
    shapes = file_shapes(family, full_shapes[family])
    assert family_of("file", shapes) == family
    told = read_configs("file", family, shapes, "epsilon")
    for part, expected in FULL[family].items():
        config = told[part]
        for key, value in expected.items():
            assert config[key] == value, (part, key)
    assert told["unet"]["in_channels"] == 4 and told["unet"]["norm_num_groups"] == 32
    assert told["vae"]["latent_channels"] == 4 and told["vae"]["norm_num_groups"] == 32
    # The whole OpenCLIP encoder of the published 2.x files has one layer more, which is not used.
    if family == "sd2":
        prefix = OPEN_CLIP["sd2"]
        whole = shapes | {
            key.replace("resblocks.22.", "resblocks.23."): shape for key, shape in shapes.items() if ".22." in key
        }
        whole |= {prefix + "text_projection": (1024, 1024), prefix + "logit_scale": ()}
        assert read_configs("file", family, whole, "epsilon")["text_encoder"] == told["text_encoder"]


@pytest.mark.parametrize(
    ("family", "key", "shape"),
    [
        ("sd1", "model.diffusion_model.input_blocks.4.1.proj_in.weight", (640, 640, 1, 1)),
        ("sd1", "model.diffusion_model.output_blocks.2.1.conv.weight", (1280, 1280, 3, 3)),
        ("sd1", "model.diffusion_model.output_blocks.11.0.skip_connection.weight", (320, 640, 1, 1)),
        ("sd1", "first_stage_model.decoder.up.3.upsample.conv.weight", (512, 512, 3, 3)),
        ("sd1", "first_stage_model.encoder.mid.attn_1.q.weight", (512, 512, 1, 1)),
        ("sd2", "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight", (320, 1024)),
        ("sd2", "model.diffusion_model.middle_block.1.proj_out.weight", (1280, 1280)),
        ("sd2", "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight", (3072, 1024)),
        ("sdxl", "model.diffusion_model.output_blocks.8.0.skip_connection.weight", (320, 640, 1, 1)),
        ("sdxl", "model.diffusion_model.output_blocks.2.2.conv.weight", (1280, 1280, 3, 3)),
        ("sdxl", "model.diffusion_model.label_emb.0.0.weight", (1280, 2816)),
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias", (1280,)),
        ("sdxl", "conditioner.embedders.1.model.text_projection", (1280, 1280)),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight", (77, 768)),
    ],
)
def test_tensors_that_the_published_files_are_known_by_are_there(full_shapes, family, key, shape):
    assert file_shapes(family, full_shapes[family])[key] == shape


def test_a_file_in_half_precision_stays_so(written, tmp_path):
    family, _, _, path = written
    halves = {key: array.astype(np.float16) for key, array in load_arrays(path).items()}
    safetensors_torch.save_file({k: torch.from_numpy(v) for k, v in halves.items()}, tmp_path / "half.safetensors")
    single = open_single_file(tmp_path / "half.safetensors")
    params = {
        part: load_tree(source, our_model(part, single.configs[part]).abstract_params(), "auto")
        for part, source in single.sources.items()
    }
    save_single_file(tmp_path / "again.safetensors", family, single.configs, params, single.extras)
    again = load_arrays(tmp_path / "again.safetensors")
    assert again.keys() == halves.keys()
    for key, array in halves.items():
        assert again[key].dtype == np.float16 and again[key].shape == array.shape, key
        np.testing.assert_array_equal(again[key], array, err_msg=key)
