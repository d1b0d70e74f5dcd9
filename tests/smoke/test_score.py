"""The score command: shares with intervals for every kind of prompt, and one clear line for what it cannot score."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import command
from jaxmix.types import InputError
from jaxmix.weights.store import save_tree
from scripts.mini import score as command_
from scripts.mini.score import Config, line, score, share, wilson
from train.scenes import SIZE, Scenes
from train.scorer import load_scorer
from train.segmenter import SegmentNet

SMALL = {"prompts": 2, "batch_size": 2, "steps": 1, "real_scenes": 2, "round_trip": 2}


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """Return weights of a segmenter that has learnt nothing but names the objects."""
    file = tmp_path_factory.mktemp("judge") / "segmenter.safetensors"
    shapes = jax.eval_shape(SegmentNet(24, (8, 8, 8)).init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    facts = {"size": SIZE, "channels": [8, 8, 8], "names": Scenes().object_names}
    save_tree(params, file, jnp.float16, {key: json.dumps(value) for key, value in facts.items()})
    return str(file)


def test_every_kind_is_scored_and_written_with_its_intervals(segmenter, tmp_path, capsys):
    out = tmp_path / "deep" / "scores.json"
    cfg = Config(arrangement="anywhere", segmenter=segmenter, out=str(out), guidance_scale=1.0, **SMALL)
    assert command_.main(cfg) == 0
    found = json.loads(out.read_text())
    scores, printed = found["scores"], capsys.readouterr().out
    assert set(cfg.named_kinds) <= set(scores) and "round trip, three objects" in scores
    assert found["command"].startswith("python -m scripts.mini.score --prompts 2") and found["config"]["seed"] == 5
    for result in scores.values():
        cell = result["object"]
        assert cell["n"] == 2 and 0 <= cell["low"] <= cell["share"] <= cell["high"] <= 1
    assert "place" in scores["places"] and "relation" in scores["two"] and "any_object" in scores["three"]
    assert "one object where the prompt says (n=2): object" in printed and f"wrote {out}" in printed
    assert (tmp_path / "deep" / "scores-places.png").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompts", "0"], "prompts: found 0, expected 1 or more"),
        (["--out", "folder"], "out: found folder, expected a file that ends in .json"),
        (["--kinds", "[places]"], "kinds: found places under arrangement 'centred'"),
        (
            ["--arrangement", "anywhere"],
            f"found a segmenter of {SIZE} px that names 0 objects, expected one of {SIZE} px",
        ),
        (["--objects", "30"], "objects: found 30, expected at most 24"),
    ],
)
def test_what_cannot_be_scored_is_one_clear_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        command.run(command_.main, flags)
    said = capsys.readouterr().err
    errors = [text for text in said.splitlines() if "error:" in text]
    assert stop.value.code == 2 and len(errors) == 1 and words in errors[0] and "Traceback" not in said


def test_judges_of_another_size_are_refused(segmenter):
    class Small:
        latent_shape = (32, 32, 4)

        class vae:
            class config:
                factor = 8

    with pytest.raises(InputError, match=f"mini: found pictures of 256 px, expected {SIZE} px"):
        command_.open_judges(Config(), Small)


def test_intervals_hold_their_share():
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    found = share(np.array([True] * 10))
    assert found["share"] == found["high"] == 1.0 and found["low"] == pytest.approx(0.722, abs=1e-3)


def test_real_scenes_score_full_marks():
    scenes = Scenes(seed=77, split="all", two_objects=1.0, three_objects=0.0, labelled=0.0)
    rows = [scenes[i] for i in range(20)]
    result = score(np.stack([row["image"] for row in rows]), rows, load_scorer(), None)
    assert result["object"]["share"] == result["any_object"]["share"] == 1.0 and "relation" not in result
    assert line("two", result).startswith("two (n=20): object 100.0 [83.9, 100.0], style ")
