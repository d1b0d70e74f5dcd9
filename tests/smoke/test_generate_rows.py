"""What a prompt file may say, and what is said about one that is wrong."""

import dataclasses

import pytest

from infer.flags import Config
from infer.generate import main
from infer.methods.registry import Methods
from infer.rows import BadRow, Defaults, Row, read_rows, rows_of_prompts
from jaxmix.command import parse
from jaxmix.types import InputError


def read(tmp_path, name, text, **defaults):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_rows(path, Defaults(**defaults))


def test_row_k_draws_with_base_seed_plus_k(tmp_path):
    rows, bad = read(tmp_path, "p.txt", "a cat\r\na dog\n\na fox\n", seed=10)
    assert [(row.number, row.prompt, row.seed) for row in rows] == [
        (0, "a cat", 10),
        (1, "a dog", 11),
        (3, "a fox", 13),
    ]
    assert bad == [BadRow(2, "p.txt:3", "empty line, expected a prompt")]


def test_a_row_of_jsonl_overrides_every_flag(tmp_path):
    text = (
        '{"prompt": "x"}\n{"prompt": "y", "negative_prompt": "n", "seed": 5, "steps": 3, "guidance_scale": 2, "id": 7}'
    )
    rows, bad = read(tmp_path, "p.jsonl", text, steps=9, guidance_scale=1.5, negative_prompt="blur")
    assert not bad
    assert rows[0] == Row(number=0, where="p.jsonl:1", prompt="x", negative_prompt="blur", steps=9, guidance_scale=1.5)
    assert rows[1] == Row(
        number=1, where="p.jsonl:2", prompt="y", negative_prompt="n", seed=5, steps=3, guidance_scale=2.0, id="7"
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "empty line, expected a JSON object"),
        ("{", "not JSON"),
        ("[1]", "found a list"),
        ('{"seed": 1}', "no field 'prompt'"),
        ('{"prompt": null}', "prompt: found null, expected text"),
        ('{"prompt": "x", "step": 3}', "unknown field 'step'; did you mean 'steps'?"),
        ('{"prompt": "x", "steps": 0}', "steps: found 0, expected a whole number of at least 1"),
        ('{"prompt": "x", "steps": 2.5}', "steps: found 2.5, expected a whole number of at least 1"),
        ('{"prompt": "x", "steps": true}', "found a truth value true"),
        ('{"prompt": "x", "seed": -2}', "seed: found -2, expected a whole number from 0 to"),
        ('{"prompt": "x", "seed": 1e400}', "seed: found inf, expected a whole number from 0 to"),
        ('{"prompt": "x", "seed": 18446744073709551616}', "or -1 for a fresh one"),
        ('{"prompt": "x", "guidance_scale": 1e308}', "guidance_scale: found 1e+308, expected a number that float32"),
        ('{"prompt": "x", "guidance_scale": 1' + "0" * 400 + "}", "guidance_scale: found 1000"),
        ('{"prompt": "x", "guidance_scale": 1' + "0" * 5000 + "}", "a number with thousands of digits"),
        ('{"prompt": "x", "seed": "7"}', 'found text "7"'),
        ('{"prompt": "x", "guidance_scale": NaN}', "guidance_scale: found nan, expected a number"),
        ('{"prompt": "\\ud800"}', "not text"),
        ('{"prompt": "x", "id": "first"}', "id: found 'first', which is already the id of p.jsonl:1"),
    ],
)
def test_a_bad_row_says_why_and_the_others_stay(tmp_path, line, reason):
    text = '{"prompt": "a", "id": "first"}\n' + line + '\n{"prompt": "c"}\n'
    rows, bad = read(tmp_path, "p.jsonl", text)
    assert [row.number for row in rows] == [0, 2]
    assert len(bad) == 1 and bad[0].where == "p.jsonl:2"
    assert reason in str(bad[0]) and "\n" not in str(bad[0])


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("p.txt", "", "is empty"),
        ("p.txt", b"caf\xe9\n", "not UTF-8 text (byte 3"),
        ("p.csv", "prompt,prompt\na cat,a dog\n", "expected one field name per column"),
        ("p.csv", "", "expected one field name per column"),
        ("p.xlsx", "a cat", "expected a .txt, .jsonl, .csv or .parquet"),
        ("p", "a cat", "no suffix"),
    ],
)
def test_a_file_of_no_use_is_one_error(tmp_path, name, text, found):
    with pytest.raises(InputError) as error:
        read(tmp_path, name, text)
    assert found in str(error.value) and name in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.txt: no such prompt file"):
        read_rows(tmp_path / "gone.txt", Defaults())


METHODS = Methods(Config())


def buckets(rows):
    """Return the rows of each bucket, where no row has a group."""
    held = [dataclasses.replace(row, extra=tuple((key, None) for key in METHODS.fields)) for row in rows]
    return [bucket.rows for bucket in METHODS.buckets(held)]


def test_buckets_hold_rows_of_equal_steps(tmp_path):
    text = '{"prompt": "a", "steps": 2}\n{"prompt": "b"}\n{"prompt": "c", "steps": 2}\n{"prompt": "d", "steps": 4}'
    rows, _ = read(tmp_path, "p.jsonl", text)
    held = [(part[0].steps, [row.prompt for row in part]) for part in buckets(row.complete(steps=4) for row in rows)]
    assert held == [(2, ["a", "c"]), (4, ["b", "d"])]


@pytest.mark.parametrize(
    "change",
    [
        {"sampler": "euler"},
        {"height": 64},
        {"guidance_rescale": 0.5},
        {"image": "a.png"},
        {"image": "a.png", "mask": "m"},
    ],
)
def test_a_row_that_needs_another_program_gets_a_bucket_of_its_own(change):
    row = Row(number=0, where="r:1", prompt="x", steps=4, guidance_scale=2.0)
    other = dataclasses.replace(row, number=1, **change)
    assert [len(part) for part in buckets([row, other, dataclasses.replace(row, seed=9, guidance_scale=3.0)])] == [2, 1]


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ('"sampler": "eular"', 'sampler: found text "eular", expected one of ddim, '),
        ('"height": 0', "height: found 0, expected a whole number of pixels"),
        ('"guidance_rescale": 1.5', "guidance_rescale: found 1.5, expected a number from 0 to 1"),
        ('"image": "gone.png"', "image: no such file: gone.png"),
        ('"mask": "%s"', "mask: found a mask alone, expected also the image to repaint"),
    ],
)
def test_the_new_fields_say_what_they_expect(tmp_path, field, reason):
    (tmp_path / "m.png").write_bytes(b"")
    text = '{"prompt": "x", ' + (field % (tmp_path / "m.png") if "%" in field else field) + "}"
    rows, bad = read(tmp_path, "p.jsonl", text)
    assert not rows and bad[0].reason.startswith(reason)


def test_an_empty_prompt_flag_is_a_bad_row():
    rows, bad = rows_of_prompts([" "], Defaults())
    assert not rows and str(bad[0]) == "--prompt: empty line, expected a prompt"


def test_a_table_holds_text_and_what_json_writes_and_an_empty_cell_names_nothing(tmp_path):
    text = 'prompt,seed,steps,id,labels,segments\r\n"a cat, asleep",7,,5,"color,light",\r\n'
    text += 'a dog,,3,,,"a dog @ 0,0,1,1"\r\n'
    path = tmp_path / "p.csv"
    path.write_bytes((text + "\r\nx,1,2,3,4,5,6\r\nx,seven\r\n").encode())
    rows, bad = read_rows(path, Defaults(steps=9), METHODS.fields)
    first, second = rows
    assert (first.prompt, first.seed, first.steps, first.id, first["labels"]) == (
        "a cat, asleep",
        7,
        9,
        "5",
        "color,light",
    )
    assert (second.seed, second.steps, second["labels"], second["segments"][0].box) == (1, 3, "all", (0, 0, 1, 1))
    assert first.named == {"prompt", "seed", "id", "labels"}
    assert [str(row) for row in bad] == [
        "p.csv:4: found 0 cells, expected one for each of the 6 columns",
        "p.csv:5: found 7 cells, expected one for each of the 6 columns",
        f'p.csv:6: seed: found text "seven", expected a whole number from 0 to {2**64 - 1}, or -1 for a fresh one',
    ]


def test_several_seeds_draw_each_row_with_each_of_them(tmp_path):
    seeds = parse(main, ["--seeds", "1-3,12"]).times
    rows, bad = read_rows(_file(tmp_path, '{"prompt": "x", "id": "a"}\n{"prompt": "y", "seed": 4}\n{"prompt": "z"}\n'),
                          Defaults(seed=0), None, seeds)  # fmt: skip
    assert [(row.number, row.prompt, row.seed, row.id) for row in rows] == [
        (0, "x", 1, "a"), (1, "x", 2, "a-2"), (2, "x", 3, "a-3"), (3, "x", 12, "a-4"),
        (8, "z", 1, None), (9, "z", 2, None), (10, "z", 3, None), (11, "z", 12, None),
    ]  # fmt: skip
    assert [str(row) for row in bad] == ["p.jsonl:2: seed: found 4 in a row with --seeds, expected one of them"]


def _file(tmp_path, text):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "8-1"], "--seeds: found the range 8-1, expected its lower end first"),
        (["--seeds", "1-"], "--seeds: found '1-', expected a seed or a range, as in 1-8,12"),
        (["--seeds", "1,2,1"], "--seeds: found 1 twice, expected each seed once"),
        (["--seeds", "0-99999999999999"], "found more than 100,000 seeds"),
        (["--seeds", "9" * 5000], "expected a whole number from 0 to"),
        (["--seeds", "1-8", "--seed", "3"], "--seeds and --seed: found both, expected one of them"),
        (["--seeds", "1-8", "--num-images", "3"], "--seeds and --num-images: found both"),
    ],
)
def test_what_is_no_list_of_seeds_is_one_line(arguments, words):
    with pytest.raises(InputError, match=words):
        parse(main, arguments)
