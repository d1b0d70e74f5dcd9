"""Scenes: pure in (seed, index), true to their masks, labels and splits."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from jaxmix.types import InputError
from train.scenes import BACKGROUNDS, DIMENSIONS, SPLITS, STYLES, Plan, Scenes, eval_prompts, measure, off_centre
from train.scenes.atlas import FOLDER
from train.scenes.captions import RELATIONS
from train.scenes.splits import pair_held_out, relation_held_out

ALL_STYLES = (*STYLES, "pixel", "sketch", "oil")


@pytest.fixture(scope="module")
def everything():
    return Scenes(styles=ALL_STYLES, split="all")


def same(a, b):
    return a["text"] == b["text"] and (a["image"] == b["image"]).all() and (a["masks"] == b["masks"]).all()


def test_a_scene_depends_on_seed_and_index_alone():
    scenes, other = Scenes(seed=3), Scenes(seed=3)
    ahead = [scenes[i] for i in (5, 0, 17, 5)]
    assert all(same(scene, other[i]) for scene, i in zip(ahead, (5, 0, 17, 5), strict=True))
    copied = pickle.loads(pickle.dumps(scenes))
    assert same(copied[17], ahead[2])
    fresh = Scenes(seed=4)
    assert not any(same(fresh[i], scenes[i]) for i in range(5))
    assert not same(scenes[0], scenes[1])


def test_shapes_and_dtypes_are_those_promised():
    scenes = Scenes(size=48)
    for scene in (scenes[i] for i in range(30)):
        assert scene["image"].shape == (48, 48, 3) and scene["image"].dtype == np.uint8
        assert scene["masks"].shape == (3, 48, 48) and scene["masks"].dtype == bool
        count = len(scene["object_names"])
        assert (scene["objects"] >= 0).tolist() == [k < count for k in range(3)]
        assert scene["masks"].any((1, 2)).tolist() == [k < count for k in range(3)]
        assert set(scene["labels"]) == set(DIMENSIONS) and set(scene["labels"].values()) <= {-1, 0, 1}
        assert scene["text"].startswith(scene["caption"])


def render(scenes, plan, seed=0):
    return scenes.render(plan, np.random.Generator(np.random.Philox(key=[seed, 0])))


@pytest.mark.parametrize("style", ALL_STYLES)
def test_masks_cover_the_objects(everything, style):
    """A pixel that looks the same on white and on purple belongs to the object: in the mask, and only there."""
    for obj in range(24):
        on_white, masks = render(everything, Plan(style, (obj,), "white"), seed=obj)
        on_purple, _ = render(everything, Plan(style, (obj,), "purple"), seed=obj)
        opaque = np.abs(on_white.astype(int) - on_purple).max(-1) < 40
        near = np.pad(masks[0], 1)
        grown = np.any([np.roll(near, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)], 0)[1:-1, 1:-1]
        name = everything.object_names[obj]
        assert opaque.any() and not (opaque & ~grown).any(), name
        assert (opaque & masks[0]).sum() > 0.6 * masks[0].sum(), name
        assert 0.04 < masks[0].mean() < 0.5 and not masks[1:].any(), name


def test_masks_of_one_scene_are_disjoint_and_stand_in_the_stated_relation():
    scenes = Scenes(size=64, arrangement="centred", two_objects=1.0, three_objects=0.0)
    for i in range(200):
        scene = scenes[i]
        masks = scene["masks"]
        assert not (masks[0] & masks[1]).any()
        (y0, x0), (y1, x1) = (np.argwhere(m).mean(0) for m in masks[:2])
        assert (x1 - x0 if scene["relation"] == "left of" else y1 - y0) > 16, scene["caption"]
        assert scene["relation"] in scene["caption"]


def test_objects_of_a_row_stand_left_to_right():
    scenes = Scenes(arrangement="centred", two_objects=0.0, three_objects=1.0)
    for i in range(50):
        across = [np.argwhere(m)[:, 1].mean() for m in scenes[i]["masks"]]
        assert across == sorted(across) and scenes[i]["caption"].count(" in a row ") == 1


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("style", ALL_STYLES)
def test_each_label_moves_its_own_measure_both_ways(everything, style, dimension):
    def mean(sign):
        values = []
        for k in range(28):
            plan = Plan(style, (k % 24,), BACKGROUNDS[k % len(BACKGROUNDS)])
            plan = dataclasses.replace(plan, labels={**plan.labels, dimension: sign})
            image, masks = render(everything, plan, seed=k)
            values.append(-off_centre(masks[0]) if dimension == "composition" else measure(image)[dimension])
        return np.mean(values)

    low, neutral, high = mean(-1), mean(0), mean(1)
    margin = {"color": 0.03, "light": 0.05, "focus": 0.004, "composition": 0.015}[dimension]
    assert low + margin < neutral and neutral + margin < high, (low, neutral, high)


def test_labels_come_in_the_stated_shares():
    scenes = Scenes()
    plans = [scenes.plan(np.random.Generator(np.random.Philox(key=[0, i]))) for i in range(4000)]
    singles = [p for p in plans if len(p.objects) == 1]
    for dimension in DIMENSIONS:
        signs = np.array([p.labels[dimension] for p in singles])
        assert abs((signs > 0).mean() - 0.14) < 0.03 and abs((signs < 0).mean() - 0.14) < 0.03
    counts = np.bincount([len(p.objects) for p in plans], minlength=4) / len(plans)
    assert np.abs(counts - [0, 0.70, 0.25, 0.05]).max() < 0.03
    neutral = Scenes(labelled=0.0)
    assert all(neutral[i]["text"] == neutral[i]["caption"] for i in range(50))
    told = Scenes(labelled=1.0, label_words=1.0)
    assert all(told[i]["text"] != told[i]["caption"] for i in range(50) if any(told[i]["labels"].values()))


def combinations(scenes, n):
    plans = [scenes.plan(np.random.Generator(np.random.Philox(key=[scenes.seed, i]))) for i in range(n)]
    pairs = {(p.style, o) for p in plans for o in p.objects}
    related = {(*p.objects, p.relation) for p in plans if len(p.objects) == 2}
    return pairs, related


def test_held_out_combinations_never_occur_in_training():
    pairs, related = combinations(Scenes(), 8000)
    held_pairs, _ = combinations(Scenes(split="held_out_pairs"), 500)
    _, held_related = combinations(Scenes(split="held_out_relations"), 2000)
    assert held_pairs and held_related
    assert not pairs & held_pairs and not related & held_related
    every = {(s, o) for s in STYLES for o in range(24)}
    assert pairs | held_pairs == every
    assert 0.08 < len(held_pairs) / len(every) < 0.13
    # Each part of what is held out was seen by itself.
    assert {o for _, o in pairs} == set(range(24)) and {s for s, _ in pairs} == set(STYLES)
    ordered = [(a, b, r) for a in range(24) for b in range(24) if a != b for r in range(len(RELATIONS))]
    assert 0.05 < np.mean([relation_held_out(*c) for c in ordered]) < 0.15


def test_held_out_objects_and_style_are_not_for_training():
    assert Scenes(split="held_out_objects").object_names == ("robot", "duck", "ghost", "teddy bear")
    largest = Scenes(objects=96)
    assert not set(largest.object_names) & set(Scenes(split="held_out_objects").object_names)
    assert {s for s, _ in Scenes(split="held_out_style").pairs} == {"pixel"}
    with pytest.raises(InputError, match="pixel"):
        Scenes(styles=("flat", "pixel"))


def test_every_object_loses_one_style_at_most():
    assert max(sum(pair_held_out(o, s) for s in range(4)) for o in range(100)) == 1


@pytest.mark.parametrize("split", SPLITS)
def test_eval_prompts_belong_to_their_split_and_repeat(split):
    rows = eval_prompts(split, 40, seed=2)
    assert rows[:25] == eval_prompts(split, 25, seed=2)
    allowed = set(Scenes(split=split).pairs)
    for row in rows:
        assert (row["style_name"], row["objects"][0]) in allowed
        assert row["object_names"][0] in row["caption"] and len(row["objects"]) == 1
    assert {r["background_name"] for r in rows} == set(BACKGROUNDS)
    two = eval_prompts(split, 10, seed=2, count=2)
    assert two[:5] == eval_prompts(split, 5, seed=2, count=2)
    assert all(len(r["objects"]) == 2 and r["relation"] in r["caption"] for r in two)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "split: found 'test'"),
        ({"objects": 97}, "objects: found 97, expected 4 to 96"),
        ({"styles": ("3d", "clay")}, "clay"),
        ({"size": 8}, "size: found 8"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        Scenes(**settings)


def test_the_committed_atlas_matches_its_index():
    index = json.loads((FOLDER / "atlas.json").read_text())
    with Image.open(FOLDER / index["image"]) as picture:
        assert picture.mode == "RGBA"
        rows = index["rows_per_style"] * len(index["styles"])
        assert picture.size == (index["tile"] * index["columns"], index["tile"] * rows)
    assert len(set(index["objects"])) == len(index["emoji"]) == 100
    atlas = Scenes().atlas
    for style in atlas.drawn:
        for obj in range(100):
            alpha = np.asarray(atlas.tile(style, obj))[..., 3]
            rows, columns = np.flatnonzero((alpha > 24).any(1)), np.flatnonzero((alpha > 24).any(0))
            # Trimmed and centred: the longer side fills the tile, and the margins are equal.
            assert max(len(alpha[rows[0] : rows[-1] + 1]), columns[-1] + 1 - columns[0]) >= index["tile"] - 4
            assert abs(rows[0] - (index["tile"] - 1 - rows[-1])) <= 3
            assert abs(columns[0] - (index["tile"] - 1 - columns[-1])) <= 3
    licences = (FOLDER / "LICENSES.md").read_text()
    assert all(style["package"] in licences and style["licence"] in licences for style in index["styles"])
