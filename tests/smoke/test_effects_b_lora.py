"""The effects script of B-LoRA: its prompts, its measures, its mistakes, and a run of both halves on four cases."""

import json

import jax
import numpy as np
import pytest

import jaxmix
from jaxmix.testing import moved
from jaxmix.tuning import lora
from jaxmix.types import InputError
from scripts.effects import b_lora as script
from scripts.effects.subjects import prompts_of
from train.scenes import SIZE


def test_a_block_is_told_another_object_in_another_style_before_the_same_background():
    some = prompts_of("", 8, 3)
    other = script.told_otherwise(some, 4)
    for one, x in zip(some, other, strict=True):
        assert one.object != x.object and one.style != x.style and one.background == x.background
        assert x.object in x.prompt and x.prompt != one.prompt


def test_every_pair_of_blocks_is_told_an_object_and_a_style(tmp_path, monkeypatch):
    bench = script.Bench(script.Config(cases=4, steps=2, batch_size=4, out=str(tmp_path)))
    told = []

    def draw(title, prompts, methods=lambda index: (), key=""):
        told.extend(method.prompts for method in methods([0, 1, 2, 3]))
        return np.zeros((4, SIZE, SIZE, 3), np.uint8)

    monkeypatch.setattr(bench, "draw", draw)
    blocks, found = script.blocks_of(bench.pipe), script.measure_pairs(bench)
    assert len(blocks) == 7 and len(found) == 1 + 7 * 6 and len(told) == 7 * 6
    some, other = prompts_of("", 4, 31), script.told_otherwise(prompts_of("", 4, 31), 32)
    for rows in told:
        for row, x, y in zip(rows, some, other, strict=True):
            plain, thing, look = row.values()
            assert plain == x.prompt and y.object in thing and x.object in look and thing != look


def test_a_palette_is_the_shares_of_colours_of_what_is_masked():
    pictures = np.zeros((2, 4, 4, 3), np.uint8)
    pictures[1, :2] = 255
    whole = np.ones((2, 4, 4), bool)
    first, second = script.palette(pictures, whole)
    assert first[0] == 1 and second[0] == second[-1] == 0.5
    assert np.minimum(first, second).sum() == 0.5
    upper = whole & (np.arange(4) < 2)[None, :, None]
    assert script.palette(pictures, upper)[1][-1] == 1
    assert script.overlap(upper, whole).tolist() == [0.5, 0.5]


def test_a_run_of_four_cases_writes_tables_and_pictures(tmp_path):
    mini = jaxmix.load("mini")
    fresh = lora.init(jax.random.key(0), mini.params["unet"], r"(up_blocks\.2\.attentions\.0|up_blocks\.1)\..*to_q", 2)
    made = lora.with_alpha(moved(lora.without_alpha(fresh), jax.random.key(1), 0.3))
    jaxmix.LoRA({"unet": made}, blocks={"style": r"up_blocks\.2", "content": r"up_blocks\.1"}).save(
        tmp_path / "one.safetensors"
    )
    told = {"cases": 4, "steps": 2, "inversion_steps": 6, "batch_size": 4, "grid_rows": 1, "adapter": ""}
    files = [str(tmp_path / "one.safetensors")]
    assert script.main(script.Config(parts="halves", loras=files, out=str(tmp_path), **told)) == 0
    written = json.loads((tmp_path / "effects.json").read_text())
    drawn = {script.BASE, "both halves", "style half", "content half"}
    titles = {"The picture's style for known objects": {"StyleAligned"}, "The picture's content in known styles": set()}
    for title, beside in titles.items():
        assert set(written[title]) == drawn | beside
        told = {json.dumps(found) for found in written[title].values()}
        assert len(told) == len(written[title]), "each half draws something else"
    assert {path.name for path in tmp_path.glob("*.png")} == {"style.png", "content.png"}


def test_a_mistake_is_one_line():
    with pytest.raises(InputError, match="parts: found 'half', expected some of blocks, pairs, halves"):
        script.Config(parts="half")
    with pytest.raises(InputError, match="cases: found 2, expected 4 or more"):
        script.Config(cases=2)
