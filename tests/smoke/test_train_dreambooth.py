"""The trainer of DreamBooth on a tiny base: class pictures, both halves, the folder it writes, resuming, refusals."""

import dataclasses
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmix
from jaxmix import InputError
from jaxmix.command import parse
from jaxmix.tuning.data import make_dataset
from jaxmix.tuning.loss import diffusion_loss
from tests.data.made import encoded, picture
from tests.jobs import TWO_STEPS, killed_after
from train import dreambooth
from train.class_pictures import PLAN, class_pictures
from train.diffusion import make_tokenize
from train.subjects import open_instances

CONFIGS = Path(__file__).parents[2] / "configs"
WEIGHTS = Path(dreambooth.FOLDER) / "unet" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(one_level, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    one_level.save(folder)
    return str(folder)


def shrunk(base, folder, **changes):
    """Return the committed config at the size of the tiny base."""
    cfg = parse(dreambooth.main, ["--config", str(CONFIGS / "dreambooth_mini.yaml"), "--output_dir", str(folder)])
    small = {
        "pretrained_model_name_or_path": base,
        "scenes": {**cfg.scenes, "size": 16, "objects": 4},
        "num_class_images": 3,
        "sample_batch_size": 2,
        "class_guidance_scale": 1.0,
        **TWO_STEPS,
        "validation_steps": 0,
        "validation_prompts": cfg.validation_prompts[:2],
        "validation_guidance_scale": 1.0,
        "validation_batch_size": 2,
    }
    return dataclasses.replace(cfg, **{**small, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base):
    """Return a folder with two runs of two steps: `whole`, and `parts`, killed after the first and resumed."""
    root = tmp_path_factory.mktemp("runs")
    assert dreambooth.main(shrunk(base, root / "whole", validation_steps=2)) == 0
    killed_after(1, root / "whole", root / "parts", exported=dreambooth.FOLDER)
    assert dreambooth.main(shrunk(base, root / "parts", resume_from_checkpoint="1")) == 0
    return root


def test_stopping_and_resuming_gives_the_same_folder_that_loads(runs, one_level):
    assert (runs / "whole" / WEIGHTS).read_bytes() == (runs / "parts" / WEIGHTS).read_bytes()
    pipe = jaxmix.load(runs / "whole" / dreambooth.FOLDER)
    same = jax.tree.map(np.array_equal, pipe.params["unet"], one_level.params["unet"])
    assert not any(jax.tree.leaves(same["conv_in"]))
    for part in ("vae", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, pipe.params[part], one_level.params[part])
    assert len(list((runs / "whole" / "pictures").iterdir())) == 1
    assert {p.name for p in (runs / "whole" / "class").iterdir()} == {PLAN, *(f"{i:05d}.png" for i in range(3))}


def test_every_batch_has_as_many_of_both_and_their_losses_are_the_sum_of_two_means(runs, one_level, base, tmp_path):
    cfg = shrunk(base, tmp_path, prior_loss_weight=0.3, train_batch_size=6)
    rows = dreambooth.open_rows(
        cfg, dreambooth.open_instances(cfg, one_level, cfg.instance_prompt), runs / "whole" / "class"
    )
    tokenize = make_tokenize(one_level)
    batch = make_dataset(rows, 6, 0, dreambooth.make_rows(tokenize, cfg))[0]
    first, second = (tokenize(prompt)["input_ids"] for prompt in (cfg.instance_prompt, cfg.class_prompt))
    for i in range(6):
        np.testing.assert_array_equal(batch["input_ids"][i], (first, second)[i % 2])
        assert batch["id"][i].startswith(("scene", "0000")[i % 2])
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4, 4, 2)), jnp.float32)

    def loss(weights):
        how = (lambda x, t: 0.5 * x, one_level.schedule, latents, jax.random.key(0), 5.0)
        return float(diffusion_loss(*how, row_weights=jnp.asarray(weights, jnp.float32))[0])

    each = [6 * loss(np.eye(6)[i]) for i in range(6)]
    np.testing.assert_allclose(loss(batch["loss_weight"]), np.mean(each[::2]) + 0.3 * np.mean(each[1::2]), rtol=1e-5)


class Drawn:
    """Stands for the sampler: a picture of each seed, and what was asked for."""

    def __init__(self, stop_after=None):
        self.seeds, self.stop_after = [], stop_after

    def __call__(self, prompts, seeds, steps, guidance_scale, height, width):
        self.seeds += seeds
        if self.stop_after is not None and len(self.seeds) >= self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return np.stack([np.full((height, width, 3), 10 * seed, np.uint8) for seed in seeds])


def test_class_pictures_have_fixed_seeds_and_go_on_where_they_were_stopped(one_level, tmp_path):
    told = {"prompt": "a dog", "count": 7, "size": 16, "batch_size": 2, "seed": 3}
    stopped = Drawn(stop_after=4)
    assert not class_pictures(one_level, tmp_path, **told, draw=stopped)
    assert stopped.seeds == [3, 4, 5, 6]
    rest = Drawn()
    assert class_pictures(one_level, tmp_path, **told, draw=rest)
    assert rest.seeds == [7, 8, 9, 9]  # the last batch is filled up, and what fills it is not written
    assert len(list(tmp_path.glob("*.png"))) == 7
    again = Drawn()
    assert class_pictures(one_level, tmp_path, **told, draw=again) and again.seeds == []
    with pytest.raises(InputError, match="drawn for another class_prompt: found 'a dog', expected 'a cat'"):
        class_pictures(one_level, tmp_path, **{**told, "prompt": "a cat"}, draw=again)


def test_own_class_pictures_count(one_level, tmp_path):
    for i in range(3):
        (tmp_path / f"photo{i}.jpg").write_bytes(encoded(picture(i, (16, 16))))
    drawn = Drawn()
    told = {"prompt": "a dog", "size": 16, "batch_size": 2}
    assert class_pictures(one_level, tmp_path, count=3, **told, draw=drawn) and drawn.seeds == []
    assert not (tmp_path / PLAN).exists()
    assert class_pictures(one_level, tmp_path, count=5, **told, draw=drawn) and drawn.seeds == [0, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"instance_prompt": " "}, "instance_prompt: not given"),
        ({"class_prompt": ""}, "class_prompt: not given with with_prior_preservation"),
        ({"class_prompt": "A 3d  render of a sks penguin"}, "class_prompt: found that of the instance"),
        ({"with_prior_preservation": False}, "class_prompt: found it without with_prior_preservation"),
        ({"train_batch_size": 3}, "train_batch_size: found 3 with with_prior_preservation, expected an even"),
        ({"scene_object": "dog"}, "scene_object: found 'dog', expected one of robot, duck"),
        ({"enable_bucket": True}, "enable_bucket: found it with class pictures"),
        ({"instance_data_dir": "dog"}, "train_data_dir, scenes: found both"),
        ({"scenes": {}, "scene_object": "", "instance_data_dir": "no/such"}, "no/such: found no such folder"),
        ({"rank": 4, "lora_targets": "attn3"}, "lora_targets: 'attn3' matches none of the"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, base, changes, words):
    with pytest.raises(InputError) as e:
        dreambooth.main(shrunk(base, tmp_path, **changes))
    assert words in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "class").exists()


def test_scenes_without_an_object_are_of_any_as_a_style_asks_for(tmp_path, base):
    cfg = shrunk(base, tmp_path, scene_object="", num_instance_images=12)
    rows = open_instances(cfg, jaxmix.load("mini"), cfg.instance_prompt).rows
    shown = {name for row in rows for name in ("robot", "duck", "ghost", "teddy bear") if name in row["template"]}
    assert len(rows) == 12 and len(shown) > 1


@pytest.mark.parametrize("name", ["dreambooth_mini", "dreambooth_sd15", "dreambooth_sdxl"])
def test_configs_are_read(name, tmp_path):
    cfg = parse(dreambooth.main, ["--config", str(CONFIGS / f"{name}.yaml"), "--output_dir", str(tmp_path)])
    assert cfg.with_prior_preservation and cfg.rank is None
