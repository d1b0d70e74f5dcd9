"""Processes that draw are killed, told to end, or out of disk: every picture is there once, and none half-written."""

import errno
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infer import drawing, hosts, leftovers
from infer.batches import share
from infer.flags import Config
from infer.folder import Folder
from infer.job import collect_rows, draw
from infer.methods.registry import Methods
from infer.rows import Defaults, rows_of_objects
from jaxmix import paths
from jaxmix.types import InputError
from tests.smoke.test_generate import StandIn, lines_of

ROOT = Path(__file__).parents[2]


def kill(*flags):
    """Return what `scripts.kills` found."""
    command = [sys.executable, "-m", "scripts.kills", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_five_kills_lose_no_picture_and_draw_none_twice():
    found = kill("--model", "none", "--rows", 30, "--kills", 5, "--batch-size", 4, "--devices", 1)
    assert found["faults"] == [] and found["pictures"] == 30
    assert set(found["kills"]) == {"clock", "picture", "between", "line", "merge"}


@pytest.mark.slow
def test_of_two_processes_one_is_killed_the_other_finishes_and_a_rerun_draws_what_one_process_draws():
    """Each has four devices; the one that is killed has JAX's coordination service. Bytes are compared."""
    found = kill("--rows", 24, "--kills", 1, "--batch-size", 4, "--processes", 2, "--seed", 1)
    assert found["faults"] == [] and found["pictures"] == 24 and found["kills"] == {"clock": 1}


# Which process draws what ---------------------------------------------------------------------------------------------


def rows_for(methods, count=23):
    objects = [
        ("r", {"prompt": f"p{i}", "seed": i, "steps": 2 + i % 3, "height": 16, "width": 16}) for i in range(count)
    ]
    return rows_of_objects(objects, Defaults(), methods.fields)[0]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_every_row_is_drawn_by_one_process_whatever_is_left_of_the_job(together, count):
    methods = Methods(Config())
    rows = rows_for(methods)
    for todo in (rows, rows[3:5], []):
        config, buckets = Config(batch_size=3), list(methods.buckets(rows))
        shares = [share(config, buckets, todo, 2, hosts.Hosts(k, count, together)) for k in range(count)]
        assert sorted(row.number for some in shares for row in some) == [row.number for row in todo]
        # Whole batches: of what is left where processes know it, of the whole job where they do not.
        if together and len(todo) < 6:
            assert sum(map(bool, shares)) <= max(1, min(count, 2))


def test_workers_draw_their_shares_into_one_folder_whenever_they_run(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("\n".join("abcdefgh"))
    drawn = []
    for worker in (2, 0, 1):
        config = Config(
            prompts=str(tmp_path / "p.txt"), out=str(tmp_path / "out"), worker=worker, workers=3, batch_size=2
        )
        methods, pipe = Methods(config), StandIn()
        load = functools.partial(lambda pipe: pipe, pipe)
        assert draw(config, *collect_rows(config, methods), load, None, methods, hosts.join(config)) == 0
        drawn += [seed for _, batch in pipe.calls for seed in batch]
    assert drawn == [4, 5, 0, 1, 6, 7, 2, 3]
    left = [line for line in capsys.readouterr().err.splitlines() if "left to the other workers" in line]
    assert left == ["6 images left to the other workers", "2 images left to the other workers"]
    assert len(lines_of(tmp_path / "out")) == 8
    assert (tmp_path / "out" / "gallery.html").read_text().count("<article>") == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"worker": 4, "workers": 4}, "--worker: found 4, expected 0 to 3 with --workers 4"),
        ({"worker": 1}, "--worker: found 1, expected 0 to 0 with --workers 1"),
        ({"workers": 0}, "--worker: found 0, expected --workers above 0"),
        ({"workers": 2}, "--workers: found no --out"),
        ({"workers": 2, "out": "x", "overwrite": True}, "--workers: found --overwrite"),
        ({"workers": 2, "out": "x", "distributed": True}, "--distributed and --workers: found both"),
        ({"engine": "ray", "distributed": True}, "--distributed and --engine ray: found both"),
        ({"resources": "GPU=1"}, "--resources: found 'GPU=1' without --engine ray"),
    ],
)
def test_a_job_is_split_in_one_way(flags, words):
    with pytest.raises(InputError, match=re.escape(words)):
        Config(**flags)


def test_processes_that_found_other_rows_draw_nothing(monkeypatch):
    answers = [{"rows": "3 rows (aaaa)"}, {"rows": "4 rows (bbbb)"}]
    monkeypatch.setattr(hosts, "_gather", lambda told: answers)
    two = hosts.Hosts(0, 2, together=True)
    words = "rows: process 1 of 2 found 4 rows (bbbb), expected what process 0 found: 3 rows (aaaa)"
    with pytest.raises(InputError, match=re.escape(words)):
        two.agreed(lambda: 1, lambda made: answers[0])
    answers[1] = {}  # it has failed
    with pytest.raises(InputError, match="process 1 of 2 cannot draw, and says why"):
        two.agreed(lambda: 1, lambda made: answers[0])
    with pytest.raises(ZeroDivisionError):  # and so has this one
        two.agreed(lambda: 1 / 0, lambda made: answers[0])


def test_a_folder_that_hosts_do_not_share_is_one_line(tmp_path):
    config = Config(prompt="x", out=str(tmp_path))
    first = Folder(config)
    first.claim()
    Folder(config, identity=first.identity).check_seen(0.0)
    with pytest.raises(InputError, match="found nothing of what process 0 has written there"):
        Folder(config, identity=(str(tmp_path), first.identity[1] + 1)).check_seen(0.0)


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_who_is_still_at_work_is_seen_in_the_folder(tmp_path, monkeypatch, place):
    tmp_path = tmp_path if place == "folder" else paths.place(f"memory://{tmp_path.name}/run")
    monkeypatch.setattr(hosts, "DEAD_AFTER", 0.3)
    one, two, three = (hosts.Presence(tmp_path, hosts.Hosts(k, 4, True), "run") for k in range(3))
    two._over.set()  # it dies; the fourth was never there
    two._thread.join()
    three.close()  # it ends
    one.end()
    began = time.monotonic()
    assert one.wait() == [1, 3] and time.monotonic() - began < 5
    one.clear()
    assert [name.split(".")[1] for name in paths.names(tmp_path)] == ["process-run-1"]
    assert three.wait(lambda: not three._seen) == [1, 3]  # the first has ended, and gone
    one.close()
    assert hosts.Hosts(0, 4, True).still_left([3, 5, 6, 7], [1], "CMD") == (
        "process 1 of 4 has died: 4 images left (rows 3, 5-7); go on with: CMD"
    )


def test_temporary_files_of_processes_that_have_ended_are_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = tmp_path / leftovers.temporary_name("a.png")
    dead = tmp_path / mine.name.replace(f"-{os.getpid()}-", f"-{gone.pid}-")
    near, old = (tmp_path / f".b.png.elsewhere-7-{digits}.tmp" for digits in ("aaaaaa", "bbbbbb"))
    others = [tmp_path / name for name in (".hidden", "x.tmp", ".x.tmp", "0001_seed1.png")]
    for path in (mine, dead, near, old, *others):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    leftovers.sweep(tmp_path)
    assert {*tmp_path.iterdir()} == {mine, near, *others}
    leftovers.sweep(tmp_path, own=True)
    assert {*tmp_path.iterdir()} == {near, *others}


# Told to end, and no room ---------------------------------------------------------------------------------------------

SLOW = """
import hashlib, os, signal, sys, threading
from infer import leaving
from infer.flags import Config
from infer.job import collect_rows, draw
from infer.methods.registry import Methods
from jaxmix.command import run
from tests.smoke.test_generate import StandIn
class Slow(StandIn):
    def draw(self, *arguments, **more):
        if self.calls:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)  # minutes, in which Python does nothing
        return super().draw(*arguments, **more)
def main(config: Config) -> int:
    leaving.GRACE = 0.5
    methods = Methods(config)
    return draw(config, *collect_rows(config, methods), Slow, None, methods)
run(main)
"""


def test_a_batch_that_takes_too_long_is_dropped_when_the_job_is_told_to_end(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\n")
    command = [sys.executable, "-c", SLOW, "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")]
    began = time.monotonic()
    done = subprocess.run([*command, "--batch-size", "2"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
    assert time.monotonic() - began < 50
    said = done.stderr.splitlines()[-1]
    assert said.startswith("told to end (SIGTERM), and 0.5 s were not enough") and "2 of 4 images are written" in said
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert sum(name.startswith("000") for name in names) == 2 and not any(name.startswith(".") for name in names)


class Full:
    """A disk that is full so many times."""

    def __init__(self, monkeypatch, times):
        self.times, self.write = times, drawing.write_whole
        monkeypatch.setattr(drawing, "write_whole", self)
        monkeypatch.setattr(drawing, "RETRIES", (0.0, 0.0))

    def __call__(self, path, content):
        self.times -= 1
        if self.times >= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self.write(path, content)


def test_a_disk_that_is_full_is_tried_again_and_then_said_with_what_is_safe(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    config = Config(prompts=str(tmp_path / "p.txt"), out=str(tmp_path / "out"), batch_size=1)

    def go():
        methods = Methods(config)
        return draw(config, *collect_rows(config, methods), StandIn, None, methods)

    full = Full(monkeypatch, 2)
    assert go() == 0 and capsys.readouterr().err.count("No space left on device, trying again") == 2
    for path in (tmp_path / "out").glob("000[12]*"):
        path.unlink()
    full.times = 99
    with pytest.raises(OSError, match="No space left on device"):
        go()
    assert "0 of 2 images are written; go on with:" in capsys.readouterr().err
    full.times = 0
    assert go() == 0 and len(lines_of(tmp_path / "out")) == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
