"""infer.generate with ControlNets, on a small random pipeline and nets: flags, rows, maps, and mistakes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

import jaxmix
from infer.flags import Config
from infer.generate import main
from infer.methods.controlnet import ControlNet
from infer.methods.method import BatchRows
from infer.png import read_settings
from infer.rows import Defaults, rows_of_objects
from jaxmix.preprocessors import preprocess
from jaxmix.testing import moved
from jaxmix.types import InputError
from tests.jobs import only


@pytest.fixture(scope="module", autouse=True)
def loaded(one_level):
    """Let jobs have the pipeline without reading it: how models are read is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxmix, "load", lambda *_, **__: one_level)
        yield


@pytest.fixture(scope="module")
def files(one_level, tmp_path_factory):
    """Return a folder with two nets, a picture of the model's shape, and a wide one."""
    path = tmp_path_factory.mktemp("controlnet")
    for i, name in enumerate(("a", "b")):
        net = jaxmix.ControlNet.init(jax.random.key(i), one_level)
        dataclasses.replace(net, params=moved(net.params, jax.random.key(9 + i), 0.2)).save(path / name)
    for name, hw in (("0.png", (16, 16)), ("1.png", (16, 16)), ("wide.png", (16, 32))):
        pixels = np.random.default_rng(len(name) + hw[1]).integers(0, 256, (*hw, 3), np.uint8)
        Image.fromarray(pixels if name != "1.png" else 255 - pixels).save(path / name)
    return path


def flags(files, out, **more):
    common = {"model": "model", "out": str(out), "steps": 2, "devices": 1, "guidance_scale": 3.0}
    return Config(**{**common, "controlnet": f"{files / 'a'}:0.9", **more})


def drawn(files, out, rows, **more):
    """Draw rows and return their pictures (n, H, W, 3) int; all have one prompt and one seed."""
    path = out.with_suffix(".jsonl")
    path.write_text("".join(json.dumps({"prompt": "a cat", "seed": 0, **row}) + "\n" for row in rows))
    assert main(flags(files, out, prompts=str(path), **more)) == 0
    names = [f"{i:04d}_seed0.png" for i in range(len(rows))]
    return np.stack([np.asarray(Image.open(only(out, name))).astype(int) for name in names])


def test_rows_follow_their_maps_and_scale_0_is_the_model_itself(files, tmp_path):
    pytest.importorskip("cv2")
    one, two = str(files / "0.png"), str(files / "1.png")
    rows = [{"control_image": one}, {"control_image": [two]}, {"control_image": one, "control_scale": 0}]
    rows += [{"control_image": one, "guess_mode": True}]
    found = drawn(files, tmp_path / "a", rows, preprocess="gray")
    plain = drawn(files, tmp_path / "b", [{}] * 4)
    np.testing.assert_array_equal(found[2], plain[0])
    assert all(np.abs(a - b).max() > 0 for i, a in enumerate(found) for b in found[:i])
    settings = read_settings(only(tmp_path / "a", "0000_seed0.png"))
    assert settings["controlnet"] == [f"{files / 'a'}:0.9"] and settings["preprocess"] == ["gray"]
    with Image.open(only(tmp_path / "a", "0000_seed0_map0.png")) as shown:
        np.testing.assert_array_equal(np.asarray(shown), preprocess(np.asarray(Image.open(one)), "gray"))
    assert "map0.png" in (tmp_path / "a" / "gallery.html").read_text()


def looks(files, pipe, row, **more):
    """Return what a row's nets are told, without drawing it."""
    method = ControlNet(flags(files, files / "unused", **more))
    method.prepare()
    method.open(pipe)
    made, bad = rows_of_objects([("a row", {"prompt": "a cat", **row})], Defaults(steps=4), method.fields)
    if bad:
        raise InputError(bad[0].reason)
    row = made[0].complete(**{**method.defaults(made[0]), "height": 16, "width": 16})
    row = method.complete(row, pipe)
    return method, row, method.build(pipe, BatchRows([row], draft=True))


def test_several_nets_have_a_value_each_or_one_for_all(files, one_level):
    nets = {"controlnet": [str(files / "a"), f"{files / 'b'}:0.5"]}
    told = {"control_image": str(files / "0.png"), "control_scale": [1, 2], "control_window": [[0, 0.5], "0.5,1"]}
    method, row, made = looks(files, one_level, told, **nets, preprocess=["none", "none"])
    assert [(look.scale, look.window) for look in made] == [([1.0], (0.0, 0.5)), ([1.0], (0.5, 1.0))]
    assert [look.guess for look in made] == [[False], [False]]
    assert method.shown(row)["map"] == "none of 0.png x 1 + none of 0.png x 2"
    assert method.shown(row)["when"] == "0 to 0.5, 0.5 to 1"
    told = {"control_image": [str(files / "0.png"), str(files / "1.png")], "guess_mode": [False, True]}
    _, _, made = looks(files, one_level, told, **nets)
    assert [look.guess for look in made] == [[False], [True]]


def test_a_row_without_a_size_gets_that_of_its_map(files, one_level):
    method = ControlNet(flags(files, files / "unused"))
    wide = {"prompt": "", "control_image": str(files / "wide.png")}
    rows, bad = rows_of_objects([("a row", wide)], Defaults(), method.fields)
    assert not bad and method.defaults(rows[0]) == {"height": 16, "width": 32}


@pytest.mark.parametrize(
    ("row", "more", "words"),
    [
        ({"control_image": "0.png"}, {"controlnet": None}, "control_image: found 0.png without a --controlnet"),
        ({"control_image": ["0.png", "1.png"]}, {}, "control_image: found 2, expected 1 or one for each of 1 nets"),
        ({"control_image": "0.png", "control_scale": [1, 1, 1]}, {}, "control_scale: found 3, expected 1 or one"),
        (
            {"control_image": "wide.png"},
            {},
            "wide.png: found 16 x 32 pixels, expected the shape of the result, 16 x 16",
        ),
        (
            {"control_image": "0.png", "control_window": "0.3,0.4"},
            {},
            "control_window: found 0.3 to 0.4, no whole one of 4",
        ),
        ({"control_image": "0.png", "control_window": "1,0"}, {}, "control_window: found '1,0', expected two numbers"),
        ({"control_image": "0.png", "guess_mode": 1}, {}, "guess_mode: found 1, expected true or false"),
        (
            {"control_image": "0.png", "control_scale": "much"},
            {},
            'control_scale: found text "much", expected a number',
        ),
        ({"control_image": "gone.png"}, {}, "no such file"),
        ({}, {"controlnet": "gone"}, "--controlnet: gone: no such file or folder"),
        ({}, {"preprocess": "edges"}, "--preprocess: found 'edges', expected one of canny"),
        ({}, {"preprocess": ["none", "none"]}, "--preprocess: found 2, expected 1 or one for each of 1 nets"),
        ({}, {"controlnet": None, "guess_mode": True}, "--guess-mode: found it without a --controlnet"),
        ({}, {"control_scale": float("nan")}, "--control-scale"),
    ],
)
def test_a_mistake_is_one_line(files, one_level, row, more, words):
    row = {
        k: [str(files / x) for x in v] if isinstance(v, list) and k == "control_image" else v for k, v in row.items()
    }
    if isinstance(row.get("control_image"), str):
        row["control_image"] = str(files / row["control_image"])
    with pytest.raises(InputError) as error:
        looks(files, one_level, row, **more)
    assert words in str(error.value) and "\n" not in str(error.value)
