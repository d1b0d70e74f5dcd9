"""The effects script of the training-free methods: its cases, baselines and measures, and a run on two cases."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmix
from jaxmix import Site
from jaxmix.types import InputError
from scripts.effects import fusion, layouts, styles
from scripts.effects import training_free as script
from train.scenes import SIZE
from train.scorer import load_scorer
from train.segmenter import load_segmenter


@pytest.fixture(scope="module")
def mini():
    return dataclasses.replace(jaxmix.load("mini"), default_steps=2)


@pytest.mark.parametrize("count", [2, 3])
def test_layouts_say_what_the_captions_do_not(count):
    some = layouts.cases(24, 3, count)
    for case in some:
        assert len(case.objects) == len(case.segments) == count
        assert not any(word in case.caption for word in ("left of", "above", "in a row"))
        for (phrase, _, (left, top, right, bottom)), mask in zip(case.objects, case.masks, strict=True):
            assert phrase in case.caption
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0
    order = [case.caption.index(case.objects[0][0]) < case.caption.index(case.objects[-1][0]) for case in some]
    assert 0 < sum(order) < len(order)
    for case in some:
        assert sorted(case.alone) == sorted(
            next(one for one in case.alone if phrase in one) for phrase, _, _ in case.objects
        )
    again = layouts.cases(12, 3, count)
    assert [c.caption for c in again] == [c.caption for c in some[:12]]


@pytest.mark.parametrize("count", [2, 3])
def test_layouts_agree_with_captions_that_say_places(count):
    for case in layouts.cases(24, 3, count, worded=True):
        places = [case.caption.index(phrase) for phrase, _, _ in case.objects]
        (left, top, _, _), (left2, top2, _, _) = (box for _, _, box in case.objects[:2])
        assert places == sorted(places)
        if "above" in case.caption:
            assert top < top2
        else:
            assert left < left2 and ("left of" if count == 2 else "in a row") in case.caption


def test_objects_are_composed_of_their_own_captions(mini):
    some = layouts.cases(3, 3, 3)
    asked = layouts.conditions(mini)["Composable Diffusion"](some)
    (method,) = asked["methods"]
    assert [[first, *more] for first, more in zip(asked["prompts"], method.prompts, strict=True)] == [
        list(case.alone) for case in some
    ]
    mini.check(jaxmix.Request(prompts=asked["prompts"]), method)


def test_the_judges_find_real_objects_where_they_are():
    some = layouts.cases(40, 5, 2)
    found = layouts.measure(layouts.real(some), some, load_scorer(), load_segmenter())
    assert found["inside"].mean() > 0.7 and found["iou"].mean() > 0.85
    swapped = []
    for case in some:
        (first, one, here), (second, two, there) = case.objects
        swapped.append(dataclasses.replace(case, objects=((first, one, there), (second, two, here))))
    wrong = layouts.measure(layouts.real(some), swapped, load_scorer(), load_segmenter())
    assert wrong["inside"].mean() < 0.3


def test_methods_for_layouts_are_told_the_objects(mini):
    case = layouts.cases(1, 3, 2)[0]
    made = {name: draw([case]).get("methods", ()) for name, draw in layouts.conditions(mini).items()}
    assert set(layouts.MAIN) <= set(made)
    assert [segment.phrase for segment in made["paint-with-words"][0].layouts[0]] == [p for p, _, _ in case.objects]
    assert made["Structured Diffusion"][0].phrases == [[phrase for phrase, _, _ in case.objects]]
    for methods in made.values():
        mini.check(jaxmix.Request(prompts=[case.caption]), methods)


def test_a_fixed_range_moves_scores_by_the_strength_itself(mini):
    case = layouts.cases(1, 3, 2)[0]
    arguments = layouts.conditions(mini)["without the value range"]([case])
    request = jaxmix.Request(prompts=[case.caption])
    (control,) = arguments["methods"][0].sketch(mini, request).controls
    control = control.at(jnp.asarray(0), jnp.asarray(900))
    x = jnp.zeros((1, 1, 256, control.tokens.shape[1]))
    change = np.asarray(control.logits(Site("a.attn2", 1, (16, 16)), x))[0, 0]
    alpha = 0.9**5 * (1 - np.asarray(control.area["16x16"])[0])
    np.testing.assert_allclose(np.abs(change), np.broadcast_to(alpha[:, None], change.shape), atol=1e-5)
    assert (change > 0).any() and (change < 0).any()


def test_sets_name_their_style_once():
    some = styles.sets(8, 2)
    words = [one.prompts[0].split(" of ")[0] for one in some]
    for one, word in zip(some, words, strict=True):
        assert len(set(one.objects)) == len(one.prompts) == 4
        assert not any(word in prompt for prompt in one.prompts[1:])
    named = styles.prompts_of("style named in all prompts", some)
    assert all(named[4 * i + k].startswith(words[i]) for i in range(8) for k in range(4))
    assert styles.prompts_of("StyleAligned", some)[1] == some[0].prompts[1]
    strips = styles.strips(np.arange(8)[:, None, None, None].repeat(3, 3))
    np.testing.assert_array_equal(strips[..., 0], [[[0, 1, 2, 3]], [[4, 5, 6, 7]]])


def test_measures_of_pictures_know_what_is_equal():
    some = styles.pairs(6, 1)
    assert styles.gram_distance(some.content, some.content).max() == 0
    assert styles.gram_distance(some.content, some.style).min() > 0
    np.testing.assert_allclose(styles.correlation(*[styles.edges(some.content)] * 2), 1, atol=1e-4)
    assert (styles.psnr(some.content, some.content) > 90).all()
    found = styles.measure_transfer(some.content, some, load_scorer(), load_segmenter())
    assert found["iou"].mean() > 0.8 and found["object"].mean() > 0.6 and found["style"].mean() < 0.3


def test_both_objects_of_two_scenes_are_not_in_one():
    some = fusion.fused(4, 1)
    assert all(a.general != a.expert and len(set(a.objects)) == 2 and "pixel art" in a.expert for a in some)
    from train.scenes import Plan, Scenes

    scenes = Scenes(split="all")
    plans = [Plan("3d", (one.objects[0],), "snow") for one in some]
    images = np.stack([scenes.render(p, np.random.default_rng(0))[0] for p in plans]).astype(np.uint8)
    found = fusion.measure_fused(images, some, load_scorer())
    assert found["general's object"].mean() > 0.7 and found["both"].mean() <= 0.5
    assert found["expert's style"].mean() < 0.3


def test_the_expert_is_given_less_as_its_k_grows(mini):
    some, pipe = fusion.fused(3, 1), dataclasses.replace(mini, default_steps=4)
    shares = [fusion.areas(pipe, pipe, some, [1, 2, 3], k) for k in (1.0, 3.0, 30.0)]
    assert all(((share >= 0) & (share <= 1)).all() for share in shares)
    assert shares[0].mean() > shares[1].mean() > shares[2].mean()
    # Equal models with one prompt and one k tie at every pixel, and ties are the general model's.
    equal = [dataclasses.replace(one, expert=one.general) for one in some]
    assert fusion.areas(pipe, pipe, equal, [1, 2, 3], 1.0).max() == 0


def test_transfers_of_one_inversion(mini):
    some = styles.pairs(2, 1)
    chosen = {"strength": 0.0, "adain": False}, {}
    both = styles.transfer(mini, some, slice(0, 2), "reference", chosen, 2)
    assert both.shape == (2, 2, SIZE, SIZE, 3) and both.dtype == np.uint8
    again = styles.transfer(mini, some, slice(0, 2), "reference", chosen[:1], 2)
    np.testing.assert_array_equal(both[:, :1], again)
    assert (both[:, 0] != both[:, 1]).any()


def test_a_table_has_differences_from_its_base():
    rng = np.random.default_rng(0)
    base = rng.random(50)
    text = script.table("Title", {"plain": {"iou": base}, "more": {"iou": base + 0.1}}, "plain", {})
    assert "| plain | " in text and "(+0.100 ±0.000)" in text


@pytest.mark.slow
def test_a_run_draws_measures_and_keeps(mini, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "load_model", lambda path: mini)
    keep = ("plain prompt", "DenseDiffusion")
    whole = layouts.conditions
    monkeypatch.setattr(layouts, "MAIN", keep)
    monkeypatch.setattr(layouts, "conditions", lambda pipe: {k: v for k, v in whole(pipe).items() if k in keep})
    cfg = script.Config(methods="dense", cases=4, batch_size=4, grid_rows=2, out=str(tmp_path))
    assert script.main(cfg) == 0
    first = capsys.readouterr()
    assert "DenseDiffusion, 3 objects" in first.out and (tmp_path / "dense_2_unsaid.png").is_file()
    numbers = json.loads((tmp_path / "effects.json").read_text())
    assert set(keep) < set(numbers["DenseDiffusion, 2 objects, captions say the places"])
    assert script.main(cfg) == 0
    second = capsys.readouterr()
    assert "cases" not in second.err and second.out == first.out  # nothing is drawn twice


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "dense,other"}, "found 'other'"),
        ({"cases": 1}, "cases: found 1"),
        ({"methods": "fusion"}, "--expert"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        script.Config(**options)
