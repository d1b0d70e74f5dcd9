"""The folder of results: what goes on, what is refused, what damage costs, and that nothing is lost."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infer import manifest
from infer.flags import Config
from infer.folder import Folder
from infer.generate import main
from infer.job import collect_rows, draw, marked
from infer.manifest import Manifest, merge, read_records
from infer.methods.registry import Methods
from infer.png import read_settings, write_whole
from infer.rows import Defaults, rows_of_objects
from jaxmix import command
from jaxmix.types import InputError
from tests.jobs import only
from tests.smoke.test_generate import StandIn, lines_of


def go(tmp_path, text="a\nb\nc\n", pipe=None, name="p.txt", **settings):
    path = tmp_path / name
    path.write_text(text)
    config = Config(**{"prompts": str(path), "out": str(tmp_path / "out"), **settings})
    methods = Methods(config)
    rows, bad = collect_rows(config, methods)
    pipe = pipe or StandIn()
    return draw(config, rows, bad, lambda: pipe, None, methods), pipe, tmp_path / "out"


def seeds(pipe):
    return [seed for _, batch in pipe.calls for seed in batch]


# One folder, one job --------------------------------------------------------------------------------------------------


def test_the_same_command_goes_on_and_another_is_refused_by_name(tmp_path):
    _, _, out = go(tmp_path)
    only(out, "0001_seed1.png").unlink()
    _, pipe, _ = go(tmp_path, batch_size=3, strict=True)  # on which no picture depends
    assert set(seeds(pipe)) == {1}
    before = sorted(path.name for path in out.iterdir())
    for other in ({"seed": 5}, {"steps": 2}, {"guidance_scale": 1.0}, {"model": "other"}):
        with pytest.raises(
            InputError, match=r"found the pictures of another job there.*expected --overwrite.*--resume"
        ):
            go(tmp_path, **other)
    assert sorted(path.name for path in out.iterdir()) == before
    _, pipe, _ = go(tmp_path, seed=1, resume=True)  # row 0 has the seed of what was row 1, but is another row
    assert seeds(pipe) == [1, 2, 3] and len(list(out.glob("0*.png"))) == 6


def test_of_two_jobs_that_begin_at_once_the_second_is_refused(tmp_path):
    out = str(tmp_path / "out")
    first, second, same = (Folder(Config(prompt=prompt, out=out)) for prompt in "aba")  # none is there yet
    first.claim(), same.claim()
    with pytest.raises(InputError, match="another job has just begun there"):
        second.claim()


def test_overwriting_removes_what_jobs_wrote_and_nothing_else(tmp_path):
    _, _, out = go(tmp_path)
    old = only(out, "0000_seed0.png")
    mine = [out / "holiday.png", old.with_stem(f"{old.stem}_upscaled"), out / "0009_seed1_layout.png"]
    for path in mine:
        path.write_bytes(b"mine")
    shutil.copy(old, old.with_stem(f"{old.stem}_layout"))  # a picture beside a result
    _, pipe, _ = go(tmp_path, seed=7, overwrite=True)
    assert seeds(pipe) == [7, 8, 9] and len(lines_of(out)) == 3
    assert len(list(out.glob("0*.png"))) == 3 + 2 and all(path.read_bytes() == b"mine" for path in mine)
    with pytest.raises(InputError, match="--resume and --overwrite: found both"):
        Config(resume=True, overwrite=True)


def test_without_out_a_new_numbered_folder_is_taken_and_resume_finds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        go(tmp_path, out=None)
    assert {path.name for path in tmp_path.glob("gallery*")} == {"gallery", "gallery-2"}
    _, pipe, _ = go(tmp_path, out=None, resume=True)
    assert pipe.calls == []
    go(tmp_path, out=None, dry_run=True)
    assert not (tmp_path / "gallery-3").exists()
    with pytest.raises(InputError, match="--resume: found no folder gallery"):
        go(tmp_path, out=None, resume=True, steps=3)
    (tmp_path / "gallery-3").symlink_to(tmp_path / "gone")
    _, _, _ = go(tmp_path, out=None)
    assert (tmp_path / "gallery-4" / "gallery.html").exists()


@pytest.mark.parametrize("out", ["file:///tmp/x", "ftp://host/x", "gs:/b", "gs://", "", "a\0b"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--out: found"):
        go(tmp_path, out=out)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="which is a file"):
        go(tmp_path, out=str(tmp_path / "file"))
    assert {path.name for path in tmp_path.iterdir()} == {"p.txt", "file"}


# Fresh seeds ----------------------------------------------------------------------------------------------------------


def test_a_fresh_seed_is_drawn_once_for_a_folder_and_every_process_takes_it(tmp_path):
    text = '{"prompt": "a", "seed": -1}\n{"prompt": "b", "seed": 4}\n{"prompt": "c", "seed": -1}\n'
    _, pipe, out = go(tmp_path, text, name="p.jsonl")
    first, four, third = seeds(pipe)
    assert four == 4 and len({first, third, 4}) == 3 and min(first, third) >= 0 and max(first, third) < 2**32
    for path in out.glob("0000*.png"):
        path.unlink()
    _, again, _ = go(tmp_path, text, name="p.jsonl")
    assert set(seeds(again)) == {first}
    _, other, _ = go(tmp_path, text, name="p.jsonl", overwrite=True)
    assert set(seeds(other)) - {4} and not {first, third} & set(seeds(other))
    # Nothing is removed before the model is there.
    with pytest.raises(ZeroDivisionError):
        config = Config(prompts=str(tmp_path / "p.jsonl"), out=str(out), seed=-1, overwrite=True)
        methods = Methods(config)
        draw(config, *collect_rows(config, methods), lambda: 1 / 0, None, methods)
    assert len(list(out.glob("0*.png"))) == 3
    # Of processes that begin at once, all take the number of the one that was first.
    config = Config(prompt="x", seed=-1, out=str(tmp_path / "new"))
    folders = [Folder(config) for _ in range(8)]
    threads = [threading.Thread(target=folder.claim) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({folder._fresh for folder in folders}) == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["job.json"]


# Manifests ------------------------------------------------------------------------------------------------------------


def test_two_processes_at_once_lose_no_row(tmp_path):
    """Each writes a manifest of its own; what a process that is at work has written stays where it is."""
    program = (
        "import sys, time; from pathlib import Path; from infer.manifest import Manifest\n"
        "with Manifest(Path(sys.argv[1])) as m:\n"
        "    for i in range(40):\n"
        "        m.add_image(f'{sys.argv[2]}{i}.png', {'row': i}, {'width': 8, 'height': 8, 'bytes': 1})\n"
        "        time.sleep(0.002)\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), who]) for who in "abc"]
    while any(process.poll() is None for process in started):
        merge(tmp_path)
    assert [process.returncode for process in started] == [0, 0, 0]
    merge(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert {line["file"] for line in lines} == {f"{who}{i}.png" for who in "abc" for i in range(40)}
    assert [line["row"] for line in lines] == sorted(line["row"] for line in lines)


DAMAGE = [
    b'{"status": "ok"}',
    b'{"status": "ok", "file": ["x"]}',
    b'{"status": "ok", "file": "../../p.txt", "width": 1, "height": 1, "bytes": 1}',
    b'{"status": "ok", "file": "x.png", "width": "wide", "height": 1, "bytes": 1}',
    b'{"status": "ok", "file": "x.png", "width": 1e999, "height": NaN, "bytes": 1}',
    b'{"status": "ok", "file": "x.png", "width": 999999999999, "height": 1, "bytes": 1}',
    b'{"status": "error", "row": "0", "where": 1, "error": null}',
    b'{"status": "ok", "row": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b"\xff\xfe\x00{",
    b"null",
    b"[]",
    b"",
]


def test_a_damaged_manifest_costs_nothing_for_the_pictures_know_their_settings(tmp_path):
    _, _, out = go(tmp_path)
    (out / "manifest.jsonl").write_bytes(b"\n".join(DAMAGE))
    (out / "job.json").write_bytes(b'{"job": 3')
    _, pipe, _ = go(tmp_path, resume=True)
    assert pipe.calls == [] and len(lines_of(out)) == 3
    assert "manifest" in {path.stem for path in out.iterdir()} and (tmp_path / "p.txt").exists()
    go(tmp_path, overwrite=True)
    assert (tmp_path / "p.txt").exists()


def test_a_row_that_was_drawn_and_is_bad_now_is_an_error_until_it_is_drawn_again(tmp_path):
    texts = ['{"prompt": "a"}\n', "[]\n", '{"prompt": "a"}\n', "[]\n", '{"prompt": "b"}\n']
    for text, expected in zip(texts, ("ok", "error", "error", "error", "ok"), strict=True):
        _, _, out = go(tmp_path, f'{{"prompt": "x"}}\n{text}', name="p.jsonl")
        of_row = [line["status"] for line in lines_of(out) if line["row"] == 1]
        assert of_row[-1] == expected, text


def test_a_folder_that_is_no_jobs_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "job.json").write_text('{"name": "of another program"}')
    with pytest.raises(InputError, match="found the pictures of another job"):
        go(tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["job.json"]


def test_where_nothing_can_be_locked_the_files_of_all_processes_stay(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def unlocked(folder):
        yield False

    monkeypatch.setattr(manifest, "_locked", unlocked)
    with Manifest(tmp_path) as one, Manifest(tmp_path) as other:
        one.add_image("a.png", {"row": 1}, {"width": 1, "height": 1, "bytes": 3})
        other.add_image("b.png", {"row": 2}, {"width": 1, "height": 1, "bytes": 3})
    assert {record["file"] for record in read_records(tmp_path)} == {"a.png", "b.png"}
    monkeypatch.undo()
    merge(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.jsonl"] and len(lines_of(tmp_path)) == 2


def test_a_picture_of_a_group_depends_on_the_first_of_it(tmp_path):
    def marks(*prompts, **flags):
        rows = [{"prompt": prompt, "group": "g", "seed": 1} for prompt in prompts] + [{"prompt": "alone", "seed": 1}]
        methods = Methods(Config(**flags))
        read, _ = rows_of_objects([("r", row) for row in rows], Defaults(), methods.fields)
        return [row.mark for row in marked(read, methods, {})]

    first, other, last = marks("a", "b", "c"), marks("x", "b", "c"), marks("a", "b", "x")
    assert [a == b for a, b in zip(first, other, strict=True)] == [False, False, False, True]
    assert [a == b for a, b in zip(first, last, strict=True)] == [True, True, False, True]
    whole = [marks("a", "b", c, full=True) for c in "cx"]
    assert [a == b for a, b in zip(*whole, strict=True)] == [False, False, False, True]


def test_pictures_that_are_gone_or_damaged_stop_no_gallery(tmp_path):
    _, _, out = go(tmp_path)
    only(out, "0000_seed0.png").unlink()
    only(out, "0001_seed1.png").write_bytes(b"\x89PNG")
    pipe = Interrupted()
    pipe.calls = [None, None]  # interrupted at once
    status, _, _ = go(tmp_path, pipe=pipe)
    assert status == 130 and (out / "gallery.html").read_text().count("<article>") == 2
    assert go(tmp_path)[0] == 0 and (out / "gallery.html").read_text().count("<article>") == 3


def test_damaged_pictures_are_drawn_again_and_no_others(tmp_path):
    _, _, out = go(tmp_path, "a\nb\nc\nd\n")
    whole = only(out, "0000_seed0.png").read_bytes()
    only(out, "0000_seed0.png").write_bytes(whole[:-30])
    only(out, "0001_seed1.png").write_bytes(b"")
    from PIL.PngImagePlugin import PngInfo

    deep = PngInfo()
    deep.add_text("jaxmix", "[" * 50_000)
    Image.new("RGB", (4, 4)).save(only(out, "0002_seed2.png"), pnginfo=deep)
    assert read_settings(only(out, "0002_seed2.png")) is None
    _, pipe, _ = go(tmp_path, "a\nb\nc\nd\n")
    assert set(seeds(pipe)) == {0, 1, 2}
    assert only(out, "0000_seed0.png").read_bytes() == whole


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path):
    program = f"""
import sys
import resource
from tests.smoke.test_folder import StandIn, collect_rows, draw
from infer import manifest
from infer.flags import Config
from infer.methods.registry import Methods
from jaxmix.command import run
def main(config: Config) -> int:
    methods = Methods(config)
    rows, bad = collect_rows(config, methods)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({"{limit}"}, resource.RLIM_INFINITY))
    return draw(config, rows, bad, StandIn, None, methods)
run(main, ["--prompt", "x" * 400, "--out", sys.argv[1]])
"""
    for limit in (300, 1500):  # bytes of a file: job.json, a PNG, a line of the manifest or the gallery
        out = tmp_path / str(limit)
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", program.replace("{limit}", str(limit)), str(out)],
            capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
        assert "File too large" in line and str(out) in line and "Traceback" not in done.stderr
        assert not list(out.glob(".*")), "something half-written stayed"
        for path in out.glob("manifest*"):
            assert all(json.loads(text) for text in path.read_text().splitlines())
    with pytest.raises(OSError, match=r"No such file.*gone"):
        write_whole(tmp_path / "gone" / "x.png", b"x")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


# Interruptions and memory ---------------------------------------------------------------------------------------------


class Interrupted(StandIn):
    def draw(self, request, methods, mesh, tile, output):
        if len(self.calls) == 2:
            raise KeyboardInterrupt
        return super().draw(request, methods, mesh, tile, output)


def test_an_interrupted_job_writes_its_gallery_and_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    words = ["jaxmix", "generate", "--prompts", str(tmp_path / "p.txt"), "--overwrite", "true", "--batch-size=2"]
    monkeypatch.setattr(command, "_given", words)
    monkeypatch.chdir(tmp_path)
    status, _, _ = go(tmp_path, "\n".join("abcdefg"), Interrupted(), out=None, batch_size=2, overwrite=True)
    out = tmp_path / "gallery"
    assert status == 130 and len(list(out.glob("0*.png"))) == 4
    page = (out / "gallery.html").read_text()
    assert page.count("<article>") == 4 and "not drawn yet" in page
    said = capsys.readouterr().err.splitlines()[-1]
    again = f"jaxmix generate --prompts {tmp_path / 'p.txt'} --batch-size=2 --out gallery"
    assert said == f"interrupted after 4 of 7 images; go on with: {again}"
    status, pipe, _ = go(tmp_path, "\n".join("abcdefg"), out="gallery", batch_size=2)
    assert status == 0 and [len(batch) for _, batch in pipe.calls] == [2, 2]
    assert len(lines_of(out)) == 7


class Terminated(StandIn):
    def draw(self, request, methods, mesh, tile, output):
        if self.calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().draw(request, methods, mesh, tile, output)


def test_a_job_that_is_asked_to_end_finishes_the_batch_and_does_what_it_does_when_interrupted(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    status, _, out = go(tmp_path, "a\nb\nc\n", Terminated(), batch_size=1)
    assert status == 130 and "interrupted after 2 of 3 images; go on with:" in capsys.readouterr().err
    assert (out / "gallery.html").exists() and signal.getsignal(signal.SIGTERM) is before


def test_out_of_memory_halves_the_batches_once_and_then_gives_rows_up(tmp_path, capsys):
    pipe = StandIn()
    pipe.most = 2
    status, _, out = go(tmp_path, "\n".join("abcdefgh"), pipe, batch_size=4)
    assert status == 0 and [batch for _, batch in pipe.calls] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert "out of memory with 4 images at a time, trying 2" in capsys.readouterr().err
    pipe = StandIn()
    pipe.most = 1
    status, _, out = go(tmp_path, "\n".join("abc"), pipe, batch_size=4, seed=50, overwrite=True)
    assert status == 2 and [batch for _, batch in pipe.calls] == []
    assert [(line["status"], line["error"]) for line in lines_of(out)] == [
        ("error", "out of memory with 2 images at a time")
    ] * 3
    pipe.most = 8
    status, _, _ = go(tmp_path, "\n".join("abc"), pipe, batch_size=4, seed=50)
    assert status == 0 and {line["status"] for line in lines_of(out)} == {"ok"}


class Broken(StandIn):
    def decode(self, latents):
        made = super().decode(latents)
        made[1, 2, 2] = np.nan
        return made


def test_a_result_that_is_not_finite_is_an_error_of_its_row_and_no_black_picture(tmp_path, capsys):
    status, _, out = go(tmp_path, pipe=Broken())
    assert status == 2 and len(list(out.glob("0*.png"))) == 2
    (bad,) = (line for line in lines_of(out) if line["status"] == "error")
    assert bad["row"] == 1 and "not finite" in bad["error"]
    assert "bad row: p.txt:2: the result holds numbers that are not finite" in capsys.readouterr().err


def test_a_remainder_takes_the_size_that_is_compiled_already(tmp_path):
    _, _, out = go(tmp_path, "\n".join("abcdefgh"), batch_size=4)
    only(out, "0005_seed5.png").unlink()
    _, pipe, _ = go(tmp_path, "\n".join("abcdefgh"), batch_size=4)
    assert seeds(pipe) == [5, 5, 5, 5]


# What rows say --------------------------------------------------------------------------------------------------------


def test_an_empty_negative_prompt_is_a_prompt_and_null_is_none(tmp_path):
    text = "".join(
        json.dumps({"prompt": "x", **row}) + "\n"
        for row in ({"negative_prompt": ""}, {}, {"negative_prompt": None}, {"negative_prompt": "y"})
    )
    _, pipe, _ = go(tmp_path, text, name="p.jsonl")
    assert pipe.request.negatives == ["", None, None, "y"]
    assert go(tmp_path, text, name="p.jsonl", negative_prompt="z", overwrite=True)[1].request.negatives == [
        "",
        "z",
        "z",
        "y",
    ]


def test_several_images_of_a_prompt_count_their_seeds_up(tmp_path):
    text = '{"prompt": "a", "id": "k"}\n{"prompt": "b", "seed": 70}\nx\n'
    status, pipe, out = go(tmp_path, text, name="p.jsonl", num_images=3, seed=10, batch_size=6)
    assert status == 2 and seeds(pipe) == [10, 11, 12, 70, 71, 72]
    assert [line.get("id") for line in lines_of(out) if line["status"] == "ok"] == ["k", "k-2", "k-3", None, None, None]
    assert [line["row"] for line in lines_of(out)] == [0, 1, 2, 3, 4, 5, 6]


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    text = '{"prompt": "a", "seed": 7.0, "steps": 2.0, "height": 16.0}\n{"prompt": "a", "seed": 18446744073709551615}\n'
    _, pipe, out = go(tmp_path, text, name="p.jsonl")
    assert seeds(pipe) == [7, 2**64 - 1] and pipe.calls[0][0] == 2
    assert read_settings(only(out, "0000_seed7.png"))["seed"] == 7


def test_a_size_beyond_the_memory_is_a_bad_row_before_anything_is_made(tmp_path, capsys):
    rows = [{"prompt": "a", "height": 800000, "width": 800000}, {"prompt": "b", "height": 10**30}]
    rows.append({"prompt": "c", "height": 1e308, "width": 1e308})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="no row can be drawn"):
        main(Config(prompts=str(tmp_path / "p.jsonl"), out=str(tmp_path / "out")))
    said = capsys.readouterr().err
    assert "p.jsonl:1: height and width: found 800000 x 800000 pixels, which take at least" in said
    assert "GiB here (cpu)" in said and "p.jsonl:2: height" in said and "p.jsonl:3: height" in said
    assert not (tmp_path / "out").exists()


def test_the_lines_of_a_run_are_there_while_it_draws(tmp_path):
    with Manifest(tmp_path) as manifest:
        manifest.add_image("x.png", {"row": 1}, {"width": 1, "height": 1, "bytes": 3})
        merge(tmp_path)  # by another process
        assert [record["file"] for record in read_records(tmp_path)] == ["x.png"]
        assert not (tmp_path / "manifest.jsonl").exists()
    assert (tmp_path / "manifest.jsonl").exists() and len(list(tmp_path.iterdir())) == 1
