"""The effects script of image prompts: its cases, its judges, and a run on two cases."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jaxmix
from jaxmix.types import InputError
from scripts.effects import image_prompts as script
from scripts.effects import style_references
from train.scenes import SIZE
from train.scorer import load_scorer


@pytest.fixture(scope="module")
def cases():
    return script.make_cases(40, 3)


def test_prompts_name_another_object_elsewhere_and_no_style(cases):
    for case in cases:
        assert case.object != case.other and case.background != case.elsewhere
        assert case.other in case.prompt and case.object in case.caption
        assert not any(word in case.prompt for word in ("render", "illustration", "drawing", "cartoon"))
        assert case.image.shape == (SIZE, SIZE, 3) and 0 < case.mask.mean() < 1
    again = script.make_cases(5, 3)
    assert [c.caption for c in again] == [c.caption for c in cases[:5]]


def test_the_judges_follow_real_references_and_no_others(cases):
    judges = script.Judges(jaxmix.ImageEncoder.load("mini-clip"))
    images = np.stack([c.image for c in cases])
    own, other = judges.follow(images, cases), judges.follow(np.roll(images, 1, 0), cases)
    for kind in ("object", "style", "background"):
        assert own[kind].mean() > 0.9 > 0.5 > other[kind].mean()
    np.testing.assert_allclose(own["CLIP-I"], 1, atol=1e-5)
    assert other["CLIP-I"].mean() < 0.8 and own["layout IoU"].mean() > 0.8 > other["layout IoU"].mean()
    # Beside its prompt, a reference itself would be all leak.
    both = judges.both(images, cases)
    assert both["leaked object"].mean() > 0.9 and both["prompt's object"].mean() < 0.1


def test_further_references_have_the_style_of_the_first(cases):
    several = style_references.more_references(cases, 3)
    assert {len(some) for some in several} == {style_references.SEVERAL}
    assert all(np.array_equal(some[0], case.image) for some, case in zip(several, cases, strict=True))
    judged = load_scorer()
    styles = [judged(np.stack([some[i] for some in several]))["style"].argmax(-1) for i in range(3)]
    assert np.mean(styles[0] == styles[1]) > 0.9 and np.mean(styles[0] == styles[2]) > 0.9


def test_a_run_of_two_cases_writes_tables_and_pictures_and_resumes(tmp_path, monkeypatch):
    pipe, encoder = jaxmix.load("mini"), jaxmix.ImageEncoder.load("mini-clip")
    jaxmix.IPAdapter.init(jax.random.key(0), pipe, encoder).save(tmp_path / "ip.safetensors")
    monkeypatch.setattr(script, "SCALES", (1.0,))
    told = {"adapter": str(tmp_path / "ip.safetensors"), "plus": "", "out": str(tmp_path)}
    cfg = script.Config(parts="scales", cases=2, steps=2, batch_size=2, grid_rows=1, **told)
    assert script.main(cfg) == 0
    written = json.loads((tmp_path / "effects.json").read_text())["Scale of mini-ip, the picture alone"]
    assert set(written) == {"0", "1"} and set(written["1"]) == {"object", "style", "background", "CLIP-I", "layout IoU"}
    assert (tmp_path / "scales.png").is_file() and "| 1 |" in (tmp_path / "effects.md").read_text()
    monkeypatch.setattr(jaxmix.Pipeline, "generate", None)  # what is kept is not drawn again
    assert script.main(cfg) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parts": "alone,all"}, "parts: found 'all', expected some of alone, scales"),
        ({"cases": 1}, "cases: found 1, expected 2 or more"),
    ],
)
def test_a_mistake_is_one_line(options, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(script.Config(), **options)
