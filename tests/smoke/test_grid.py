"""Rows from tables and pipes, grids of values, and the labelled sheets that they make."""

import io
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from infer.flags import Config
from infer.generate import main
from infer.grid import read_axes
from infer.job import collect_rows, draw
from infer.methods.registry import Methods
from infer.png import read_settings
from jaxmix.command import parse
from jaxmix.types import InputError
from tests.smoke.test_generate import StandIn, lines_of


def rows_of(tmp_path, content=None, name="p.jsonl", **settings):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        settings["prompts"] = str(tmp_path / name)
    config = Config(**settings)
    return collect_rows(config, Methods(config))


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


# Where rows come from -------------------------------------------------------------------------------------------------


def test_rows_of_parquet_are_those_of_jsonl(tmp_path):
    parquet(
        tmp_path / "p.parquet",
        prompt=["a cat", "a dog", "a fox"],
        seed=[5, None, None],
        guidance_scale=[float("nan"), 2.5, None],
        steps=["3", None, "x"],
        segments=[None, [{"phrase": "a dog", "box": [0, 0, 1, 0.5], "mask": None}], None],
    )
    text = '{"prompt": "a cat", "seed": 5, "steps": 3}\n'
    text += '{"prompt": "a dog", "guidance_scale": 2.5, "segments": [{"phrase": "a dog", "box": [0, 0, 1, 0.5]}]}\n'
    rows, bad = rows_of(tmp_path, prompts=str(tmp_path / "p.parquet"))
    same, _ = rows_of(tmp_path, text)
    strip = [{**vars(row), "where": ""} for row in rows]
    assert strip == [{**vars(row), "where": ""} for row in same]
    assert [str(row) for row in bad] == ['p.parquet:3: steps: found text "x", expected a whole number of at least 1']


def test_a_table_without_prompts_or_with_an_unknown_column_is_one_line(tmp_path):
    parquet(tmp_path / "p.parquet", promt=["a"], seed=[1])
    for name, content, told in (
        ("p.csv", "text,seed\na,1\n", r"p\.csv: found the column 'text'"),
        ("p.csv", "seed,steps\n1,2\n", r"p\.csv: found the columns seed, steps, expected one called prompt"),
        ("p.parquet", None, r"p\.parquet: found the column 'promt'; did you mean 'prompt'"),
        ("q.parquet", b"PAR1 and then nothing", r"q\.parquet: not a readable \.parquet file"),
    ):
        with pytest.raises(InputError, match=told):
            rows_of(tmp_path, content, name, prompts=str(tmp_path / name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        patch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(InputError, match=r"pip install 'jaxmix-diffusion\[parquet\]'"):
            rows_of(tmp_path, prompts=str(tmp_path / "p.parquet"))


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b'{"prompt": "a"}\n{"prompt": "b"}\n', ["a", "b"]),
        (b"a\nb, c\n", ["a", "b, c"]),
        (b"\xef\xbb\xbfseed,prompt\n4,a\n5,b\n", ["a", "b"]),
    ],
)
def test_standard_input_is_read_by_what_it_begins_with(tmp_path, monkeypatch, content, prompts):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    rows, bad = rows_of(tmp_path, prompts="-")
    assert [row.prompt for row in rows] == prompts and not bad and rows[0].where.startswith("stdin:")
    status, _ = go(tmp_path, None, prompts="-")
    assert status == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content + b"more\n")))
    with pytest.raises(InputError, match="found the pictures of another job"):
        go(tmp_path, None, prompts="-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(InputError, match="stdin: the prompt file is empty"):
        rows_of(tmp_path, prompts="-")


def test_a_terminal_is_no_source_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(InputError, match="--prompts -: found a terminal"):
        rows_of(tmp_path, prompts="-")


# Grids ----------------------------------------------------------------------------------------------------------------


def go(tmp_path, content='{"prompt": "a"}\n', **settings):
    rows, bad = rows_of(tmp_path, content, out=str(tmp_path / "out"), **settings)
    config = Config(**{"prompts": str(tmp_path / "p.jsonl"), "out": str(tmp_path / "out"), **settings})
    return draw(config, rows, bad, StandIn, None, Methods(config)), tmp_path / "out"


def test_a_grid_draws_every_combination_with_the_seed_of_the_row(tmp_path):
    text = '{"prompt": "a", "id": "one"}\n{"prompt": "b"}\n'
    plain, _ = rows_of(tmp_path, text, num_images=2, seed=3)
    rows, bad = rows_of(tmp_path, text, num_images=2, seed=3, set=["steps=2,4", 'negative_prompt="x, y",'])
    assert not bad and len(rows) == 16 and len({row.number for row in rows}) == 16
    assert [row.seed for row in rows] == [row.seed for row in plain for _ in range(4)]
    assert [(row.steps, row.negative_prompt) for row in rows[:4]] == [(2, "x, y"), (2, None), (4, "x, y"), (4, None)]
    assert rows[1].cell == (("steps", "2"), ("negative_prompt", "none"))
    assert [row.id for row in rows[:3]] == ["one", "one-2", "one-3"] and rows[4].origin == 1
    fresh, _ = rows_of(tmp_path, text, seed=-1, set=["steps=2,4"])
    assert [row.origin for row in fresh] == [0, 0, 1, 1]


def test_words_in_prompts_take_values_from_the_flag_or_a_file(tmp_path):
    (tmp_path / "animals.txt").write_text("a cat\n\na dog, wet\n")
    text = '{"prompt": "__animal__ at __time__", "negative_prompt": "no __animal__"}\n{"prompt": "sea"}\n'
    rows, _ = rows_of(tmp_path, text, set=[f"animal=@{tmp_path / 'animals.txt'}", 'time=["night"]'])
    assert [row.prompt for row in rows] == ["a cat at night", "a dog, wet at night", "sea", "sea"]
    assert rows[1].negative_prompt == "no a dog, wet"
    rows, _ = rows_of(tmp_path, None, set="prompt=a,b")
    assert [(row.prompt, row.seed) for row in rows] == [("a", 0), ("b", 0)]
    rows, _ = rows_of(tmp_path, '{"prompt": "x"}', set=['segments=[[{"phrase": "x", "box": [0, 0, 1, 1]}], null]'])
    assert [row["segments"] is None for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("step=1,2", r"--set step: found no such field of rows, and no __step__ in a text; did you mean 'steps'"),
        ("steps", "--set: found 'steps', expected KEY=VALUE,VALUE"),
        ("steps=", "--set steps: found no values"),
        ("steps=2,0", "--set steps: found 0, expected a whole number of at least 1"),
        ("sampler=ddim,dim", '--set sampler: found text "dim", expected'),
        ("steps=2,2", "--set steps: found '2' twice"),
        (["steps=2", "steps=3"], "--set steps: found it twice"),
        ('steps="2', "not values with commas between them"),
        ("steps=@gone.txt", r"--set steps: no such text file: gone\.txt"),
        ([f"{key}={','.join(map(str, range(1, 400)))}" for key in ("steps", "seed")], "found 159,201 combinations"),
    ],
)
def test_a_grid_that_cannot_be_is_one_line(tmp_path, given, told):
    with pytest.raises(InputError, match=told):
        rows_of(tmp_path, '{"prompt": "a"}', set=given)


def test_a_bad_row_is_said_once_and_a_value_that_does_not_go_with_it_is_a_bad_cell(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "m.png")
    mask = tmp_path / "m.png"
    text = f'{{"prompt": "a"}}\n{{"prompt": "b", "seed": -9}}\n{{"prompt": "c", "mask": "{mask}", "image": "{mask}"}}\n'
    rows, bad = rows_of(tmp_path, text, set=f"mask={mask},")
    assert [(row.prompt, row.mask) for row in rows] == [("a", None)]
    label = read_axes(f"mask={mask},")[0].labels[0]
    assert [str(row).split(", expected")[0] for row in bad] == [
        f"p.jsonl:1 (mask {label}): mask: found a mask alone",
        "p.jsonl:2: seed: found -9",
        bad[2].where + ": " + bad[2].reason.split(", expected")[0],
    ]
    assert "in a row with --set mask, expected one of them" in bad[2].reason
    with pytest.raises(InputError, match="--seeds and --set seed: found both"):
        Config(seeds="1-3", set="seed=1,2")


def test_cells_of_a_grid_are_groups_of_their_own(tmp_path):
    text = '{"prompt": "a"}\n{"prompt": "b"}\n'
    rows, _ = rows_of(tmp_path, text, group_size=2, set="style_strength=0,1")
    (style,) = (m for m in Methods(Config(group_size=2)).all if m.name == "style_aligned")
    names = [style.group(row) for row in rows]
    assert names == ["0 (style_strength 0)", "0 (style_strength 1)"] * 2
    Image.new("RGB", (16, 16)).save(tmp_path / "r.png")
    rows, _ = rows_of(tmp_path, text, group_size=2, set="score_scale=1,2", reference=str(tmp_path / "r.png"))
    assert [row.where for row in rows].count("--reference") == 2


def test_the_command_line_takes_a_grid():
    assert parse(main, ["--set", "steps=2,4", "--set", 'prompt="a, b",c']).set == ["steps=2,4", 'prompt="a, b",c']
    (axis,) = read_axes("lora=,ink.safetensors")
    assert axis.labels == ("none", "ink.safetensors") and axis.values[0] is None


def test_a_labelled_sheet_for_each_two_keys_shows_each_cell_in_its_place(tmp_path):
    text = '{"prompt": "a"}\n{"prompt": "b"}\n'
    given = ["seed=3,9", "steps=2,4,2000", "guidance_scale=2,5"]  # of 2000 steps the model has none
    status, out = go(tmp_path, text, set=given)
    assert status == 2 and len(lines_of(out)) == 2 * (8 + 4)
    names = {path.name for path in out.glob("sheet_*.png")}
    assert names == {"sheet_seed_steps.png", "sheet_seed_guidance-scale.png", "sheet_steps_guidance-scale.png"}
    assert all(name in (out / "gallery.html").read_text() for name in names)
    with Image.open(out / "sheet_seed_steps.png") as image:
        seen = np.asarray(image.convert("RGB"))
    greys = {(seed * 7 + steps) % 256 for seed in (3, 9) for steps in (2, 4)} | {0xDD}  # and what is not drawn
    tops = {grey: tuple(int(x) for x in _square(seen, grey)) for grey in greys}
    (top, left), (top_4, _), (_, left_9) = tops[3 * 7 + 2], tops[3 * 7 + 4], tops[9 * 7 + 2]
    assert top_4 > top and left_9 > left and tops[9 * 7 + 4] == (top_4, left_9) and tops[0xDD][0] > top_4
    assert read_settings(out / "sheet_seed_steps.png", "jaxmix_sheet") == {"keys": ["seed", "steps"]}
    (out / "sheet_mine.png").write_bytes(b"mine")
    go(tmp_path, text, set="steps=2", overwrite=True)
    assert {path.name for path in out.glob("sheet_*.png")} == {"sheet_steps.png", "sheet_mine.png"}


def _square(seen, grey):
    """Return the upper left corner of the first square of a grey."""
    same = (seen == grey).all(-1)
    for top, left in np.argwhere(same):
        if same[top : top + 100, left : left + 100].all() and top + 100 <= len(same):
            return top, left
    raise AssertionError(f"no square of {grey}")
