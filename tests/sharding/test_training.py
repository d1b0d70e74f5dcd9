"""Training on meshes and in two processes: the losses of one device, and only weights and sums between devices."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmix.models.layers import Linear
from jaxmix.sharding import fsdp_specs, place, rows_over, train_mesh
from jaxmix.tuning.devices import Stepper, training_devices
from jaxmix.tuning.fit import Hook
from jaxmix.tuning.update import TrainState, make_optimizer, make_update
from jaxmix.types import InputError
from tests.sharding import training_run

ROOT = Path(__file__).parents[2]
COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)
PLACES = {"one": {"devices": 1}, "data": {"devices": 8}, "fsdp": {"devices": 8, "fsdp": 2}}


def losses(folder):
    rows = map(json.loads, (folder / "logs" / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folders of whole runs on one device, 8 x 1 and 4 x 2; each keeps its states of steps 10 and 20."""
    root = tmp_path_factory.mktemp("runs")
    for name, where in PLACES.items():
        training_run.train(training_run.config(root / name, checkpointing_steps=10, **where))
    return root


@pytest.fixture(scope="module")
def processes(runs, tmp_path_factory):
    """Return the folders of runs by 2 processes x 4 devices: `whole`, `resumed` at step 10 from 8 x 1, and two
    that were told to stop."""
    root = tmp_path_factory.mktemp("processes")
    half_way(runs / "data", root / "resumed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.sharding.training_run", str(port)]
    # The device count is theirs to choose.
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    folders = [str(root / name) for name in ("whole", "resumed", "stopped", "long")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen([*command, str(i), *folders], cwd=ROOT, env=env, **pipes) for i in range(2)]
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return root, said


def half_way(source, folder):
    """Make `folder` a run that was killed after step 10 of the run in `source`."""
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "checkpoints" / "20")


@pytest.mark.parametrize("name", ["data", "fsdp"])
def test_eight_devices_have_the_losses_of_one(runs, name):
    one, eight = losses(runs / "one"), losses(runs / name)
    assert sorted(eight) == list(range(1, 21))
    assert one[20] < 0.9 * one[1]  # it learns
    np.testing.assert_allclose([eight[k] for k in one], list(one.values()), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_device(runs, processes):
    one, two = losses(runs / "one"), losses(processes[0] / "whole")
    np.testing.assert_allclose([two[k] for k in one], list(one.values()), rtol=1e-5)


def test_two_processes_go_on_from_the_state_of_eight_devices(runs, processes):
    one, two = losses(runs / "one"), losses(processes[0] / "resumed")
    np.testing.assert_allclose([two[k] for k in one], list(one.values()), rtol=1e-5)
    assert "resumed from step 10" in processes[1][0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), [("stopped", 12), ("long", 8)])
def test_processes_agree_on_the_step_at_which_one_was_told_to_stop_and_on_the_next_if_steps_are_long(
    processes, name, step
):
    root, (first, second) = processes  # both ended with status 0
    assert [path.name for path in (root / name / "checkpoints").iterdir() if path.name.isdigit()] == [str(step)]
    assert f"stopped at step {step} (SIGTERM), saved" in first
    assert "stopped" not in second


def test_only_the_first_process_speaks_and_logs(processes):
    root, (first, second) = processes
    assert "update compiled" in first
    assert "update compiled" not in second
    assert len((root / "whole" / "logs" / "metrics.jsonl").read_text().splitlines()) == 20


def test_one_device_goes_on_from_the_state_of_a_mesh(runs, tmp_path):
    half_way(runs / "fsdp", tmp_path / "run")
    state, _ = training_run.train(training_run.config(tmp_path / "run", devices=1))
    one, resumed = losses(runs / "one"), losses(tmp_path / "run")
    np.testing.assert_allclose([resumed[k] for k in one], list(one.values()), rtol=1e-5)
    assert int(state.step) == 20


def test_hooks_see_whole_weights_on_one_device(runs, tmp_path):
    seen = {}
    cfg = training_run.config(tmp_path, max_train_steps=1, **PLACES["fsdp"])
    state, _ = training_run.train(cfg, [Hook(1, lambda step, state: seen.update(state.averaged))])
    assert {name: leaf.shape for name, leaf in seen.items()} == {k: v.shape for k, v in state.params.items()}
    for leaf in [*seen.values(), *state.params.values()]:
        assert len(leaf.sharding.device_set) == 1


def test_layers_gather_their_own_weights_and_split_their_gradients():
    """As for a model that no device can hold whole: the numbers of one device, and no weight whole between steps."""
    model = Linear(64)
    cfg = training_run.config("unused", gradient_accumulation_steps=1)
    optimizer = make_optimizer(cfg)

    def loss_fn(params, frozen, batch, key):
        seen = batch["x"]
        for name in ("first", "second"):
            seen = jax.nn.silu(model.apply({"params": params["unet"][name]}, seen))
        return jnp.mean(jnp.square(seen - batch["y"])), {}

    update = make_update(loss_fn, optimizer, 0.0, by_layer=("unet",))
    rng = np.random.default_rng(0)
    shapes = {"kernel": (64, 64), "bias": (64,)}
    params = {
        name: {k: 0.2 * rng.standard_normal(s, np.float32) for k, s in shapes.items()} for name in ("first", "second")
    }
    batch = {name: rng.standard_normal((16, 64), np.float32) for name in "xy"}
    found = {}
    for fsdp, devices in ((1, jax.devices()[:1]), (4, jax.devices())):
        stepper = Stepper(update, devices, fsdp)
        state = stepper.place(TrainState.create(jax.tree.map(jnp.asarray, {"unet": params}), optimizer, ema=False))
        rows, key = stepper.rows(batch), stepper.key(0)
        compiled = stepper.compiled(state, {}, rows, key)
        for _ in range(3):
            state, metrics = compiled.run(state, {}, rows, key)
        found[fsdp] = stepper.whole(state, on_host=True).params, float(metrics["loss"])
        if fsdp > 1:
            assert {leaf.sharding.spec for leaf in jax.tree.leaves(state.params) if leaf.ndim == 2} == {P(None, "fsdp")}
            assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found[fsdp][0]))
            assert set(COLLECTIVE.findall(compiled.run.as_text())) >= {"all-gather"}
    np.testing.assert_allclose(found[4][1], found[1][1], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[4][0], jax.device_get(found[1][0]))


@pytest.mark.parametrize(("fsdp", "allowed"), [(1, {"all-reduce"}), (2, {"all-reduce", "all-gather"})])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_devices_exchange_sums_and_whole_weights_alone(fsdp, allowed, accumulate):
    cfg = training_run.config("unused", gradient_accumulation_steps=accumulate)
    state, update, frozen = training_run.parts(cfg)
    stepper = Stepper(update, jax.devices(), fsdp)
    state, frozen = stepper.place(state), stepper.place(frozen)
    rows = stepper.rows({"latents": next(training_run.batches(0))["latents"]})
    text = stepper.compiled(state, frozen, rows, stepper.key(0)).run.as_text()
    assert set(COLLECTIVE.findall(text)) == allowed
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
    assert set(gathered) <= {"64,64"}  # weights; activations have 8, 8 among their axes
    # At rest each device holds its share alone.
    assert frozen["mix"].addressable_data(0).shape == (64, 64 // fsdp)
    assert state.opt_state[1][0].mu["down"].addressable_data(0).shape == (64, 64 // fsdp)


def test_noise_does_not_depend_on_devices():
    mesh = train_mesh(2)
    draw = lambda key: jax.random.normal(key, (16, 8))  # noqa: E731
    split = jax.jit(draw, out_shardings=rows_over(mesh))(jax.random.key(3))
    np.testing.assert_array_equal(split, jax.jit(draw)(jax.random.key(3)))


def test_output_features_are_split_else_inputs_else_nothing():
    shapes = {
        "kernel": (3, 3, 64, 64),
        "out": (64, 65),
        "odd": (65, 67),
        "bias": (8192,),
        "small": (8, 8),
    }
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = fsdp_specs(tree, train_mesh(2))
    assert specs == {
        "kernel": P(None, None, None, "fsdp"),
        "out": P("fsdp"),
        "odd": P(),
        "bias": P(),
        "small": P(),
    }
    assert set(fsdp_specs(tree, train_mesh(1)).values()) == {P()}


def test_what_is_placed_keeps_its_values():
    mesh, tree = train_mesh(4), {"kernel": np.arange(64.0 * 64).reshape(64, 64), "bias": np.arange(3.0)}
    placed = place(tree, mesh, fsdp_specs(tree, mesh))
    jax.tree.map(np.testing.assert_array_equal, placed, tree)
    assert placed["kernel"].addressable_data(0).shape == (64, 16)


def test_devices_are_as_many_as_divide_the_rows():
    assert [len(training_devices(rows)) for rows in (1, 4, 6, 12, 16)] == [1, 4, 6, 6, 8]
    assert len(training_devices(6, fsdp=2)) == 6
    assert len(training_devices(16, devices=3 + 1)) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((16, 1, 9), "devices: found 9, expected 0"),
        ((12, 1, 8), "train_batch_size: found 12 rows per micro-batch"),
        ((16, 3, 8), "fsdp: found 3, expected a divisor of the 8 devices"),
        ((16, 0), "fsdp: found 0"),
        ((3, 2), "expected a multiple of fsdp = 2"),
    ],
)
def test_devices_that_do_not_fit_are_named(arguments, words):
    with pytest.raises(InputError, match=re.escape(words)):
        training_devices(*arguments)
