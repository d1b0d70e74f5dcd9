"""The judge of composition: where real objects stand, to parts of a pixel, and loud about what it cannot judge."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import command
from jaxmix.types import InputError
from train import segmenter as segmenter_module
from train.scenes import SIZE, Scenes, off_centre, told
from train.segmenter import SegmentNet, distance_from_middle, middle, scores, stands

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
    assert found["iou"] > 0.9 and found["centre_error"] < 0.01 * SIZE and found["lost"] == 0
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
    monkeypatch.setattr(segmenter_module, "evaluate", lambda cfg: {})  # of thousands of scenes, through an autoencoder
    weights = tmp_path / "s.safetensors"
    flags = ["--config", str(CONFIG), "--output_dir", str(tmp_path), "--weights", str(weights), "--objects", "6"]
    short = ["--max_train_steps", "2", "--lr_warmup_steps", "0", "--lr_cooldown_steps", "1", "--train_batch_size", "4"]
    short += ["--devices", "1"]
    with pytest.raises(SystemExit) as stop:
        command.run(segmenter_module.main, [*flags, *short])
    assert stop.value.code == 0
    assert segmenter_module.load_segmenter(weights)(np.zeros((1, SIZE, SIZE, 3), np.uint8)).shape == (1, SIZE, SIZE)


class Oracle:
    """A segmenter that has been told the answer: the masks of scenes, and the share of each cell that objects cover."""

    def __init__(self, scenes, rows):
        self.size, self.names = scenes.size, scenes.object_names
        self.masks = np.stack([row["masks"] for row in rows])
        self.objects = np.stack([row["objects"] for row in rows])

    def __call__(self, images):
        return self.masks.any(1).astype(np.float32)

    def by_name(self, images):
        side = self.size // 16
        covered = self.masks.reshape(len(images), 3, 16, side, 16, side).mean((3, 5))
        named = np.eye(len(self.names) + 1)[self.objects][..., :-1]  # -1, no object, is the last row
        return np.einsum("bkyx,bko->byxo", covered, named)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_objects_stand_where_real_captions_say_and_not_where_others_say(count):
    scenes = Scenes(
        size=64,
        arrangement="anywhere",
        place_words=1.0,
        counts=0.0,
        labelled=0.0,
        two_objects=float(count == 2),
        three_objects=float(count == 3),
    )
    rows = [scenes[i] for i in range(150)]
    rows = [{**row, "facts": told(row["relation"], row["places"], count)} for row in rows]
    oracle, images = Oracle(scenes, rows), np.stack([row["image"] for row in rows])
    found = stands(oracle, images, rows)
    assert np.nanmean(found["place"]) > 0.97
    assert np.isnan(found["relation"]).all() if count == 1 else np.nanmean(found["relation"]) == 1.0
    mirror = {"at the left": "at the right", "at the right": "at the left", "at the top": "at the bottom"}
    mirror |= {"at the bottom": "at the top", "in the middle": "at the left"}
    wrong = [
        {**r, "places": [mirror[p] for p in r["places"]], "facts": [(b, a, f) for a, b, f in r["facts"]]} for r in rows
    ]
    found = stands(oracle, images, wrong)
    assert np.nanmean(found["place"]) == 0 and not (np.nan_to_num(found["relation"]) > 0).any()


def test_an_object_that_is_not_there_stands_nowhere():
    scenes = Scenes(size=64, arrangement="anywhere", two_objects=1.0, three_objects=0.0, counts=0.0, labelled=0.0)
    row = scenes[0]
    absent = next(name for name in scenes.object_names if name not in row["object_names"])
    asked = {"object_names": (row["object_names"][0], absent), "places": (), "facts": [(0, 1, "left of")]}
    for facts in ([(0, 1, "left of")], [(1, 0, "left of")]):
        found = stands(Oracle(scenes, [row]), row["image"][None], [{**asked, "facts": facts}])
        assert found["relation"].tolist() == [0.0] and np.isnan(found["place"]).all()


@pytest.mark.parametrize(("size", "names"), [(64, 0), (128, 24), (192, 3)])
def test_the_network_follows_the_size_and_names_cells(size, names):
    net = SegmentNet(names, (24, 48, 96))
    pixels, cells = jax.eval_shape(
        lambda key, x: net.init_with_output(key, x)[0], jax.random.key(0), jnp.zeros((2, size, size, 3))
    )
    assert pixels.shape == (2, size, size)
    assert cells is None if not names else cells.shape == (2, 16, 16, names + 1)


def test_a_segmenter_without_names_says_so(segmenter):
    with pytest.raises(InputError, match="by_name: found a segmenter without names"):
        dataclasses.replace(segmenter, names=()).by_name(np.zeros((1, SIZE, SIZE, 3), np.uint8))
    with pytest.raises(InputError, match="size: found 100, expected a multiple of 64"):
        segmenter_module.main(segmenter_module.Config(size=100))


def test_batches_say_how_much_of_each_cell_each_object_covers():
    cfg = segmenter_module.Config(by_name=True, objects=4, size=64, scenes={"arrangement": "anywhere"})
    cfg = dataclasses.replace(cfg, train_batch_size=4, channels=[8, 8, 8], dataloader_num_workers=0)
    batch = next(iter(segmenter_module.make_batches(cfg)(0)))
    assert batch["covered"].shape == (4, 3, 16, 16) and batch["objects"].shape == (4, 3)
    total = batch["covered"].sum((2, 3)) * 16  # pixels of each object: 4 x 4 a cell
    assert np.allclose(total.sum(1), batch["mask"].sum((1, 2))) and ((total > 0) == (batch["objects"] >= 0)).all()
