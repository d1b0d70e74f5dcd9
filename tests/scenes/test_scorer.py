"""The judge of generated scenes: right about real ones, and loud about what it cannot judge."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import command
from jaxmix.types import InputError
from jaxmix.weights.store import save_tree
from train import scorer as scorer_module
from train.scenes import BACKGROUNDS, SIZE, STYLES, Scenes

CONFIG = Path(__file__).parents[2] / "configs" / "scorer.yaml"


@pytest.fixture(scope="module")
def scorer():
    return scorer_module.load_scorer()


def test_the_committed_scorer_knows_real_scenes(scorer):
    scenes = Scenes(seed=77, split="all", two_objects=0.0, three_objects=0.0, labelled=0.0)
    rows = [scenes[i] for i in range(300)]
    result = scorer_module.accuracy(scorer, np.stack([row["image"] for row in rows]), rows)
    assert min(result[head] for head in ("object", "style", "background")) >= 0.97
    wrong = rows[1:] + rows[:1]
    assert scorer_module.accuracy(scorer, np.stack([row["image"] for row in wrong]), rows)["all"] < 0.05


def test_probabilities_do_not_depend_on_the_batch(scorer):
    images = np.stack([Scenes(seed=5)[i]["image"] for i in range(5)])
    whole, parts = scorer(images), scorer(images, batch_size=2)
    assert whole["object"].shape == (5, len(scorer.objects))
    for head in ("style", "background"):
        np.testing.assert_allclose(whole[head].sum(-1), 1, rtol=1e-5)
    for head, values in whole.items():
        np.testing.assert_allclose(values, parts[head], atol=1e-5)


def test_class_names_are_those_of_the_scenes(scorer):
    assert scorer.objects in (Scenes().object_names, Scenes(split="all", reserved=True).object_names)
    assert scorer.styles[:4] == STYLES and scorer.backgrounds == BACKGROUNDS


def test_images_of_another_size_or_type_are_refused(scorer):
    with pytest.raises(InputError, match=rf"float32 \(1, {SIZE}, {SIZE}, 3\)"):
        scorer(np.zeros((1, SIZE, SIZE, 3), np.float32))
    with pytest.raises(InputError, match=r"\(1, 32, 32, 3\)"):
        scorer(np.zeros((1, 32, 32, 3), np.uint8))


def test_two_steps_train_a_scorer_that_loads(tmp_path, capsys):
    flags = [
        "--config",
        "configs/scorer.yaml",
        "--output_dir",
        str(tmp_path),
        "--weights",
        str(tmp_path / "s.safetensors"),
    ]
    short = ["--max_train_steps", "2", "--lr_warmup_steps", "0", "--lr_cooldown_steps", "1", "--train_batch_size", "4"]
    short += ["--devices", "1"]
    with pytest.raises(SystemExit) as stop:
        command.run(
            scorer_module.main,
            [*flags, *short, "--objects", "6", "--eval_scenes", "8", "--scenes", '{"reserved": true}'],
        )
    assert stop.value.code == 0
    names = scorer_module.load_scorer(tmp_path / "s.safetensors").objects
    assert names == Scenes(objects=6).object_names + Scenes(split="held_out_objects").object_names
    assert "one object, neutral, 8 fresh real scenes: object" in capsys.readouterr().out


def test_a_scorer_of_another_size_is_read_back_from_its_file_alone(tmp_path):
    net = scorer_module.SceneNet(4, 5, len(BACKGROUNDS), (8, 8, 8))
    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    facts = {"objects": ["a", "b", "c", "d"], "styles": list("vwxyz"), "backgrounds": BACKGROUNDS}
    facts |= {"size": 32, "channels": [8, 8, 8]}
    file = tmp_path / "s.safetensors"
    save_tree(params, file, jnp.float16, {key: json.dumps(value) for key, value in facts.items()})
    found = scorer_module.load_scorer(file)
    assert (found.size, found.channels, found.objects) == (32, (8, 8, 8), ("a", "b", "c", "d"))
    assert found(np.zeros((2, 32, 32, 3), np.uint8))["style"].shape == (2, 5)
    with pytest.raises(InputError, match=r"\(1, 64, 64, 3\), expected uint8 \(b, 32, 32, 3\)"):
        found(np.zeros((1, 64, 64, 3), np.uint8))


def test_a_counted_object_is_one_class():
    """Of "two cats" the judge says that there is a cat; it does not count."""
    rows = [{"object_names": ("cat", "cat"), "style_name": "3d", "background_name": "sea"}]

    class Sure:
        objects, styles, backgrounds = ("dog", "cat"), ("3d",), ("sea",)

        def __call__(self, images):
            return {"object": np.array([[0.1, 0.9]]), "style": np.ones((1, 1)), "background": np.ones((1, 1))}

    right, _ = scorer_module.judge(Sure(), np.zeros((1, 4, 4, 3), np.uint8), rows)
    assert {name: values.tolist() for name, values in right.items()} == {name: [True] for name in right}
