import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmix
from jaxmix.command import parse
from jaxmix.models import AutoencoderKL, VAEConfig
from jaxmix.types import InputError
from tests.jobs import killed_after
from train import text_to_image
from train.autoencoder import export

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    config = VAEConfig.from_dict(
        {
            "block_out_channels": [8, 16],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "sample_size": 16,
        }
    )
    folder = tmp_path_factory.mktemp("vae")
    export(folder, config, AutoencoderKL(config).init_params(jax.random.key(0)), 0.9)
    return folder


def shrunk(folder, vae_folder, config="mini_text_to_image.yaml", **changes):
    cfg = parse(text_to_image.main, ["--config", str(CONFIGS / config), "--output_dir", str(folder)])
    blocks = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    blocks["up_block_types"] = ["UpBlock2D", "CrossAttnUpBlock2D"]
    size = {"sample_size": 8, "block_out_channels": [16, 16], "cross_attention_dim": 16, "norm_num_groups": 4}
    size |= {"layers_per_block": 1, "in_channels": 4, "out_channels": 4}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    base = {
        "pretrained_vae_model_name_or_path": str(vae_folder),
        "tokenizer": str(CONFIGS.parent / cfg.tokenizer),
        "unet": {**cfg.unet, **size, **blocks},
        "text_encoder": {**cfg.text_encoder, **text},
        "scenes": {**cfg.scenes, "size": 16, "objects": 4},
        "train_batch_size": 2,
        "devices": 1,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "lr_warmup_steps": 0,
        "lr_cooldown_steps": 0,
        "log_steps": 1,
        "validation_steps": 0,
    }
    return dataclasses.replace(cfg, **{**base, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, vae_folder):
    """Return a folder with two runs of two steps: `whole`, and `parts`, killed after the first and resumed."""
    root = tmp_path_factory.mktemp("runs")
    options = {"mixed_precision": "bf16", "snr_gamma": 5.0, "encoded_scenes": 3}
    assert text_to_image.main(shrunk(root / "whole", vae_folder, validation_steps=2, **options)) == 0
    killed_after(1, root / "whole", root / "parts", exported="pipeline")
    assert text_to_image.main(shrunk(root / "parts", vae_folder, resume_from_checkpoint="1", **options)) == 0
    return root


def test_the_shrunk_config_trains_draws_and_exports_a_pipeline(runs):
    assert (runs / "whole" / "pictures" / "validation-0000002.png").is_file()
    assert (runs / "whole" / "checkpoints" / "2").is_dir()
    pipe = jaxmix.load(runs / "whole" / "pipeline")
    assert pipe.vae.config.scaling_factor == 0.9
    assert pipe.params["unet"]["conv_in"]["kernel"].dtype == jnp.float32  # the weights stay float32 under bf16
    assert pipe.default_guidance_scale == 3.0
    assert pipe.tokenize(["a cat"])[0].shape == (1, 32)


def test_resuming_gives_the_same_weights(runs):
    whole, parts = (jaxmix.load(runs / folder / "pipeline").params for folder in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_a_frozen_text_encoder_has_no_gradient_and_no_optimizer_state():
    params = {"unet": jnp.ones(2), "text_encoder": jnp.ones(2), "vae": jnp.ones(2)}
    learns, frozen = text_to_image.split_params(params, train_text_encoder=False)
    assert (set(learns), set(frozen)) == ({"unet"}, {"text_encoder", "vae"})
    learns, frozen = text_to_image.split_params(params, train_text_encoder=True)
    assert (set(learns), set(frozen)) == ({"unet", "text_encoder"}, {"vae"})


def test_a_pipeline_is_trained_on_from_its_own_weights(runs, tmp_path, vae_folder):
    before = runs / "whole" / "pipeline"
    cfg = shrunk(
        tmp_path, vae_folder, pretrained_model_name_or_path=str(before), train_text_encoder=False, max_train_steps=1
    )
    assert text_to_image.main(dataclasses.replace(cfg, learning_rate=1e-5, ema_decay=0.0)) == 0
    old, new = (jaxmix.load(folder / "pipeline").params for folder in (before.parent, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, old["text_encoder"], new["text_encoder"])
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), old["unet"], new["unet"])
    assert 0 < max(jax.tree.leaves(moved)) <= 1.1e-5


def test_the_share_of_dropped_captions_is_the_configured_one():
    tokenize = lambda text: {"input_ids": np.asarray([len(text)], np.int32)}  # noqa: E731
    row = text_to_image.make_rows(tokenize, 0.1)
    scene = {"image": np.zeros((2, 2, 3), np.uint8), "text": "a cat"}
    ids = [row(scene, np.random.default_rng(seed))["input_ids"][0] for seed in range(3000)]
    assert set(ids) == {0, 5}
    assert np.mean(np.asarray(ids) == 0) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("config", "most"), [("mini_text_to_image.yaml", 32), ("mini2_text_to_image.yaml", 48), ("mini2_sharpen.yaml", 48)]
)
def test_the_validation_prompts_fit_the_text_length(config, most):
    prompts = parse(text_to_image.main, ["--config", str(CONFIGS / config), "--output_dir", "x"]).validation_prompts
    tokenizer = text_to_image.load_tokenizer(str(CONFIGS.parent / "jaxmix/assets/mini/tokenizer"))
    assert len(prompts) >= 8 and all(len(tokenizer(prompt)["input_ids"]) <= most for prompt in prompts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pretrained_vae_model_name_or_path": ""}, "not given"),
        ({"pretrained_vae_model_name_or_path": "no/such"}, "no config.json in no/such"),
        ({"tokenizer": "no/such"}, "tokenizer: found no folder"),
        ({"encoded_scenes": -1}, "encoded_scenes: found -1"),
    ],
)
def test_missing_folders_are_named(tmp_path, vae_folder, change, words):
    with pytest.raises(InputError, match=words):
        text_to_image.main(shrunk(tmp_path, vae_folder, **change))
