"""A run that is killed, stopped or damaged goes on to the same numbers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.sharding import fsdp_specs, place, train_mesh
from jaxmix.tuning.checkpoints import Checkpoints, DamagedError, digests
from jaxmix.tuning.logs import ScalarLog
from jaxmix.types import InputError

ROOT = Path(__file__).parents[2]
# Of several reads that fail at once orbax waits for the first; the others find its event loop closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def rows(folder):
    """Return the rows of the logs without what a clock decides."""
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in ("samples_per_second", "mfu")} for x in lines]


@pytest.mark.slow
def test_five_kills_at_random_steps_leave_the_weights_and_the_loss_curve_as_they_were(tmp_path):
    command = [sys.executable, "-m", "tests.tuning.killed_trainer", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("resumed from step") >= 3, done.stdout
    whole, parts = (np.load(tmp_path / f"{name}.npz") for name in ("whole", "parts"))
    assert whole.files
    for name in whole.files:
        np.testing.assert_array_equal(whole[name], parts[name])
    assert [row["step"] for row in rows(tmp_path / "whole")] == list(range(2, 37, 2))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder with the states of steps 2, 4 and 6, and how to make one."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=None)
    for step in (2, 4, 6):
        checkpoints.save(step, state(step), {"window": [step]})
    checkpoints.close()
    return folder


def state(step):
    return {"w": jnp.full((64, 32), 1.0 / step), "n": jnp.asarray(step, jnp.int32), "half": jnp.ones(7, jnp.bfloat16)}


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def damage(path):
    """Cut off half of every data file of a checkpoint."""
    files = [f for f in (path / "default").rglob("*") if f.is_file() and f.parent.name == "d"]
    assert files
    for file in files:
        os.truncate(file, file.stat().st_size // 2)


def test_a_sound_checkpoint_comes_back_with_what_was_saved_beside_it(folder):
    checkpoints = Checkpoints(folder)
    step, restored, extra, remarks = checkpoints.resume("latest", state(1))
    checkpoints.close()
    assert (step, extra, remarks) == (6, {"window": [6]}, [])
    jax.tree.map(np.testing.assert_array_equal, restored, state(6))


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(folder):
    damage(folder / "6")
    checkpoints = Checkpoints(folder, keep=None)
    step, restored, _, remarks = checkpoints.resume("latest", state(1))
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, restored, state(4))
    assert f"{folder / '6'}: damaged" in remarks[0]
    checkpoints.save(6, state(6))  # its place is free again
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir() if path.name.isdigit()) == ["2", "4", "6"]
    assert [path.name for path in (folder.parent / "checkpoints-aside").iterdir()] == ["6"]


def test_a_wanted_step_that_is_damaged_is_one_line(folder):
    damage(folder / "6")
    checkpoints = Checkpoints(folder)
    with pytest.raises(InputError, match=r"6: damaged") as caught:
        checkpoints.resume("6", state(1))
    checkpoints.close()
    assert "\n" not in str(caught.value)


def test_values_that_read_well_but_differ_are_damage(folder, monkeypatch):
    checkpoints = Checkpoints(folder)
    read = checkpoints._manager.restore
    other = lambda *a, **k: (lambda s: {**s, "w": s["w"].at[3, 5].add(1e-7)})(read(*a, **k))  # noqa: E731
    monkeypatch.setattr(checkpoints._manager, "restore", other)
    with pytest.raises(DamagedError, match=r"1 array\(s\) not as saved, .*'w'"):
        checkpoints.restore(6, state(1))
    checkpoints.close()


def test_if_nothing_is_sound_the_run_does_not_start_anew_by_itself(folder):
    for step in (2, 4, 6):
        damage(folder / str(step))
    checkpoints = Checkpoints(folder)
    with pytest.raises(InputError, match="none is intact"):
        checkpoints.resume("latest", state(1))
    checkpoints.close()


@pytest.mark.parametrize(("wanted", "left", "moved"), [("4", ["2", "4"], ["6"]), ("none", [], ["2", "4", "6"])])
def test_going_back_moves_later_checkpoints_aside(folder, wanted, left, moved):
    checkpoints = Checkpoints(folder)
    checkpoints.resume(wanted, state(1))
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir() if path.name.isdigit()) == left
    assert sorted(path.name for path in (folder.parent / "checkpoints-aside").iterdir()) == moved


def test_digests_see_bits_and_places_and_not_devices():
    rng = np.random.default_rng(0)
    tree = {"w": jnp.asarray(rng.normal(size=(64, 66)), jnp.float32), "n": jnp.asarray(3)}
    mesh = train_mesh(2)
    assert digests(place(tree, mesh, fsdp_specs(tree, mesh))) == digests(tree)
    for other in (tree["w"][::-1], tree["w"].at[63, 65].multiply(1 + 2e-7), -tree["w"], tree["w"].T):
        assert digests({**tree, "w": other})["['w']"] != digests(tree)["['w']"]


def test_logs_of_a_resumed_run_hold_no_later_row_and_no_torn_line(tmp_path):
    log = ScalarLog(tmp_path)
    for step in (2, 4, 6):
        log.write(step, {"loss": step / 10})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as lines:
        lines.write('{"step": 8, "lo')
    ScalarLog(tmp_path, 4).close()
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == [{"step": 2, "loss": 0.2}, {"step": 4, "loss": 0.4}]
