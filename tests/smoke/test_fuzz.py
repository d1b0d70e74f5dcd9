"""Whatever people bring: rows, manifests, pictures and flags made at random end in a result or in one clear error.

`JAXMIX_FUZZ=10` makes ten times as many cases.
"""

import io
import json
import os
import random
import string

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from infer.flags import Config
from infer.job import collect_rows, draw
from infer.methods.registry import Methods
from infer.rows import FIELDS
from jaxmix import pictures
from jaxmix.command import parse
from jaxmix.types import InputError
from tests.smoke.test_folder import DAMAGE, go
from tests.smoke.test_generate import StandIn

TIMES = int(os.environ.get("JAXMIX_FUZZ", "1"))
QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": TIMES == 1, "database": None}
NUMBERS = [0, 1, -1, 7.0, 2**31, 2**32, 2**64, 10**30, 10**400, 1e308, -1e-320, 0.5, 8, 64, 800000]
TEXTS = [
    "",
    " ",
    "a cat",
    "a AND b :0.5",
    "AND",
    "a AND",
    ":",
    "7",
    "NaN",
    "null",
    "[]",
    "a @ 0,0,1,1",
    "x:0.8",
    "../x",
    "\0",
]
TEXTS += [
    "all",
    "none",
    "euler",
    "paint",
    "dense",
    "猫🐱",
    "\u2028",
    "a" * 3000,
    "a; b",
    "a cat @ 0,0,1,1:nan",
    "mini-vmix",
]
scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.floats(), st.integers(-(2**70), 2**70),
    st.sampled_from(TEXTS), st.text(max_size=12),
)  # fmt: skip
KEYS = st.one_of(st.sampled_from(["phrase", "box", "polygon", "mask", "weight"]), st.text(max_size=5))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)
ALL = [*FIELDS, *Methods(Config()).fields]
objects = st.dictionaries(st.sampled_from(ALL), values, max_size=5)


def in_one_line(error):
    text = str(error)
    assert text and "\n" not in text and len(text) < 5000, text[:200]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(path / "p.png")
    return path


def check_rows(folder, pipe, name, content):
    """Read a file of rows and go as far as the plan: every row is good, or bad for a reason in one line."""
    (folder / name).write_bytes(content)
    config = Config(prompts=str(folder / name), out=str(folder / "out"), dry_run=True)
    methods = Methods(config)
    try:
        rows, bad = collect_rows(config, methods)
        for row in bad:
            in_one_line(row)
        draw(config, rows, bad, lambda: pipe, None, methods)
    except InputError as error:
        in_one_line(error)


@settings(max_examples=300 * TIMES, **QUICK)
@given(st.lists(objects, min_size=1, max_size=3), st.booleans())
def test_rows_of_any_values_are_drawn_or_refused(folder, tiny_pipeline, rows, prompted):
    rows = [{"prompt": "a cat by the sea", **row} if prompted else row for row in rows]
    text = "\n".join(json.dumps(row) for row in rows)  # with NaN and Infinity, as Python writes them
    check_rows(folder, tiny_pipeline, "p.jsonl", text.encode("utf-8", "surrogatepass"))


@settings(max_examples=200 * TIMES, **QUICK)
@given(st.sampled_from([".txt", ".jsonl", ".csv"]), st.one_of(st.binary(max_size=60), st.text(max_size=60)))
@example(".jsonl", b"\xef\xbb\xbf{}")
@example(".csv", 'prompt,seed\n"a\nb",1\n"')
@example(".csv", "prompt\n\0")
def test_files_of_any_bytes_are_read_or_refused(folder, tiny_pipeline, kind, content):
    content = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    check_rows(folder, tiny_pipeline, f"p{kind}", content)


lines = st.one_of(
    st.sampled_from(DAMAGE),
    st.binary(max_size=40),
    st.dictionaries(
        st.sampled_from(["status", "file", "row", "bytes", "width", "height", "error", "where"]), values
    ).map(lambda held: json.dumps({"status": "ok", **held}).encode("utf-8", "surrogatepass")),
)


@settings(max_examples=60 * TIMES, **QUICK)
@given(st.lists(lines, max_size=5), st.lists(lines, max_size=2), st.one_of(values, st.none()))
def test_no_manifest_stops_a_job_or_loses_a_picture(tmp_path_factory, merged, part, job):
    folder = tmp_path_factory.mktemp("m")
    out = folder / "out"
    out.mkdir()
    (out / "manifest.jsonl").write_bytes(b"\n".join(merged))
    (out / "manifest-x-1.jsonl").write_bytes(b"\n".join(part))
    (out / "job.json").write_text(json.dumps({"job": "0", "fresh": 1, "command": job}), errors="replace")
    status, _, _ = go(folder, "a\nb\n", StandIn(), resume=True)
    assert status == 0 and len(list(out.glob("0*.png"))) == 2
    held = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert sum(record["status"] == "ok" and record["file"].startswith("000") for record in held) >= 2


def damaged(kind, seed):
    """Return a small picture of a kind with some bytes changed, lost or repeated."""
    rng = random.Random(seed)
    modes = {
        "PNG": ["RGB", "RGBA", "P", "I;16", "1"],
        "JPEG": ["RGB", "L", "CMYK"],
        "WEBP": ["RGB"],
        "TIFF": ["F", "RGB"],
    }
    modes |= {"GIF": ["P"], "BMP": ["RGB"]}
    file = io.BytesIO()
    Image.new(rng.choice(modes[kind]), (9, 7), 77).save(file, kind)
    content = bytearray(file.getvalue())
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(content))
        match rng.randrange(4):
            case 0:
                content[at] = rng.randrange(256)
            case 1:
                del content[at:]
            case 2:
                content[at:at] = content[at : at + rng.randrange(40)]
            case _:
                content[at : at + 4] = b"\xff\xff\xff\xff"
        if not content:
            break
    return bytes(content)


@settings(max_examples=380 * TIMES, **QUICK)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"]), st.integers(0, 2**32), st.booleans())
def test_damaged_pictures_are_read_or_refused(folder, kind, seed, mask):
    path = folder / "damaged"
    path.write_bytes(damaged(kind, seed))
    try:
        pictures.load(path, mask=mask)
    except pictures.UnreadableError as error:
        in_one_line(error)


def _main(config: Config) -> None: ...


_main.__annotations__ = {"config": Config, "return": None}
NAMES = ["steps", "seed", "lora", "W", "resume", "adain", "guidance-scale", "config"]
flags = st.one_of(
    st.sampled_from([f"--{name}" for name in NAMES]),
    st.sampled_from(TEXTS), st.sampled_from([str(n) for n in NUMBERS]),
    st.text(string.printable, max_size=8).map(lambda text: f"--{text}"),
)  # fmt: skip


@settings(max_examples=60 * TIMES, **QUICK)
@given(st.lists(flags, max_size=5))
def test_flags_of_any_kind_are_taken_or_refused(words):
    try:
        parse(_main, words)
    except InputError as error:
        in_one_line(error)
    except SystemExit as end:  # --help
        assert end.code in (0, None)
