"""The effects script of ControlNets: its measures, and a run on two cases."""

import dataclasses
import json

import numpy as np
import pytest

import jaxmix
from jaxmix.types import InputError
from scripts.effects import controlnets as script
from scripts.effects.image_prompts import make_cases

pytest.importorskip("cv2")


def test_measures_know_a_scene_from_another_and_forgive_a_pixel():
    scenes = np.stack([case.image for case in make_cases(12, 3)])
    other, moved = np.roll(scenes, 1, 0), np.roll(scenes, 1, 2)
    np.testing.assert_array_equal(script.edges_f1(scenes, scenes), 1)
    assert script.edges_f1(scenes, moved).mean() > 0.9 > 0.6 > script.edges_f1(scenes, other).mean()
    assert script.little_psnr(scenes, scenes).min() > 70
    assert script.little_psnr(moved, scenes).mean() > script.little_psnr(other, scenes).mean() + 6
    # Without any edge, nothing can be followed or missed but both.
    flat = np.full((2, 64, 64, 3), 90, np.uint8)
    assert script.edges_f1(flat, flat).tolist() == [1, 1] and script.edges_f1(flat, scenes[:2]).tolist() == [0, 0]


def test_a_run_of_two_cases_writes_tables_and_pictures_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SCALES", (1.0,))
    cfg = script.Config(parts="masks", cases=2, steps=2, batch_size=2, grid_rows=1, out=str(tmp_path))
    assert script.main(cfg) == 0
    written = json.loads((tmp_path / "effects.json").read_text())["mini-masks, over its scale"]
    assert {"0", "1", "no prompt, 1, guess mode", "real scenes after the autoencoder"} <= set(written)
    assert set(written["1"]) == {"edges F1", "masks IoU", "PSNR at 1/8", "object", "style", "background"}
    assert (tmp_path / "masks.png").is_file() and "| 1 |" in (tmp_path / "effects.md").read_text()
    monkeypatch.setattr(jaxmix.Pipeline, "generate", None)  # what is kept is not drawn again
    assert script.main(cfg) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parts": "edges,all"}, "parts: found 'all', expected some of edges, tile"),
        ({"cases": 1}, "cases: found 1, expected 2 or more"),
    ],
)
def test_a_mistake_is_one_line(options, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(script.Config(), **options)
