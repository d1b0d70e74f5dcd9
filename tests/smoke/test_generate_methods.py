"""infer.dense, style_aligned, style_transfer and fuse on a small random pipeline: rows, files, resuming, mistakes."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from infer import dense, fuse, generate, style_aligned, style_transfer
from infer.layouts import check_segments, picture
from infer.png import read_settings
from jaxmix.command import run
from jaxmix.pipeline.loading import ASSETS
from jaxmix.testing import random_params
from jaxmix.types import InputError
from tests.jobs import only, unmarked


@pytest.fixture(scope="module")
def files(tiny_pipeline, tmp_path_factory):
    """Return a folder with the pipeline ("model"), another one ("expert"), a mask and two pictures."""
    path = tmp_path_factory.mktemp("methods")
    whole = dataclasses.replace(tiny_pipeline, tokenizer=ASSETS / "mini" / "tokenizer")
    whole.save(path / "model")
    other = {**whole.params, "unet": random_params(whole.unet, 5, single=True)}
    dataclasses.replace(whole, params=other).save(path / "expert")
    half = np.zeros((16, 16), np.uint8)
    half[:, :8] = 255
    Image.fromarray(half).save(path / "half.png")
    Image.fromarray(half[:8]).save(path / "small.png")
    Image.fromarray(half * 0).save(path / "black.png")
    rng = np.random.default_rng(0)
    for folder, names in (("contents", "ab"), ("styles", "c")):
        (path / folder).mkdir()
        for name in names:
            Image.fromarray(rng.integers(0, 255, (20, 16, 3), np.uint8)).save(path / folder / f"{name}.png")
    return path


def go(module, files, out, rows=None, **flags):
    """Run a command's main; return its status and the pictures by name."""
    if rows is not None:
        path = out.with_suffix(".jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags["prompts"] = str(path)
    status = module.main(
        module.Config(**{"model": str(files / "model"), "out": str(out), "steps": 2, "devices": 1, **flags})
    )
    return status, {unmarked(p.name): np.asarray(Image.open(p), np.int16) for p in sorted(out.glob("*.png"))}


def test_layouts_are_drawn_written_and_shown(files, tmp_path, capsys):
    prompt = "a red car on the snow"
    rows = [
        {"prompt": prompt, "seed": 3, "segments": [{"phrase": "a red car", "box": [0, 0, 0.5, 1]}]},
        {"prompt": prompt, "seed": 3, "segments": [{"phrase": "a red car", "mask": str(files / "half.png")}]},
        {"prompt": prompt, "seed": 3, "segments": "a red car @ 0.5,0,1,1; the snow @ 0,0,0.5,1", "cross": 2.0},
        {"prompt": prompt, "segments": [{"phrase": "the snow", "polygon": [[0, 0], [1, 0], [0.5, 1]]}]},
        {"prompt": prompt, "segments": [{"phrase": "a green car", "box": [0, 0, 0.5, 1]}]},
        {"prompt": prompt, "segments": [{"phrase": "a red car", "mask": str(files / "small.png")}]},
        {"prompt": prompt, "segments": [{"phrase": "a red car", "mask": str(files / "black.png")}]},
        {"prompt": prompt},
        {"prompt": prompt, "segments": "a red car @ 0,0,1,1", "layout": "paint"},
    ]
    status, got = go(dense, files, tmp_path / "out", rows, part=1.0)
    assert status == 2
    np.testing.assert_array_equal(got["0000_seed3.png"], got["0001_seed3.png"])  # a box is the mask of the same place
    assert np.abs(got["0002_seed3.png"] - got["0000_seed3.png"]).max() > 0
    assert {"0000_seed3_layout.png", "0003_seed3_layout.png"} <= set(got)
    said = capsys.readouterr().err
    for line in (
        ":5: image 0, segment 0 ('a green car'): the phrase is not in the prompt 'a red car on the snow'",
        "small.png: found a mask of 16x8 pixels, expected the image's 16x16",
        "black.png: the mask is empty",
        ":8: no field 'segments', expected phrases and their places",
        ":9: segments: found it with layout 'paint', expected 'dense'",
    ):
        assert line in said
    settings = read_settings(only(tmp_path / "out", "0002_seed3.png"))
    assert settings["segments"][0] == {"phrase": "a red car", "box": [0.5, 0.0, 1.0, 1.0]}
    assert (settings["cross"], settings["self_attention"], settings["part"], settings["method"]) == (
        2.0,
        0.3,
        1.0,
        "dense",
    )
    assert "0002_seed3_layout.png" in unmarked((tmp_path / "out" / "gallery.html").read_text())


def test_painted_words_and_phrases_are_drawn_written_and_shown(files, tmp_path):
    """One job, one size: a box is the mask of the same place, grey is half of it, and rows keep what they are."""
    prompt, half = "a red car on the snow", str(files / "half.png")
    Image.fromarray(np.asarray(Image.open(half)) // 255 * 51).save(tmp_path / "grey.png")
    paint = {"prompt": prompt, "seed": 3, "layout": "paint"}
    rows = [
        {**paint, "segments": "a red car @ 0,0,0.5,1:0.5; the snow @ 0.5,0,1,1", "paint": 0.8},
        {**paint, "segments": [{"phrase": "a red car", "mask": half}], "paint": 0.2},
        {**paint, "segments": [{"phrase": "a red car", "mask": str(tmp_path / "grey.png"), "weight": 5}], "paint": 0.2},
        {"prompt": prompt, "seed": 3, "phrases": ["a red car", "the snow"]},
    ]
    status, got = go(generate, files, tmp_path / "out", rows)
    names = [f"{i:04d}_seed3.png" for i in range(4)]
    assert status == 0 and {*names, "0000_seed3_layout.png"} <= {*got} and "0003_seed3_layout.png" not in got
    assert np.abs(got[names[1]] - got[names[2]]).max() <= 1
    assert np.abs(got[names[0]] - got[names[1]]).max() > 0 and np.abs(got[names[3]] - got[names[1]]).max() > 0
    first, last = (read_settings(only(tmp_path / "out", names[i])) for i in (0, 3))
    assert first["segments"][0] == {"phrase": "a red car", "box": [0.0, 0.0, 0.5, 1.0], "weight": 0.5}
    assert (first["method"], first["paint"], first["paint_by"]) == ("paint", 0.8, "max") and "cross" not in first
    assert (last["method"], last["phrases"]) == ("structured", ["a red car", "the snow"])
    page = unmarked((tmp_path / "out" / "gallery.html").read_text())
    assert "0000_seed3_layout.png" in page and "a red car; the snow" in page


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a dog @ 0,0,1,1:x", 'weight: found text "x", expected a number'),
        ("a dog @ 0,0,1,1:nan", "weight: found nan, expected a number"),
        ("a dog @ nowhere.png:0.5", "no such file: nowhere.png"),
        (
            [{"phrase": "a dog", "box": [0, 0, 1, 1], "weight": True}],
            "weight: found a truth value true, expected a number",
        ),
        ([{"phrase": "a dog", "box": [0, 0, 1, 1], "height": 1}], "and maybe 'weight'"),
        ("a dog", "found 'a dog', expected 'PHRASE @ left,top,right,bottom' or 'PHRASE @ mask.png'"),
        ("a dog @ 0,0,1", r"found \[0.0, 0.0, 1.0\], expected 4 numbers"),
        ("a dog @ 0,0,2,1", "expected shares of the image from 0 to 1"),
        ("a dog @ 0.5,0,0.5,1", "expected left < right and top < bottom"),
        ("a dog @ nowhere.png", "no such file: nowhere.png"),
        ([{"phrase": "a dog"}], "one of 'mask', 'box' and 'polygon'"),
        ([{"phrase": "a dog", "polygon": [[0, 0], [1, 1]]}], "at least three corners"),
        ({"phrase": "a dog"}, "expected a list of segments"),
    ],
)
def test_segments_that_cannot_be_read_are_one_line(value, message):
    with pytest.raises(InputError, match=message):
        check_segments("segments", value)


def test_the_picture_of_a_layout_has_its_places():
    places = check_segments("segments", "a dog @ 0,0,0.5,1; the snow @ 0.5,0,1,0.5")
    shown = np.asarray(picture(places, 64, 64))
    colors = {tuple(shown[y, x]) for y, x in ((5, 5), (5, 185), (185, 185))}
    assert shown.shape == (192, 192, 3) and len(colors) == 3 and (255, 255, 255) in colors


@pytest.mark.slow
def test_groups_are_drawn_in_one_batch_and_resumed_whole(files, tmp_path, capsys):
    rows = [{"prompt": f"a dog {i}", "group": "abc"[i // 2], "seed": i} for i in range(6)]
    out = tmp_path / "out"
    status, first = go(style_aligned, files, out, rows, batch_size=3)
    assert status == 0 and len([n for n in first if n[0] == "0"]) == 6
    assert "6 images in 3 batches of 2" in capsys.readouterr().out  # two groups do not fit
    only(out, "0003_seed3.png").unlink()
    beside = only(out, "0002_seed2.png").stat().st_mtime_ns
    status, again = go(style_aligned, files, out, rows, batch_size=3, resume=True)
    said = capsys.readouterr().out
    assert "2 images with" in said and "manifest.jsonl and 1 PNGs" in said  # its group alone, and of it what was gone
    assert only(out, "0002_seed2.png").stat().st_mtime_ns == beside
    assert all((first[name] == again[name]).all() for name in first)
    _, wide = go(style_aligned, files, tmp_path / "wide", rows, batch_size=8)
    assert all(np.abs(first[name] - wide[name]).max() <= 2 for name in first if name[0] == "0")
    # Without groups of their own all rows are one, and the first is as if alone.
    plain = [{k: v for k, v in row.items() if k != "group"} for row in rows[:2]]
    _, one = go(style_aligned, files, tmp_path / "one", plain)
    np.testing.assert_array_equal(one["0001_seed1.png"], first["0001_seed1.png"])


@pytest.mark.slow
def test_a_picture_as_reference_is_reconstructed_and_shown(files, tmp_path, capsys):
    rows = [{"prompt": "a dog"}, {"prompt": "a red car"}]
    picture = str(files / "contents" / "a.png")
    flags = {"reference": picture, "reference_prompt": "a cat", "offset": 1, "score_shift": 0.7}
    status, got = go(style_aligned, files, tmp_path / "out", rows, sampler="ddim", **flags)
    assert status == 0 and {"0002_seed0.png", "0002_seed0_reference.png", "0000_seed0.png", "0001_seed1.png"} <= set(
        got
    )
    assert read_settings(only(tmp_path / "out", "0000_seed0.png"))["score_shift"] == 0.7
    with pytest.raises(InputError, match="no row can be drawn"):
        go(style_aligned, files, tmp_path / "bad", rows, sampler="euler", dry_run=True, **flags | {"offset": 0})
    said = capsys.readouterr().err
    assert "found euler, expected ddim" in said
    assert ":1: group 0: its first row, in whose style this one was to be, cannot be drawn" in said


def test_bad_groups_are_listed(files, tmp_path, capsys):
    rows = [
        {"prompt": "a dog", "group": "alone"},
        {"prompt": "a dog", "group": 1},
        {"prompt": "a car", "group": 1, "steps": 3},
        {"prompt": "a dog", "group": "good"},
        {"prompt": "a car", "group": "good"},
    ]
    status, _ = go(style_aligned, files, tmp_path / "out", rows, dry_run=True)
    said = capsys.readouterr()
    assert status == 2 and "plan: 2 images" in said.out
    assert ":1: group alone: found one image, expected the reference and at least one more" in said.err
    assert ":3: group 1: found different steps, samplers or sizes" in said.err


@pytest.mark.slow
def test_every_content_meets_every_style_in_both_modes(files, tmp_path, capsys):
    flags = {"content": str(files / "contents"), "style": str(files / "styles"), "steps": 4}
    status, stored = go(style_transfer, files, tmp_path / "stored", **flags)
    assert status == 0 and "features at most" in capsys.readouterr().out
    names = ["0000_seed0", "0001_seed1"]
    assert {f"{name}{part}.png" for name in names for part in ("", "_content", "_style")} <= set(stored)
    _, beside = go(style_transfer, files, tmp_path / "rows", features="rows", **flags)
    assert all(np.abs(stored[f"{n}.png"] - beside[f"{n}.png"]).max() <= 2 for n in names)
    _, off = go(style_transfer, files, tmp_path / "off", inject=False, adain=False, **flags)
    assert np.abs(off["0000_seed0.png"] - stored["0000_seed0.png"]).max() > 2
    rows = [{"content": str(files / "contents" / "b.png"), "style": str(files / "styles" / "c.png"), "gamma": 0.75}]
    _, one = go(style_transfer, files, tmp_path / "one", rows, steps=4)
    assert np.abs(one["0000_seed0.png"] - stored["0001_seed1.png"]).max() <= 2


def test_style_transfer_says_what_is_missing(files, tmp_path, capsys):
    with pytest.raises(InputError, match="found one of them, expected both"):
        style_transfer.Config(content=str(files / "contents"))
    with pytest.raises(InputError, match="found no pictures, expected files"):
        go(style_transfer, files, tmp_path / "a", content=str(tmp_path), style=str(files / "styles"))
    with pytest.raises(InputError, match="expected --content and --style"):
        go(style_transfer, files, tmp_path / "b")
    half = str(files / "half.png")
    rows = [{"content": half}, {"content": half, "style": half}]
    status, _ = go(style_transfer, files, tmp_path / "c", rows, dry_run=True)
    assert status == 2 and ":1: no field 'style', expected a picture" in capsys.readouterr().err


@pytest.mark.slow
def test_two_models_and_two_prompts_are_fused(files, tmp_path):
    rows = [
        {"prompt": "a dog", "expert_prompt": "a red car", "seed": 1},
        {"prompt": "a dog", "seed": 1, "fuse_strength": 0},
    ]
    status, got = go(fuse, files, tmp_path / "two", rows, expert=str(files / "expert"), switch=0)
    assert status == 0 and np.abs(got["0000_seed1.png"] - got["0001_seed1.png"]).max() > 0
    settings = read_settings(only(tmp_path / "two", "0000_seed1.png"))
    assert settings["expert_prompt"] == "a red car" and settings["switch"] == 0
    status, one = go(fuse, files, tmp_path / "one", rows[:1], switch=0)
    assert status == 0 and np.abs(one["0000_seed1.png"] - got["0000_seed1.png"]).max() > 0


def test_fusing_refuses_what_it_cannot_blend(files, tmp_path, capsys, tiny_pipeline):
    with pytest.raises(InputError, match="nothing to blend"):
        go(fuse, files, tmp_path / "none", prompt="a dog")
    status, _ = go(
        fuse, files, tmp_path / "a", [{"prompt": "a dog"}, {"prompt": "a dog", "expert_prompt": "a car"}], dry_run=True
    )
    assert status == 2 and ":1: no field 'expert_prompt'" in capsys.readouterr().err
    other = tmp_path / "other"
    schedule = dataclasses.replace(tiny_pipeline.schedule, prediction_type="v_prediction")
    dataclasses.replace(tiny_pipeline, schedule=schedule, tokenizer=ASSETS / "mini" / "tokenizer").save(other)
    with pytest.raises(SystemExit) as stop:
        argv = [
            "--model",
            str(files / "model"),
            "--expert",
            str(other),
            "--prompt",
            "a dog",
            "--out",
            str(tmp_path / "b"),
        ]
        run(fuse.main, argv)
    assert stop.value.code == 2
    assert (
        "prediction_type is 'v_prediction' in the expert and 'epsilon' in the general model" in capsys.readouterr().err
    )
