"""Results in a bucket, by the real clients against servers on this machine: nothing lost, and said in one line."""

import json

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from infer.flags import Config
from infer.hosts import Hosts, Presence
from infer.job import collect_rows, draw
from infer.manifest import Manifest
from infer.methods.registry import Methods
from infer.overview import Config as Overview
from infer.overview import main as overview
from jaxmix import paths
from jaxmix.types import InputError
from tests.jobs import unmarked
from tests.smoke.test_generate import StandIn


def go(tmp_path, out, text="a\nb\nc\n", **settings):
    (tmp_path / "p.txt").write_text(text)
    config = Config(**{"prompts": str(tmp_path / "p.txt"), "out": out, **settings})
    methods = Methods(config)
    rows, bad = collect_rows(config, methods)
    pipe = StandIn()
    status = draw(config, rows, bad, lambda: pipe, None, methods)
    return status, sorted({seed for _, batch in pipe.calls for seed in batch})


def there(out):
    return {unmarked(name): size for name, size in paths.sizes(paths.place(out)).items()}


def test_a_job_in_a_bucket_goes_on_refuses_others_and_shows_all(tmp_path, bucket):
    out = f"{bucket}/runs/one"
    assert go(tmp_path, out) == (0, [0, 1, 2])
    names = there(out)
    assert {"0000_seed0.png", "0002_seed2.png", "job.json", "manifest.jsonl", "gallery.html", "contact_sheet.png"} < {
        *names
    }
    place = paths.place(out)
    gone = next(name for name in paths.names(place) if name.startswith("0001"))
    paths.remove(place / gone)
    assert go(tmp_path, out) == (0, [1])
    assert go(tmp_path, out) == (0, [])
    with pytest.raises(InputError, match=r"found the pictures of another job there.*--resume"):
        go(tmp_path, out, seed=5)
    assert go(tmp_path, out, "a\nb\nc\nd\n", resume=True) == (0, [3])
    lines = [json.loads(line) for line in paths.read(place / "manifest.jsonl").decode().splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 2, 3]
    assert paths.read(place / "gallery.html").count(b"<article>") == 4
    assert not [name for name in paths.names(place) if name.endswith(".tmp")]
    paths.write(place / "mine.png", b"mine")
    assert go(tmp_path, out, seed=7, overwrite=True) == (0, [7, 8, 9])
    assert sum(name.startswith("000") for name in there(out)) == 3 and "mine.png" in there(out)


def test_lines_of_a_killed_process_cost_no_picture(tmp_path, bucket, monkeypatch):
    out = f"{bucket}/killed"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("infer.manifest.Manifest.close", lambda self: 1 / 0)
        go(tmp_path, out)
    assert "manifest.jsonl" not in there(out) and len([n for n in there(out) if n.endswith(".png")]) == 3
    assert go(tmp_path, out) == (0, [])  # found by what the pictures hold
    assert len(paths.read(paths.place(out) / "manifest.jsonl").splitlines()) == 3


def test_what_fails_for_a_moment_is_tried_again_and_what_fails_for_good_is_one_line(tmp_path, monkeypatch):
    real, asked = MemoryFileSystem.pipe_file, []

    def fails(fs, path, value, **how):
        asked.append(path)
        if asked.count(path) <= 2 or ("0001" in path and broken):
            raise OSError("connection reset by peer")
        return real(fs, path, value, **how)

    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", fails)
    broken = False
    assert go(tmp_path, "memory://b/one") == (0, [0, 1, 2])
    broken = True
    with pytest.raises(InputError, match=r"memory://b/two/0001.*4 times over \(OSError: connection reset"):
        go(tmp_path, "memory://b/two")
    broken = False
    assert go(tmp_path, "memory://b/two", batch_size=1)[1] == [1]  # the rest was safe


def test_a_listing_that_is_late_costs_nothing(tmp_path, monkeypatch):
    go(tmp_path, "memory://b/late")
    real = paths.sizes
    monkeypatch.setattr(paths, "sizes", lambda folder: {k: v for k, v in real(folder).items() if "0001" not in k})
    assert go(tmp_path, "memory://b/late") == (0, [])


def test_a_bucket_that_cannot_be_written_is_one_line_before_a_model_is_loaded(tmp_path, bucket):
    scheme = bucket.partition("://")[0]
    nowhere = {"gs": "gs://no-such-bucket/x", "s3": "s3://no-such-bucket/x", "memory": "hf://owner/name/x"}[scheme]
    for dry in (False, True):
        methods = Methods(config := Config(prompt="a", out=nowhere, dry_run=dry))
        with pytest.raises(InputError, match=rf"^--out: {nowhere}: (no such bucket|found a place that is only read)"):
            draw(config, *collect_rows(config, methods), lambda: 1 / 0, None, methods)


def test_an_overview_of_a_bucket_and_signs_of_life_in_it_are_those_of_a_folder(tmp_path, bucket):
    out = f"{bucket}/overview"
    go(tmp_path, out, set="steps=2,4")
    place = paths.place(out)
    paths.remove(place / "gallery.html")
    assert overview(Overview(out)) == 0
    assert paths.read(place / "gallery.html") is not None and "sheet_steps.png" in paths.names(place)
    hosts = [Hosts(k, 2, together=True) for k in range(2)]
    first, second = (Presence(place, one, "run") for one in hosts)
    assert set(first._found()) == {0, 1}
    second.end()
    assert first.wait() == []
    second.close(), first.close(), first.clear()
    assert not [name for name in paths.names(place) if name.endswith(".tmp")]


def test_processes_that_end_at_once_are_all_in_the_manifest(monkeypatch):
    place = paths.place("memory://b/many")
    made = [Manifest(place) for _ in range(4)]
    extra = {"width": 1, "height": 1, "bytes": 1}
    for k, one in enumerate(made):
        one.add_image(f"{k:04d}_seed0.png", {"row": k}, extra)
    real = paths.write

    def late(path, content, create=False):
        if path.name == "manifest.jsonl" and made:
            made.pop().close()  # another ends after this one has looked, and before it writes
        real(path, content, create)

    monkeypatch.setattr(paths, "write", late)
    made.pop().close()
    while made:
        made.pop().close()
    lines = [json.loads(line) for line in paths.read(place / "manifest.jsonl").decode().splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 2, 3]
