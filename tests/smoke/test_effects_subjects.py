"""The effects script of DreamBooth: its prompts, its mistakes, and a run on four cases."""

import json

import numpy as np
import pytest

from jaxmix.types import InputError
from jaxmix.weights.embedding_write import write_embedding
from scripts.effects import subjects as script


def test_prompts_name_the_word_in_known_styles_and_do_not_change_when_there_are_more():
    some = script.prompts_of("penguin", 6, 3, "sks penguin")
    assert all("a sks penguin" in x.prompt and x.object == "penguin" for x in some)
    assert [x.prompt for x in script.prompts_of("penguin", 9, 3, "sks penguin")][:6] == [x.prompt for x in some]
    assert len({x.object for x in script.prompts_of("", 30, 3)}) > 5


def test_a_run_of_four_cases_writes_tables_and_pictures(tmp_path):
    cfg = script.Config(models=["itself=mini"], cases=4, steps=2, batch_size=4, grid_rows=1, out=str(tmp_path))
    assert script.main(cfg) == 0
    written = json.loads((tmp_path / "effects.json").read_text())
    for title in ("The subject in new scenes", "Its class, without the word", "Other objects"):
        assert written[title]["itself"] == written[title][script.BASE], "the same model draws the same"
    real = written["The subject in new scenes"]["real scenes of the subject"]
    others = written["Other objects"][script.BASE]
    assert set(real) == {"CLIP-I subject"} and real["CLIP-I subject"] > others["CLIP-I subject"]
    assert "MagicFusion with itself" in written["Beside another object"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"subject.png", "class.png", "objects.png", "beside.png"}
    assert np.isfinite(others["variety"])


def test_a_word_is_drawn_where_the_subject_is_asked_for(tmp_path):
    mini = script.jaxmix.load("mini")
    table = np.asarray(mini.params["text_encoder"]["text_model"]["embeddings.token_embedding"]["embedding"])
    write_embedding(tmp_path / "w.safetensors", "<duck>", [table[mini.token_ids("penguin")]])
    told = {"cases": 4, "steps": 2, "batch_size": 4, "grid_rows": 1, "word": "penguin"}
    assert script.main(script.Config(words=[f"it={tmp_path / 'w.safetensors'}"], out=str(tmp_path), **told)) == 0
    (title, found), _ = json.loads((tmp_path / "effects.json").read_text()).items()
    assert title == "The subject in new scenes" and found["it"].keys() == found[script.BASE].keys()
    for key, value in found["it"].items():  # the word is the penguin's own vector
        np.testing.assert_allclose(value, found[script.BASE][key], atol=1e-2)


def test_a_mistake_is_one_line():
    with pytest.raises(InputError, match=r"words: found 'duck', expected NAME=EMBEDDING\.safetensors"):
        script.Config(words=["duck"])
    with pytest.raises(InputError, match="models: found 'duck', expected NAME=FOLDER or"):
        script.Config(models=["duck"])
    with pytest.raises(InputError, match="cases: found 2, expected 4 or more"):
        script.Config(cases=2)
