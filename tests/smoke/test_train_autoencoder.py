import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.command import parse
from jaxmix.types import InputError
from tests.jobs import killed_after
from train import autoencoder
from train.text_to_image import load_autoencoder

CONFIGS = Path(__file__).parents[2] / "configs"


def shrunk(folder, **changes):
    cfg = parse(autoencoder.main, ["--config", str(CONFIGS / "mini_autoencoder.yaml"), "--output_dir", str(folder)])
    small = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16}
    blocks = {key: cfg.vae[key][:2] for key in ("down_block_types", "up_block_types")}
    return dataclasses.replace(
        cfg,
        vae={**cfg.vae, **small, **blocks},
        scenes={**cfg.scenes, "size": 16, "objects": 4},
        crop_size=8,
        train_batch_size=2,
        devices=1,
        max_train_steps=2,
        checkpointing_steps=1,
        lr_warmup_steps=0,
        lr_cooldown_steps=0,
        log_steps=1,
        eval_scenes=16,
        std_scenes=16,
        **changes,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder with two runs of two steps: `whole`, and `parts`, killed after the first and resumed."""
    root = tmp_path_factory.mktemp("runs")
    assert autoencoder.main(shrunk(root / "whole")) == 0
    killed_after(1, root / "whole", root / "parts", exported="vae")
    assert autoencoder.main(shrunk(root / "parts", resume_from_checkpoint="1")) == 0
    return root


def test_the_shrunk_config_trains_and_exports_unit_latents(runs):
    folder = runs / "whole"
    vae, params = load_autoencoder(str(folder / "vae"), jnp.float32)
    scenes = autoencoder.held_back(shrunk(folder), 16)
    assert autoencoder.measure_std(vae, params, scenes) * vae.config.scaling_factor == pytest.approx(1.0, rel=1e-4)
    assert (folder / "pictures" / "0000002.png").is_file()
    assert (folder / "checkpoints" / "2").is_dir()


def test_resuming_gives_the_same_weights(runs):
    whole, parts = (load_autoencoder(str(runs / folder / "vae"), jnp.float32)[1] for folder in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_training_the_decoder_alone_keeps_the_latents(runs, tmp_path):
    start = str(runs / "whole" / "vae")
    cfg = shrunk(tmp_path, pretrained_vae_model_name_or_path=start, train_encoder=False, latent_noise=0.1)
    autoencoder.main(dataclasses.replace(cfg, vae={}))
    (vae, before), (again, after) = (load_autoencoder(path, jnp.float32) for path in (start, str(tmp_path / "vae")))
    assert again.config == vae.config  # scaling_factor too
    for part in ("encoder", "quant_conv"):
        jax.tree.map(np.testing.assert_array_equal, before[part], after[part])
    kernels = (tree["decoder"]["conv_in"]["kernel"] for tree in (before, after))
    assert not np.array_equal(*kernels)


def test_crops_are_windows_of_the_scene():
    image = np.arange(12 * 12 * 3, dtype=np.int64).reshape(12, 12, 3)
    crop = autoencoder.make_crop(4)
    corners = set()
    for seed in range(200):
        cut = crop({"image": image}, np.random.default_rng(seed))["image"]
        top, left = divmod(int(cut[0, 0, 0]) // 3, 12)
        np.testing.assert_array_equal(cut, image[top : top + 4, left : left + 4])
        corners.add((top, left))
    assert {0, 8} <= {top for top, _ in corners}
    assert {0, 8} <= {left for _, left in corners}


def test_difference_loss_sees_edges_but_no_constant():
    flat = jnp.full((1, 8, 8, 3), 0.3)
    assert autoencoder.difference_loss(flat) < 1e-6
    assert autoencoder.difference_loss(flat.at[:, :, 4:].add(0.5)) > 0.1


def test_a_crop_larger_than_the_scenes_is_refused(tmp_path):
    with pytest.raises(InputError, match="crop_size: found 32"):
        autoencoder.make_batches(dataclasses.replace(shrunk(tmp_path), crop_size=32))
