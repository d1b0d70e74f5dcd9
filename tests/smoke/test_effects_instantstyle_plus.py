"""The effects script of InstantStyle-Plus: its pairs, and a run on two cases."""

import dataclasses
import json

import pytest

from jaxmix.types import InputError
from scripts.effects import instantstyle_plus as script

pytest.importorskip("cv2")


def test_pairs_are_of_two_kinds_and_captions_name_no_style():
    pairs = script.make_pairs(6, 3)
    for pair in pairs:
        assert pair.content.style != pair.style.style and pair.content.object != pair.style.object
        assert pair.content.caption.endswith(pair.caption) and not pair.caption.startswith(("a flat", "a 3d", "an ink"))
    captions = [pair.caption for pair in script.make_pairs(9, 3)]
    assert captions[:2] == [pair.caption for pair in pairs[:2]]


def test_a_run_of_two_cases_writes_tables_and_pictures_and_resumes(tmp_path, monkeypatch):
    every = script.methods

    def few(*args):
        beside, without = every(*args)
        return beside, {name: without[name] for name in (script.ALONE, "without ReNoise")}

    monkeypatch.setattr(script, "methods", few)
    cfg = script.Config(parts="ablations", cases=2, ablations=2, steps=2, batch_size=2, grid_rows=1, out=str(tmp_path))
    assert script.main(cfg) == 0
    written = json.loads((tmp_path / "effects.json").read_text())
    measured = written["Without its parts"]
    assert set(measured) == {script.ALONE, "without ReNoise", "the content after the autoencoder"}
    assert {"edges F1", "layout IoU", "CLIP-I content", "style", "gram style"} <= set(measured[script.ALONE])
    assert measured[script.ALONE]["PSNR content"] < measured["the content after the autoencoder"]["PSNR content"]
    assert written["seconds"].keys() == {script.ALONE, "without ReNoise"}
    assert (tmp_path / "ablations.png").is_file() and "| without ReNoise |" in (tmp_path / "effects.md").read_text()
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").iterdir()}
    assert script.main(cfg) == 0
    assert drawn == {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").iterdir()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parts": "methods,all"}, "parts: found 'all', expected some of methods, ablations"),
        ({"ablations": 1}, "ablations: found 1, expected 2 or more"),
    ],
)
def test_a_mistake_is_one_line(options, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(script.Config(), **options)
