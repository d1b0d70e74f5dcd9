"""Binding: captions and the places of their objects teach the text encoder, and nothing else of the model changes."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxmix
from jaxmix.command import parse
from jaxmix.types import InputError
from scripts.mini import bind
from train.scenes import Scenes

CONFIG = Path(__file__).parents[2] / "configs" / "mini2_bind.yaml"


def config(folder, **changes):
    cfg = parse(bind.main, ["--config", str(CONFIG), "--output_dir", str(folder)])
    short = {"train_batch_size": 2, "devices": 1, "max_train_steps": 2, "lr_warmup_steps": 0, "lr_cooldown_steps": 0}
    return dataclasses.replace(cfg, pretrained_model_name_or_path="mini", **{**short, **changes})


def test_a_place_is_covered_by_the_share_of_it_that_an_object_s_box_fills():
    scenes = Scenes(size=128, arrangement="anywhere", two_objects=0.5, three_objects=0.5, labelled=0.0)
    plans = bind.Plans(scenes)
    for i in range(20):
        row, scene = plans[i], scenes[i]
        assert row["text"] == scene["caption"] and np.array_equal(row["objects"], scene["objects"])
        for covered, mask in zip(row["covered"], scene["masks"], strict=True):
            box = np.zeros(mask.shape)
            if mask.any():
                rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
                box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 1
            side = 128 // bind.CELLS
            # Boxes are the sprites'; those read from thresholded masks may lack a line of faint pixels.
            np.testing.assert_allclose(
                covered, box.reshape(bind.CELLS, side, bind.CELLS, side).mean((1, 3)), atol=2.5 / side
            )


def test_bound_counts_the_right_one_of_the_objects_that_a_scene_has():
    shares = np.zeros((2, 8, 8, 5), np.float32)
    shares[..., 0] = 1
    shares[0, 2:4, :4], shares[0, 2:4, 4:] = np.eye(5)[1], np.eye(5)[3]  # object 0 left of object 2
    shares[1, :, 2:6] = np.eye(5)[2]  # one alone, which cannot be mistaken
    other = shares[..., [0, 3, 2, 1, 4]]
    elsewhere = np.array([9.0, 0, 0, 0, 9.0])  # neither no object nor one of another scene is a choice
    for logits, bound in ((shares, 1.0), (other, 0.0), (shares + elsewhere, 1.0)):
        assert float(bind.rightly_bound(logits, shares)) == bound
    half = np.where(np.arange(8)[:, None, None] == 2, shares, other)
    assert float(bind.rightly_bound(half, shares)) == 0.5
    assert float(bind.rightly_bound(shares[1:], shares[1:])) == 0.0


def test_two_steps_change_the_text_encoder_alone_and_are_saved_as_a_pipeline(tmp_path):
    assert bind.main(config(tmp_path)) == 0
    made, first = jaxmix.load(tmp_path / "pipeline"), jaxmix.load("mini")
    for part in ("unet", "vae"):
        jax.tree.map(np.testing.assert_array_equal, made.params[part], first.params[part])
    pairs = zip(*(jax.tree.leaves(p.params["text_encoder"]) for p in (made, first)), strict=True)
    assert 0 < max(float(abs(a - b).max()) for a, b in pairs) < 0.01


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scenes": {"arrangement": "centred"}}, "scenes.arrangement: found 'centred', expected 'anywhere'"),
        ({"tokens": 0}, "tokens: found 0, expected 1 to 32"),
        ({"tokens": 90}, "tokens: found 90, expected 1 to 32"),
    ],
)
def test_what_cannot_teach_places_is_refused(tmp_path, change, said):
    with pytest.raises(InputError, match=said):
        bind.main(config(tmp_path, **change))
