"""infer.generate with prompts joined by AND: what is drawn, what is said, and where AND is a word."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import jaxmix
from infer.flags import Config
from infer.job import collect_rows, complete, draw
from infer.methods.method import BatchRows
from infer.methods.registry import Methods
from infer.png import read_settings
from tests.jobs import only, unmarked

AND = "a red car :1.1 AND a dog <b> :-0.5"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def read(tmp_path, rows, **flags):
    """Return the config, the methods, and the good and bad rows of a job."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(prompts=str(path), out=str(tmp_path / "out"), **{"steps": 2, "devices": 1, **flags})
    methods = Methods(config)
    return config, methods, *collect_rows(config, methods)


def test_composed_rows_are_drawn_said_and_kept(tiny_pipeline, tmp_path, capsys):
    rows = [
        {"prompt": AND, "seed": 3},
        {"prompt": AND, "seed": 3, "compose": "off"},
        {"prompt": "a boat AND AND fog"},
        {"prompt": "a boat AND fog", "seed": 4},
    ]
    config, methods, good, bad = read(tmp_path, rows)
    assert draw(config, good, bad, lambda: tiny_pipeline, None, methods) == 2
    said, out = capsys.readouterr(), tmp_path / "out"
    assert "bad row: rows.jsonl:3: prompt: found no text in part 2 of 3 of 'a boat AND AND fog'" in said.err
    for line in (
        "2 steps of ddim, 16x16, compose: 2 images in 1 batch of 2\n",
        "    rows.jsonl:1: 1.1 x 'a red car', -0.5 x 'a dog <b>'\n    rows.jsonl:4: 1 x 'a boat', 1 x 'fog'\n",
        "2 steps of ddim, 16x16: 1 images in 1 batch of 1\n",
    ):
        assert line in said.out
    got = {unmarked(p.name): np.asarray(Image.open(p), np.int16) for p in out.glob("0*.png")}
    prompts, method = jaxmix.ComposableDiffusion.parse([AND, "a boat AND fog"])
    drawn = tiny_pipeline.generate(prompts, [3, 4], 2, methods=(method,))
    np.testing.assert_array_equal(got["0000_seed3.png"], drawn[0])
    np.testing.assert_array_equal(got["0003_seed4.png"], drawn[1])
    np.testing.assert_array_equal(got["0001_seed3.png"], tiny_pipeline.generate([AND], [3], 2)[0])
    first, word = (read_settings(only(out, f"000{i}_seed3.png")) for i in (0, 1))
    assert (first["prompt"], first["method"], first["compose"]) == (AND, "compose", "on")
    assert word["prompt"] == AND and not {"method", "compose", "parts"} & {*word}
    page = (out / "gallery.html").read_text()
    assert "1.1 x &#x27;a red car&#x27;, -0.5 x &#x27;a dog &lt;b&gt;&#x27;" in page
    config, methods, good, bad = read(tmp_path, rows, resume=True, dry_run=True)
    assert draw(config, good, bad, lambda: tiny_pipeline, None, methods) == 2
    assert "plan: 0 images" in capsys.readouterr().out


def test_a_group_has_as_many_prompts_as_the_most_of_its_rows(tiny_pipeline, tmp_path):
    rows = [{"prompt": "a dog", "group": "g"}, {"prompt": AND, "group": "g"}, {"prompt": "a AND b AND c"}]
    _, methods, good, _ = read(tmp_path, rows)
    good, bad = complete(good, tiny_pipeline, methods)
    buckets = list(methods.buckets(good))
    assert not bad and [len(bucket.rows) for bucket in buckets] == [2, 1]
    batch = BatchRows(buckets[0].rows, [2], frozenset({"style_aligned", "compose"}), draft=True)
    made = next(one for m in methods.all if m.name == "compose" for one in m.build(tiny_pipeline, batch))
    assert made == jaxmix.ComposableDiffusion([[], ["a dog <b>"]], [[1.0], [1.1, -0.5]])


def test_the_longest_part_counts(tiny_pipeline, tmp_path):
    long = "a dog " * 40
    _, methods, good, _ = read(tmp_path, [{"prompt": f"a cat AND {long}:0.5"}, {"prompt": f"a cat AND {'b ' * 20}"}])
    made, _ = complete(good, tiny_pipeline, methods)
    assert [row.chunks for row in made] == [3, 1]
    _, bad = complete(good, tiny_pipeline, methods, max_chunks=2)
    assert [str(row).partition(": ")[2] for row in bad] == [
        "prompt: found 3 chunks of tokens, expected at most 2, the flag --max-chunks"
    ]


def test_the_flag_makes_and_a_word_but_for_rows_that_say_otherwise(tmp_path):
    _, methods, good, _ = read(tmp_path, [{"prompt": AND}, {"prompt": AND, "compose": "on"}], compose="off")
    assert [[method.name for method in methods.of(row)] for row in good] == [[], ["compose"]]
