"""Whole pipelines of each family against torch diffusers, from the prompt to the pixels, from the same latents."""

import numpy as np
import pytest

import jaxmix
from jaxmix import InputError
from jaxmix.weights.single_file import CLIP_TOKENIZER
from tests.parity.oracle import perturbed

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

# From diffusers' own Euler scheduler, under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS, NEGATIVES = ["a red apple by the sea", "two cats"], ["blurred", ""]
SIZE = (32, 48)  # pixels: neither square nor the model's own
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
}
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "cross_attention_dim": 40,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def text_encoder(width, act, kind="CLIPTextModel", **rest):
    sizes = {"intermediate_size": 2 * width, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(
        hidden_size=width, hidden_act=act, projection_dim=24, bos_token_id=49406, eos_token_id=49407, **sizes, **rest
    )
    return getattr(transformers, kind)(config)


def tokenizer(pad="<|endoftext|>"):
    return transformers.CLIPTokenizer.from_pretrained(str(CLIP_TOKENIZER), pad_token=pad)


def torch_pipeline(family):
    torch.manual_seed(0)
    vae = perturbed(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, sample_size=32,
        )
    )  # fmt: skip
    if family == "sdxl":
        scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading")
        return diffusers.StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=perturbed(text_encoder(16, "quick_gelu")),
            text_encoder_2=perturbed(text_encoder(24, "gelu", "CLIPTextModelWithProjection")),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer("!"),
            unet=perturbed(diffusers.UNet2DConditionModel(**{**BLOCKS, **SDXL})),
            scheduler=scheduler,
            add_watermarker=False,
        )
    sd2 = family == "sd2"
    own = {"attention_head_dim": (2, 4), "use_linear_projection": True} if sd2 else {"attention_head_dim": 4}
    prediction_type = "v_prediction" if sd2 else "epsilon"
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=perturbed(text_encoder(16, "gelu" if sd2 else "quick_gelu")),
        tokenizer=tokenizer("!" if sd2 else "<|endoftext|>"),
        unet=perturbed(diffusers.UNet2DConditionModel(**BLOCKS, **own, cross_attention_dim=16)),
        scheduler=diffusers.DDIMScheduler(
            **BETAS, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = torch_pipeline(request.param)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder)
    return request.param, theirs, jaxmix.load(folder)


def torch_images(theirs, latents, **settings):
    return theirs(
        PROMPTS, latents=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()), height=SIZE[0], width=SIZE[1],
        output_type="np", **settings,
    ).images  # fmt: skip


def test_a_prompt_becomes_the_same_pixels(both):
    family, theirs, ours = both
    latents = np.random.default_rng(0).standard_normal((2, SIZE[0] // 2, SIZE[1] // 2, 4)).astype("f4")
    extra = {"original_size": (50, 60), "crops_coords_top_left": (3, 5), "target_size": (40, 44)}
    expected = torch_images(
        theirs, latents, negative_prompt=NEGATIVES, num_inference_steps=10, guidance_scale=5.0,
        **(extra if family == "sdxl" else {}),
    )  # fmt: skip
    request = jaxmix.Request(
        prompts=PROMPTS,
        negatives=NEGATIVES,
        latents=latents,
        steps=10,
        guidance_scale=5.0,
        sizes=jaxmix.Sizes((50, 60), (3, 5), (40, 44)),
    )
    got = ours.draw(request, output="float")
    assert ours.sampler == ("euler" if family == "sdxl" else "ddim")
    assert got.shape == expected.shape == (2, *SIZE, 3) and expected.std() > 0.05
    # Ten guided steps and a decoder on top of what one forward pass is allowed (2e-5 of the largest value).
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_sdxl_zeroes_an_empty_negative_prompt_as_torch_does_none_at_all(both):
    family, theirs, ours = both
    latents = np.random.default_rng(1).standard_normal((2, SIZE[0] // 2, SIZE[1] // 2, 4)).astype("f4")
    settings = {"num_inference_steps": 4, "guidance_scale": 4.0}
    expected = torch_images(theirs, latents, **settings)
    got = ours.generate(PROMPTS, latents=latents, steps=4, guidance_scale=4.0, output="float")
    np.testing.assert_allclose(got, expected, atol=2e-4)
    assert ours.zeros_for_empty_prompt == (family == "sdxl")


def test_an_inpainting_unet_is_refused_with_a_line(tmp_path):
    theirs = torch_pipeline("sd1")
    theirs.unet = diffusers.UNet2DConditionModel(**BLOCKS, attention_head_dim=4, cross_attention_dim=16, in_channels=9)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"an inpainting model: its UNet has 9 input channels, expected 4 ") as e:
        jaxmix.load(tmp_path)
    assert "\n" not in str(e.value)


def test_a_size_that_is_no_multiple_of_the_factor_is_a_line(both):
    with pytest.raises(InputError, match="height: found 33 pixels, expected a multiple of 2"):
        both[2].generate(PROMPTS, height=33, width=48)
