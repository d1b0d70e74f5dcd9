"""CLIP's image encoder against transformers: small ones by number, the released ones by census."""

import jax
import numpy as np
import pytest
from safetensors.torch import save_file

from jaxmix.models import CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from jaxmix.models.vision import resized_pixels
from jaxmix.pictures import clip_pixels
from jaxmix.pipeline.vision import ImageEncoder
from jaxmix.released import RELEASED
from jaxmix.testing import random_params
from jaxmix.types import InputError
from jaxmix.weights import load_tree
from jaxmix.weights.files import ASSETS
from jaxmix.weights.names import flatten, to_torch_key, to_torch_shape
from jaxmix.weights.vision_files import open_image_encoder
from tests.parity.oracle import assert_close, perturbed, run
from train import clip

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 10,
    "hidden_act": "gelu",
}
PIXELS = np.random.default_rng(0).standard_normal((2, 28, 28, 3)).astype("f4")


def theirs(projection, **changes):
    torch.manual_seed(0)
    kind = transformers.CLIPVisionModelWithProjection if projection else transformers.CLIPVisionModel
    return perturbed(kind(transformers.CLIPVisionConfig(**TINY | changes)))


def encoded(path):
    """Return the states of PIXELS by the encoder at a path."""
    config, source = open_image_encoder(path)
    ours = CLIPVisionModel(CLIPVisionConfig.from_dict(config))
    return run(ours, load_tree(source, ours.abstract_params()), PIXELS)


@pytest.mark.parametrize(("projection", "act"), [(True, "quick_gelu"), (False, "gelu")])
def test_states_agree(projection, act, tmp_path):
    model = theirs(projection, hidden_act=act)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy()), output_hidden_states=True)
    got = encoded(tmp_path)
    assert got.last_hidden_state.shape == (2, 17, 64)
    assert_close(got.last_hidden_state, expected.last_hidden_state.numpy())
    assert_close(got.penultimate, expected.hidden_states[-2].numpy())
    if projection:
        assert_close(got.projected, expected.image_embeds.numpy())
    else:
        assert got.projected is None
        assert_close(got.pooled, expected.pooler_output.numpy())


def as_open_clip(state):
    """Return transformers' tensors under open_clip's names, and something that is not of the image tower."""
    flat = {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    names = {"class_embedding": "embeddings.class_embedding", "conv1.weight": "embeddings.patch_embedding.weight"}
    names |= {"positional_embedding": "embeddings.position_embedding.weight"}
    for leaf in ("weight", "bias"):
        names |= {f"ln_pre.{leaf}": f"pre_layrnorm.{leaf}", f"ln_post.{leaf}": f"post_layernorm.{leaf}"}
        for i in range(TINY["num_hidden_layers"]):
            a, b = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            names |= {f"{a}.ln_1.{leaf}": f"{b}.layer_norm1.{leaf}", f"{a}.ln_2.{leaf}": f"{b}.layer_norm2.{leaf}"}
            names |= {f"{a}.mlp.c_fc.{leaf}": f"{b}.mlp.fc1.{leaf}", f"{a}.mlp.c_proj.{leaf}": f"{b}.mlp.fc2.{leaf}"}
            names[f"{a}.attn.out_proj.{leaf}"] = f"{b}.self_attn.out_proj.{leaf}"
            parts = [state[f"vision_model.{b}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            flat[f"visual.{a}.attn.in_proj_{leaf}"] = torch.cat(parts)
    flat |= {f"visual.{a}": state[f"vision_model.{b}"] for a, b in names.items()}
    return flat | {"visual.proj": state["visual_projection.weight"].T.contiguous()}


def test_files_of_both_layouts_are_the_same_encoder(tmp_path):
    model = theirs(True)
    state = {key: x.contiguous() for key, x in model.state_dict().items()}
    save_file(state | {"text_model.x.weight": torch.ones(2)}, tmp_path / "hf.safetensors")
    save_file(as_open_clip(state), tmp_path / "open_clip.safetensors")
    model.save_pretrained(tmp_path / "whole" / "image_encoder")
    expected = encoded(tmp_path / "whole")
    for name in ("hf.safetensors", "open_clip.safetensors"):
        jax.tree.map(np.testing.assert_array_equal, encoded(tmp_path / name), expected)


@pytest.mark.parametrize(("name", "count"), [("clip_vit_l", 303_966_208), ("clip_vit_h", 632_076_800)])
def test_the_released_encoders_have_every_tensor_by_name_and_shape(name, count):
    config = RELEASED[name]["image_encoder"]
    with torch.device("meta"):
        model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config))
    expected = {key: tuple(x.shape) for key, x in model.named_parameters()}
    params = CLIPVisionModel(CLIPVisionConfig.from_dict(config)).abstract_params()
    found = {to_torch_key(path): to_torch_shape(path, leaf.shape) for path, leaf in flatten(params)}
    assert found == expected
    assert sum(np.prod(shape) for shape in found.values()) == count


def test_the_largest_one_has_its_published_size():
    config = CLIPVisionConfig.from_dict(RELEASED["clip_vit_bigg"]["image_encoder"])
    params = CLIPVisionModel(config).abstract_params()
    assert sum(np.prod(leaf.shape) for _, leaf in flatten(params)) == 1_844_907_264 and config.tokens == 257


@pytest.mark.parametrize("hw", [(480, 640), (301, 224), (224, 224), (90, 333), (511, 77)])
def test_pixels_are_those_of_transformers(hw):
    image = np.random.default_rng(1).integers(0, 256, (*hw, 3), np.uint8)
    made = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil()(image, return_tensors="np")
    np.testing.assert_array_equal(clip_pixels(image), made["pixel_values"][0].transpose(1, 2, 0))


def test_differentiable_pixels_are_close_to_those_of_pil():
    """Up to PIL's rounding between its passes, a grey level, where a picture is smooth."""
    y, x = np.mgrid[:96, :130] / 20
    image = (127 + 100 * np.sin(x[..., None] + y[..., None] * [1, 2, 3])).astype(np.uint8)
    got = resized_pixels(image[None].astype("f4") / 255, 28)
    assert got.shape == (1, 28, 28, 3)
    np.testing.assert_allclose(got[0], clip_pixels(image, 28), atol=2 / 255 / 0.26)
    assert np.isfinite(jax.grad(lambda x: resized_pixels(x, 28).sum())(np.ones((1, 40, 30, 3), "f4"))).all()


def test_the_config_of_a_whole_clip_is_read():
    whole = {"architectures": ["CLIPModel"], "projection_dim": 10, "vision_config": TINY, "text_config": {}}
    assert CLIPVisionConfig.from_dict(whole).projection_dim == 10 and CLIPVisionConfig.from_dict(whole).projection
    with pytest.raises(InputError, match="patch_size=5"):
        CLIPVisionConfig.from_dict(TINY | {"patch_size": 5})


def test_other_files_are_said_to_be_what_they_are(tmp_path):
    save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"this is a LoRA or another adapter .*, expected a CLIP image encoder"):
        open_image_encoder(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="found no such file or folder, expected a CLIP image encoder"):
        open_image_encoder(tmp_path / "nowhere")


def test_a_clip_of_our_trainer_is_one_of_transformers(tmp_path):
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    cfg = clip.Config(
        output_dir="unused",
        vision={**tower, "image_size": 16, "patch_size": 8},
        text_encoder={**tower, "max_position_embeddings": 20},
        projection_dim=10,
        tokenizer=str(ASSETS / "mini" / "tokenizer"),
    )
    configs = clip.make_configs(cfg)
    vision, text = CLIPVisionModel(configs[0]), CLIPTextModel(configs[1])
    params = {"vision": random_params(vision.abstract_params(), 0), "text": random_params(text.abstract_params(), 1)}
    clip.export(tmp_path, {**params, "logit_scale": np.float32(1.5)}, configs, cfg.tokenizer)
    model = transformers.CLIPModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    phrases = ["a cat", "a 3d render of a car by the sea", ""]
    ids = tokenizer(phrases, padding="max_length", return_tensors="pt")["input_ids"]
    assert ids.shape == (3, 20) and model.logit_scale.item() == 1.5
    image = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    pixels = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil.from_pretrained(tmp_path)(image)
    with torch.no_grad():
        states = model.text_model(ids), model.vision_model(torch.from_numpy(np.stack(pixels["pixel_values"])))
        heads = (model.text_projection, model.visual_projection)
        expected = [head(x.pooler_output) for head, x in zip(heads, states, strict=True)]
    encoder = ImageEncoder.load(tmp_path)
    assert_close(encoder.texts(phrases), expected[0].numpy())
    assert_close(encoder(encoder.pixels([image])).projected, expected[1].numpy())
    (tmp_path / "alone").mkdir()
    theirs(True).save_pretrained(tmp_path / "alone")
    with pytest.raises(InputError, match="found no text encoder beside the image encoder"):
        ImageEncoder.load(tmp_path / "alone").texts(["a cat"])
