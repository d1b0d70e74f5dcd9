"""The trainer of ControlNets on a tiny base: what it learns, what a step sees, caches, resuming, and refusals."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmix
from jaxmix import InputError
from jaxmix.command import parse
from jaxmix.testing import moved
from tests.data.made import make_folder
from tests.jobs import TWO_STEPS, killed_after
from train import cache_latents, controlnet
from train.diffusion import make_tokenize

CONFIG = Path(__file__).parents[2] / "configs" / "controlnet_mini.yaml"
NET = Path(controlnet.FOLDER) / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(one_level, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    one_level.save(folder)
    return str(folder)


def shrunk(base, folder, **changes):
    """Return the committed config at the size of the tiny base."""
    cfg = parse(controlnet.main, ["--config", str(CONFIG), "--output_dir", str(folder)])
    small = {
        "pretrained_model_name_or_path": base,
        "scenes": {**cfg.scenes, "size": 16, "objects": 4},
        "preprocess": controlnet.MASKS,
        "conditioning_embedding_out_channels": None,
        **TWO_STEPS,
        "validation_steps": 0,
        "validation_prompts": cfg.validation_prompts[:1],
        "validation_scales": [1.0],
        "validation_batch_size": 6,
    }
    return dataclasses.replace(cfg, **{**small, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base):
    """Return a folder with two runs of two steps: `whole`, and `parts`, killed after the first and resumed."""
    root = tmp_path_factory.mktemp("runs")
    assert controlnet.main(shrunk(base, root / "whole", validation_steps=2)) == 0
    killed_after(1, root / "whole", root / "parts", exported=controlnet.FOLDER)
    assert controlnet.main(shrunk(base, root / "parts", resume_from_checkpoint="1")) == 0
    return root


def test_stopping_and_resuming_gives_the_same_net_bit_for_bit(runs, one_level):
    assert (runs / "whole" / NET).read_bytes() == (runs / "parts" / NET).read_bytes()
    net = jaxmix.ControlNet.load(runs / "whole" / controlnet.FOLDER, one_level)
    fresh = jaxmix.ControlNet.init(jax.random.key(0), one_level)
    zeros = [name for name in net.params if name.startswith(("controlnet_down", "controlnet_mid"))]
    assert all(np.asarray(net.params[name]["kernel"]).any() for name in zeros) and len(zeros) == net.config.outputs
    assert not any(np.asarray(fresh.params[name]["kernel"]).any() for name in zeros)
    assert len(list((runs / "whole" / "pictures").iterdir())) == 1


def test_the_step_sees_what_sampling_does(one_level, base, tmp_path):
    cfg = shrunk(base, tmp_path)
    pipe, net = one_level, controlnet.make_net(one_level, cfg)
    net = dataclasses.replace(net, params=moved(net.params, jax.random.key(1), 0.1))
    hint = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    text = pipe.encode_prompt(["a dog"])
    x = jax.random.normal(jax.random.key(2), (1, *pipe.latent_shape))
    predict = jax.jit(controlnet.make_predict(pipe, net, cfg))
    frozen = {"unet": pipe.params["unet"]}
    found = predict(net.params, frozen, {"hint": hint}, x, jnp.asarray([500]), text.context, None)
    made = net.on(hint[0]).apply(pipe, jaxmix.Request(prompts=["a dog"], height=16, width=16)).controls
    seen = made[0].prepare(text, x.shape[1:3]).see(x, jnp.asarray(500), text)
    expected = pipe.unet.apply({"params": pipe.params["unet"]}, x, jnp.asarray([500]), text.context, (seen,))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    plain = pipe.unet.apply({"params": pipe.params["unet"]}, x, jnp.asarray([500]), text.context)
    assert np.abs(found - plain).max() > 1e-3


def test_maps_of_scenes_show_each_object_in_its_colour():
    masks = np.zeros((3, 4, 5), bool)
    masks[0, :2], masks[2, 3] = True, True
    made = controlnet.coloured(masks)
    assert made.shape == (4, 5, 3) and made.dtype == np.uint8
    for rows, colour in ((slice(0, 2), 1), (slice(2, 3), 0), (slice(3, 4), 3)):
        assert (made[rows] == controlnet.COLOURS[colour]).all()


def test_rows_come_from_scenes_pictures_and_caches_of_the_same_hints(one_level, base, tmp_path):
    pytest.importorskip("cv2")
    tokenize = make_tokenize(one_level)

    def first(cfg):
        row = controlnet.make_rows(tokenize, cfg)
        return row(controlnet.open_rows(cfg, one_level)[0], np.random.default_rng(0))

    scene = first(shrunk(base, tmp_path, preprocess="canny"))
    assert scene["hint"].shape == (16, 16, 3) and set(np.unique(scene["hint"])) <= {0, 255}
    folder = make_folder(tmp_path / "pictures", [(16, 24)] * 3)
    pictures = {"scenes": {}, "resolution": 16, "center_crop": True, "preprocess": "gray"}
    live = first(shrunk(base, tmp_path, train_data_dir=str(folder), **pictures))
    cache = tmp_path / "cache"
    told = {"resolution": 16, "center_crop": True, "preprocess": "gray", "batch_size": 2}
    cfg = cache_latents.Config(pretrained_model_name_or_path=base, train_data_dir=str(folder), out=str(cache), **told)
    assert cache_latents.main(cfg) == 0
    cached = first(shrunk(base, tmp_path, train_data_dir=str(cache), **pictures))
    np.testing.assert_array_equal(cached["hint"], live["hint"])
    assert "latents_mean" in cached and "image" not in cached
    with pytest.raises(InputError, match=r"found a cache with gray hints, expected canny:100,200: one made with"):
        first(shrunk(base, tmp_path, train_data_dir=str(cache), **{**pictures, "preprocess": "canny"}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preprocess": ""}, "conditioning_image_column, preprocess: found neither"),
        ({"preprocess": "edges"}, "preprocess: found 'edges', expected one of canny"),
        ({"conditioning_image_column": "hint"}, "conditioning_image_column: found it with scenes"),
        ({"scenes": {}, "train_data_dir": "no/such"}, "preprocess: found masks without scenes"),
        ({"validation_images": ["a.png"]}, "validation_images: found 1, expected one for each of 0"),
        ({"caption_dropout_rate": 2.0}, "caption_dropout_rate: found 2.0, expected 0 to 1"),
        ({"pretrained_controlnet": "gone"}, "gone: found no such file or folder"),
        (
            {"conditioning_embedding_out_channels": [16]},
            "_out_channels: found 1, which make hints 1 times smaller, expected ",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path, base, changes, words):
    with pytest.raises(InputError) as e:
        controlnet.main(shrunk(base, tmp_path, **changes))
    assert words in str(e.value) and "\n" not in str(e.value)
