"""The judge of composition: where real objects stand, to parts of a pixel, and loud about what it cannot judge."""

from pathlib import Path

import numpy as np
import pytest

from jaxmix import command
from jaxmix.types import InputError
from train import segmenter as segmenter_module
from train.scenes import Scenes, off_centre
from train.segmenter import distance_from_middle, middle, scores

CONFIG = Path(__file__).parents[2] / "configs" / "segmenter.yaml"
ONE = {"two_objects": 0.0, "three_objects": 0.0}


@pytest.fixture(scope="module")
def segmenter():
    return segmenter_module.load_segmenter()


def rows_of(labelled, n=200):
    scenes = Scenes(seed=78, split="all", labelled=labelled, **ONE)
    return [scenes[i] for i in range(n)]


@pytest.mark.parametrize("labelled", [0.0, 1.0])
def test_the_committed_segmenter_finds_the_objects_of_real_scenes(segmenter, labelled):
    rows = rows_of(labelled)
    images = np.stack([row["image"] for row in rows])
    found = scores(segmenter, images, rows)
    assert found["iou"] > 0.9 and found["centre_error"] < 0.6 and found["lost"] == 0
    assert found["correlation"] > 0.8
    assert scores(segmenter, images, rows[1:] + rows[:1])["iou"] < 0.75


def test_the_middle_of_a_mask_is_that_of_its_bounding_box():
    masks = np.stack([row["masks"].any(0) for row in rows_of(0.5, 40)])
    whole = [m for m in masks if all(np.diff(np.flatnonzero(m.any(a))).max() == 1 for a in (0, 1))]
    assert len(whole) > 30
    np.testing.assert_allclose(distance_from_middle(np.stack(whole)), [off_centre(m) for m in whole], atol=1e-12)


def test_a_soft_edge_moves_the_middle_by_parts_of_a_pixel():
    mask = np.zeros((1, 8, 8))
    mask[:, 2:6, 2:6] = 1.0
    np.testing.assert_allclose(middle(mask), [[4.0, 4.0]])
    mask[:, 6, 3] = 0.5
    np.testing.assert_allclose(middle(mask), [[4 + 0.5 * 2.5 / 4.5, 4.0]])


def test_faint_background_has_no_say_and_nothing_found_is_nan():
    mask = np.full((2, 8, 8), 0.1)
    mask[0, 0:2, 4:8] = 0.9
    found = middle(mask)
    np.testing.assert_allclose(found[0], [1.0, 6.0])
    assert np.isnan(found[1]).all() and np.isnan(distance_from_middle(mask)[1])


def test_probabilities_do_not_depend_on_the_batch(segmenter):
    images = np.stack([row["image"] for row in rows_of(0.5, 5)])
    np.testing.assert_allclose(segmenter(images), segmenter(images, batch_size=2), atol=1e-5)


def test_images_of_another_size_or_type_are_refused(segmenter):
    with pytest.raises(InputError, match=r"found uint8 \(1, 32, 32, 3\), expected uint8"):
        segmenter(np.zeros((1, 32, 32, 3), np.uint8))


def test_two_steps_train_a_segmenter_that_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(segmenter_module, "evaluate", lambda cfg: {})  # of thousands of scenes, through an autoencoder
    weights = tmp_path / "s.safetensors"
    flags = ["--config", str(CONFIG), "--output_dir", str(tmp_path), "--weights", str(weights), "--objects", "6"]
    short = ["--max_train_steps", "2", "--lr_warmup_steps", "0", "--lr_cooldown_steps", "1", "--train_batch_size", "4"]
    short += ["--devices", "1"]
    with pytest.raises(SystemExit) as stop:
        command.run(segmenter_module.main, [*flags, *short])
    assert stop.value.code == 0
    assert segmenter_module.load_segmenter(weights)(np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, 64, 64)
