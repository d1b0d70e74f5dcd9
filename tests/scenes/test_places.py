"""Scenes with objects anywhere: true to their words, apart from each other, and silent about what is held out."""

import hashlib
from itertools import combinations

import numpy as np
import pytest

from jaxmix.types import InputError
from train.scenes import PLACES, STYLES, Plan, Scenes, eval_prompts, off_centre, place_of, relation_of
from train.scenes.captions import MIRRORED, RELATIONS, all_words, caption, plural
from train.scenes.layout import SIDES, facts, told
from train.scenes.splits import relation_held_out

MANY = {"two_objects": 0.45, "three_objects": 0.25}
SIZE = 64


def anywhere(**settings):
    return Scenes(**{"size": SIZE, "arrangement": "anywhere", "labelled": 0.0, **MANY, **settings})


def middles(scene):
    """Return the centres (down, right) of the bounding boxes of a scene's masks, in widths from its middle."""
    found = []
    for mask in scene["masks"][: scene["count"]]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        middle = np.array([rows[0] + rows[-1] + 1, columns[0] + columns[-1] + 1]) / 2
        found.append(middle / mask.shape[0] - 0.5)
    return found


def shown(scene):
    """Return how every two objects of a scene stand to each other, by names and from the masks alone."""
    where = middles(scene)
    for a, b in combinations(range(scene["count"]), 2):
        relation, first = relation_of(*(where[b] - where[a]))
        yield (a, b, relation) if first else (b, a, relation)


@pytest.fixture(scope="module")
def train():
    scenes = anywhere(place_words=0.7)
    return [scenes[i] for i in range(1500)]


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        ({}, "3411d037d61c649f4c2cae0120f4e6f53a2b4f258ae9b0ea4e42b5119704ca2c"),
        (
            {"split": "held_out_relations", "size": 32},
            "46f65cb664623a6541c1ab6d6e3e3adb7bdced6074768daffc2046b764d1b1f7",
        ),
        (
            {"split": "held_out_pairs", "labelled": 1.0, "size": 32},
            "c20a0a7e7123f75ae44a0b782fc0a24bdd8c6181c1df566fec1630349a532825",
        ),
        (
            {"seed": 7, "size": 128, "objects": 96, "split": "all", "two_objects": 0.4, "three_objects": 0.3},
            "454cc9a47f15677fea385558c38c34b275c4086b242b1549f957c7909c7ff96d",
        ),
    ],
)
def test_centred_scenes_are_those_of_the_first_version_bit_for_bit(settings, digest):
    scenes, found = Scenes(**{"size": 64, "arrangement": "centred"} | settings), hashlib.sha256()
    for row in (scenes[i] for i in range(12)):
        for part in (row["image"].tobytes(), row["masks"].tobytes(), row["text"].encode()):
            found.update(part)
        found.update(repr(sorted(row["labels"].items())).encode())
        found.update(row["objects"].tobytes())
        words = (row["caption"], row["relation"], row["size_word"], row["style_name"], row["background_name"])
        found.update(repr(words).encode())
    assert found.hexdigest() == digest


def test_a_scene_anywhere_depends_on_seed_and_index_alone():
    first, second = anywhere(seed=3), anywhere(seed=3)
    ahead = [first[i] for i in (9, 2, 30)]
    for scene, i in zip(ahead, (9, 2, 30), strict=True):
        again = second[i]
        assert scene["text"] == again["text"] and scene["places"] == again["places"]
        assert (scene["image"] == again["image"]).all() and (scene["masks"] == again["masks"]).all()


def test_no_object_hides_another(train):
    """The largest overlap of two bounding boxes is none at all, so layouts can be boxes."""
    for scene in train:
        boxes = np.zeros((SIZE, SIZE), int)
        for mask in scene["masks"][: scene["count"]]:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            boxes[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] += 1
            assert rows[0] >= 0 and mask.any()
        assert boxes.max() == 1, scene["caption"]


def test_sizes_are_large_enough_to_be_seen_and_different(train):
    smallest, ratios = {1: 0.40, 2: 0.30, 3: 0.24}, []
    for scene in train:
        sides = []
        for mask in scene["masks"][: scene["count"]]:
            sides.append(max(mask.any(0).sum(), mask.any(1).sum()) / SIZE)
        # Scaled drawings lose up to two pixels at their edge, which at this size is three per cent.
        assert smallest[scene["count"]] - 2 / SIZE <= min(sides) and max(sides) <= 0.81, scene["caption"]
        ratios += [max(sides) / min(sides)] if scene["count"] == 2 else []
    assert np.quantile(ratios, 0.2) < 1.2 and np.quantile(ratios, 0.8) > 1.35


def test_objects_stand_all_over_the_picture(train):
    where = np.array([middles(s)[0] for s in train if s["count"] == 1])
    assert (where.min(0) < -0.2).all() and (where.max(0) > 0.2).all()
    named = [place_of(*w) for w in where]
    assert min(named.count(place) for place in PLACES) > 0.1 * len(named)
    gaps = [np.hypot(*np.subtract(*middles(s))) for s in train if s["count"] == 2]
    assert min(gaps) < 0.4 and max(gaps) > 0.65


def test_captions_say_where_objects_are(train):
    said = [s for s in train if s["places"]]
    assert len(said) > 200 and {p for s in said for p in s["places"]} == set(PLACES)
    for scene in said:
        for name, place, where in zip(scene["object_names"], scene["places"], middles(scene), strict=True):
            assert place_of(*where) == place, scene["caption"]
            assert f"{name} {place}" in scene["caption"]
    assert any(not s["places"] and s["count"] == 1 for s in train)


def test_captions_say_how_objects_stand_to_each_other(train):
    related = [s for s in train if s["relation"]]
    assert {s["relation"] for s in related} == {*RELATIONS, *MIRRORED.values(), "in a row"}
    for scene in train:
        found = set(shown(scene))
        if scene["count"] > 1 and len(set(scene["object_names"])) > 1:
            assert set(told(scene["relation"], scene["places"], scene["count"])) <= found, scene["caption"]
        if scene["relation"] not in ("", "in a row"):
            first = scene["object_names"][0]
            assert f"{first} {scene['relation']} a" in scene["caption"]
    wordless = [s for s in train if s["count"] == 2 and not s["relation"] and not s["places"]]
    assert len(wordless) > 100 and all(" and " in s["caption"] or " two " in s["caption"] for s in wordless)


def test_the_same_object_twice_is_counted(train):
    counted = [s for s in train if s["count"] > 1 and len(set(s["object_names"])) == 1]
    assert {s["count"] for s in counted} == {2, 3}
    assert 0.08 < len(counted) / sum(s["count"] > 1 for s in train) < 0.22
    for scene in counted:
        name, number = scene["object_names"][0], {2: "two", 3: "three"}[scene["count"]]
        assert f" of {number} {plural(name)} " in scene["caption"]
        assert scene["masks"].any((1, 2)).sum() == scene["count"]
    scenes = anywhere(counts=0.0)
    different = [scenes[i] for i in range(80)]
    assert all(len(set(s["object_names"])) == s["count"] for s in different)


def test_plurals_are_english():
    names = ["cat", "butterfly", "key", "fish", "cactus", "fox", "bus", "octopus", "strawberry", "snowman", "top hat"]
    assert [plural(name) for name in names] == (
        ["cats", "butterflies", "keys", "fish", "cacti", "foxes", "buses", "octopuses", "strawberries", "snowmen"]
        + ["top hats"]
    )


def held_out(scene, a, b, relation):
    first, second = int(scene["objects"][a]), int(scene["objects"][b])
    return first != second and relation_held_out(first, second, RELATIONS.index(relation))


def test_training_never_shows_a_held_out_relation_in_any_words_or_in_none(train):
    for scene in train:
        assert not any(held_out(scene, *fact) for fact in shown(scene)), scene["caption"]
        assert not any(held_out(scene, *fact) for fact in told(scene["relation"], scene["places"], scene["count"]))
    # Of three objects too, and whatever the style: plans are cheap.
    scenes = anywhere(two_objects=0.5, three_objects=0.5)
    seen = set()
    for i in range(4000):
        plan = scenes.plan(np.random.Generator(np.random.Philox(key=[1, i])))
        seen |= {
            (plan.objects[a], plan.objects[b], r) for a, b, r in facts(plan.boxes) if plan.objects[a] != plan.objects[b]
        }
    every = {(a, b, r) for a in range(24) for b in range(24) if a != b for r in RELATIONS}
    forbidden = {f for f in every if relation_held_out(f[0], f[1], RELATIONS.index(f[2]))}
    assert not seen & forbidden and len(seen) > 0.9 * len(every - forbidden)


def test_the_held_out_relations_are_shown_by_their_own_split_in_all_words():
    scenes = anywhere(split="held_out_relations")
    rows = [scenes[i] for i in range(60)]
    for scene in rows:
        assert scene["count"] == 2 and any(held_out(scene, *fact) for fact in shown(scene))
        assert set(told(scene["relation"], (), 2)) == set(shown(scene))
    assert {s["relation"] for s in rows} == {*RELATIONS, *MIRRORED.values()}


@pytest.mark.parametrize("split", ["train", "held_out_pairs"])
def test_held_out_styles_of_objects_stay_apart(split):
    scenes = anywhere(split=split)
    rows = [scenes[i] for i in range(300)]
    pairs = {(row["style_name"], int(o)) for row in rows for o in row["objects"][: row["count"]]}
    other = {"train": "held_out_pairs", "held_out_pairs": "train"}[split]
    assert not pairs & set(Scenes(split=other).pairs)


def test_composition_is_a_matter_of_the_middle():
    scenes = anywhere(two_objects=0.0, three_objects=0.0, labelled=1.0)
    rows = [scenes[i] for i in range(400)]
    far = {sign: [off_centre(s["masks"][0]) for s in rows if s["labels"]["composition"] == sign] for sign in (1, 0, -1)}
    assert max(far[1]) < 1.5 / SIZE and min(far[-1]) > 0.15 and max(far[1]) < np.mean(far[0]) < np.mean(far[-1]) - 0.03
    assert all(s["labels"]["composition"] >= 0 or not s["size_word"] for s in rows)
    assert all(not s["places"] for s in rows if s["labels"]["composition"])


@pytest.mark.parametrize("labels", [-1, 0, 1])
def test_a_plan_without_boxes_is_painted_where_its_words_say(labels):
    scenes = anywhere(split="all")
    plan = Plan("flat", (1, 9), "white", places=("at the right", "at the left"))
    plan = Plan(plan.style, plan.objects, plan.background, places=plan.places, labels={**plan.labels, "color": labels})
    image, masks = scenes.render(plan, np.random.default_rng(0))
    again, _ = scenes.render(plan, np.random.default_rng(0))
    assert (image == again).all()
    assert [place_of(*w) for w in middles({"masks": masks, "count": 2})] == list(plan.places)


def test_the_words_of_several_objects():
    def said(objects, **words):
        return (
            caption("flat", objects, "snow", **words)
            .removeprefix("a flat illustration of ")
            .removesuffix(" in the snow")
        )

    assert said(["cat", "apple"]) == "a cat and an apple"
    assert said(["cat", "car", "tree"]) == "a cat, a car and a tree"
    assert said(["cat", "car", "tree"], relation="in a row") == "a cat, a car and a tree in a row"
    assert said(["cat", "car"], places=("at the left", "at the right")) == "a cat at the left and a car at the right"
    assert said(["cat"], places=("at the top",), size_word="small") == "a small cat at the top"
    assert said(["cat", "cat"]) == "two cats" and said(["key"] * 3, relation="in a row") == "three keys in a row"
    assert {"left", "right", "top", "bottom", "middle", "below", "three", "butterflies"} <= all_words(["butterfly"])


@pytest.mark.parametrize(("count", "words"), [(1, 0.0), (1, 1.0), (2, 1.0), (3, 0.5)])
def test_eval_prompts_of_places_have_their_answers(count, words):
    rows = eval_prompts("train", 60, seed=2, count=count, arrangement="anywhere", place_words=words)
    assert rows[:25] == eval_prompts("train", 25, seed=2, count=count, arrangement="anywhere", place_words=words)
    scenes = anywhere(split="all", place_words=1.0)
    for i, row in enumerate(rows):
        assert row["count"] == len(set(row["objects"])) == count
        assert bool(row["places"] or row["relation"]) == words or words == 0.5
        assert all(place in row["caption"] for place in row["places"]) and row["relation"] in row["caption"]
        assert not any(
            relation_held_out(row["objects"][a], row["objects"][b], RELATIONS.index(r)) for a, b, r in row["facts"]
        )
        plan = Plan(row["style_name"], row["objects"], row["background_name"], row["relation"], places=row["places"])
        masks = scenes.render(plan, np.random.default_rng(i))[1]
        assert set(row["facts"]) <= set(shown({"masks": masks, "count": count})), row["caption"]
    if count == 1 and words:
        counts = [sum(r["places"] == (p,) for r in rows) for p in PLACES]
        assert min(counts) >= 11


def test_words_and_pixels_mean_the_same():
    for place, (axis, direction) in SIDES.items():
        away = [0.0, 0.0]
        away[axis] = direction * 0.2
        assert place_of(*away) == place
    assert place_of(0.01, -0.02) == "in the middle"
    assert relation_of(0.1, 0.4) == ("left of", True) and relation_of(-0.4, 0.1) == ("above", False)
    assert told("below", (), 2) == [(1, 0, "above")] and told("", (), 2) == told("", ("at the top",), 1) == []
    assert told("", ("in the middle", "at the left"), 2) == [(1, 0, "left of")]
    assert told("", ("at the bottom", "in the middle", "at the top"), 3) == [
        (1, 0, "above"),
        (2, 0, "above"),
        (2, 1, "above"),
    ]


@pytest.mark.parametrize("objects", [4, 96])
def test_small_pictures_and_all_objects_can_be_painted(objects):
    scenes = Scenes(size=16, objects=objects, styles=STYLES, arrangement="anywhere", **MANY)
    assert all(scenes[i]["masks"].any((1, 2)).sum() == scenes[i]["count"] for i in range(200))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arrangement": "left"}, "arrangement: found 'left', expected 'centred' or 'anywhere'"),
        ({"place_words": 1.5}, "place_words: found 1.5"),
        ({"counts": -1}, "counts: found -1"),
    ],
)
def test_wrong_settings_of_places_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        Scenes(**settings)


@pytest.mark.parametrize("place", PLACES)
def test_an_object_too_big_for_a_place_stays_inside_the_picture(place):
    scenes = anywhere(split="all")
    plan = Plan("cartoon", (5,), "white", size_word="big", places=(place,))
    whole = scenes.atlas.sprite("cartoon", 5, round(SIZE * 22 / 32)).mask.sum()
    assert all(scenes.render(plan, np.random.default_rng(i))[1][0].sum() >= whole for i in range(20))


def test_places_that_cannot_be_are_named():
    plan = Plan("flat", (1, 2), "white", places=("in the middle", "in the middle"))
    with pytest.raises(InputError, match="places: found"):
        anywhere().render(plan, np.random.default_rng(0))
