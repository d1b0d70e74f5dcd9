"""The effects script of DreamBooth: its prompts, its mistakes, and a run on four cases."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxmix.types import InputError
from jaxmix.weights.embedding_write import write_embedding
from scripts.effects import experts
from scripts.effects import subjects as script
from train.scenes import SIZE


def test_prompts_name_the_word_in_known_styles_and_do_not_change_when_there_are_more():
    some = script.prompts_of("penguin", 6, 3, "sks penguin")
    assert all("a sks penguin" in x.prompt and x.object == "penguin" for x in some)
    assert [x.prompt for x in script.prompts_of("penguin", 9, 3, "sks penguin")][:6] == [x.prompt for x in some]
    assert len({x.object for x in script.prompts_of("", 30, 3)}) > 5


def test_a_style_is_asked_for_by_its_word_and_judged_as_itself():
    cfg = script.Config(subject="pixel art", known="ink drawing", word="sks ink drawing", cases=4)
    style, known, other = script.asked_of(cfg).values()
    assert all(x.prompt.startswith("a sks ink drawing of a") and x.style == "pixel" for x in style)
    assert all(x.prompt.startswith("an ink drawing of a") and x.style == "ink" for x in known)
    assert {x.object for x in style} <= set(script.Scenes().object_names) and other == script.prompts_of("", 4, 31)
    flags = experts.flags_of(experts.Config(), experts.RECIPES["prior"], "pixel art", "ink drawing")
    said = dict(zip(flags[::2], flags[1::2], strict=True))
    assert json.loads(said["--scenes"])["split"] == "held_out_style" and said["--scene_object"] == ""
    assert (said["--instance_prompt"], said["--class_prompt"]) == ("a sks ink drawing", "an ink drawing")


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


def test_experts_are_found_by_subject_recipe_and_steps_and_their_tables_pooled(tmp_path):
    for subject in ("duck", "teddy bear"):
        for name, steps in (("prior", 100), ("prior", 200), ("one vector", 100)):
            (experts.folder_of(tmp_path, subject, name) / str(steps)).mkdir(parents=True)
    about = {"duck": {"known": "penguin"}, "teddy bear": {"known": "cat"}}
    held = {"pictures": 4, "style": "3d", "size": SIZE, "model": "mini", "subjects": about}
    (tmp_path / experts.PLAN).write_text(json.dumps(held))
    duck, bear = script.each_subject(script.Config(experts=str(tmp_path), out=str(tmp_path / "out")))
    assert (bear.subject, bear.known, bear.word, bear.subject_pictures) == ("teddy bear", "cat", "sks cat", 4)
    assert [named.partition("=")[0] for named in duck.models] == ["prior, 100 steps", "prior, 200 steps"]
    assert duck.words == [f"one vector, 100 steps={tmp_path / 'duck/one_vector/100/learned_embeds.safetensors'}"]
    both = script.pooled([{"t": {"a": {"x": np.ones(2)}, "b": {"x": np.ones(2)}}}, {"t": {"a": {"x": np.zeros(3)}}}])
    assert list(both["t"]) == ["a"] and both["t"]["a"]["x"].tolist() == [1, 1, 0, 0, 0]
    with pytest.raises(InputError, match=r"experts: found no .*plan\.json"):
        script.each_subject(script.Config(experts=str(tmp_path / "none")))


def test_a_training_of_an_expert_goes_on_from_fewer_steps(tmp_path, monkeypatch):
    ran = []

    def run(words):
        ran.append(words)
        place = Path(words[words.index("--output_dir") + 1])
        (place / "pipeline").mkdir(parents=True)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(experts.subprocess, "run", run)
    cfg = experts.Config(out=str(tmp_path), steps=[2, 5], recipes=["prior"])
    experts.train(cfg, "prior", "duck", "penguin")
    assert [words[words.index("--max_train_steps") + 1] for words in ran] == ["2", "5"]
    assert {p.name for p in experts.folder_of(tmp_path, "duck", "prior").iterdir()} == {"2", "5"}
    experts.train(cfg, "prior", "duck", "penguin")
    assert len(ran) == 2, "what is there is not trained again"
    with pytest.raises(InputError, match="recipes: found 'priors'; did you mean 'prior'"):
        experts.Config(recipes=["priors"])
    with pytest.raises(InputError, match=r"steps: found \[200, 100\], expected numbers of 1 or more, ascending"):
        experts.Config(steps=[200, 100])
