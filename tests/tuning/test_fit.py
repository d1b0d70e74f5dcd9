import hashlib
import json
import os
import re
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmix.signals import heard
from jaxmix.tuning.checkpoints import Checkpoints
from jaxmix.tuning.data import iterate, make_dataset
from jaxmix.tuning.devices import Stepper
from jaxmix.tuning.fit import FitConfig, Hook, fit, mean_metrics
from jaxmix.tuning.update import TrainState, make_optimizer, make_update
from jaxmix.types import InputError


class Points:
    def __len__(self):
        return 32

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        return {"x": rng.normal(size=3).astype(np.float32), "y": rng.normal(size=2).astype(np.float32)}


def loss_fn(params, frozen, batch, key):
    noise = 0.1 * jax.random.normal(key, batch["y"].shape)
    layer = params["block.0"]["to_out.0"]  # dots as in the models' trees
    error = batch["x"] @ layer["kernel"] + layer["bias"] - batch["y"] + noise
    return jnp.mean(error**2), {"bin_sum": jnp.ones(4), "bin_count": jnp.ones(4)}


def config(folder, **changes):
    base = {"output_dir": str(folder), "devices": 1, "train_batch_size": 4, "max_train_steps": 6, "log_steps": 2}
    return FitConfig(**{**base, "learning_rate": 0.1, "checkpointing_steps": 0, "ema_decay": 0.9, **changes})


def train(cfg, loss=loss_fn, hooks=(), name_rows=False, zero_at=0):
    params = {"block.0": {"to_out.0": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}}
    optimizer = make_optimizer(cfg)
    dataset = make_dataset(Points(), cfg.train_batch_size, cfg.seed)
    update = make_update(loss, optimizer, cfg.ema_decay)
    state = TrainState.create(params, optimizer)

    def batches(step):
        for k, batch in enumerate(iterate(dataset, step), step + 1):
            names = {"id": np.array([f"{k}-{i}.png" for i in range(4)])} if name_rows else {}
            yield {**batch, "y": batch["y"] * (k != zero_at), **names}

    return fit(cfg, state, update, {}, batches, hooks)


def assert_equal_states(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_resumed_run_ends_in_the_same_bits_as_an_unbroken_one(tmp_path):
    whole, complete = train(config(tmp_path / "whole"))
    assert complete

    def stop_at_three(step, state):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    part, complete = train(config(tmp_path / "parts"), hooks=[Hook(1, stop_at_three)])
    assert not complete
    assert int(part.step) == 4  # the step in flight is finished and saved
    resumed, complete = train(config(tmp_path / "parts"))
    assert complete
    assert_equal_states(resumed, whole)


def test_after_sigterm_the_state_is_saved_and_nothing_else_is_written(tmp_path):
    """A machine that is taken away leaves seconds; Ctrl-C and a time limit leave all the time there is."""
    for number, runs in ((signal.SIGTERM, []), (signal.SIGINT, [3])):
        seen = []
        hooks = [Hook(0, lambda step, state, seen=seen: seen.append(step)), Hook(1, send_at_two(number), at_end=False)]
        state, complete = train(config(tmp_path / number.name), hooks=hooks)
        assert (int(state.step), complete) == (3, False)
        assert seen == runs and (tmp_path / number.name / "checkpoints" / "3").is_dir()


class Compiling:
    """An update whose compilation is told to stop, and takes until then."""

    def __init__(self, left):
        self.left = left

    def trace(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        assert self.left.wait(10)
        raise KeyboardInterrupt


def test_sigterm_ends_a_run_that_is_still_compiling_at_once(tmp_path, monkeypatch, capsys):
    left = threading.Event()
    monkeypatch.setattr("jaxmix.tuning.fit.os._exit", lambda status: left.set() if status == 0 else None)
    cfg = config(tmp_path)
    state = TrainState.create({"w": jnp.ones(3)}, make_optimizer(cfg))
    with pytest.raises(KeyboardInterrupt):
        fit(cfg, state, Compiling(left), {}, lambda step: iter([{"x": np.ones((4, 3))}]))
    assert capsys.readouterr().out.startswith("stopped (SIGTERM) while the update compiled, with nothing new to save")


def test_a_signal_is_heard_while_the_main_thread_is_outside_python():
    came, before = [], signal.signal(signal.SIGTERM, lambda *_: came.append("handler"))
    try:
        with heard(lambda number: came.append(number)):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)  # as long as a compilation, to Python
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM, "handler"]
    assert signal.set_wakeup_fd(-1) == -1  # as it was


def send_at_two(number):
    return lambda step, state: os.kill(os.getpid(), number) if step == 2 else None


def test_a_resumed_run_compiles_the_program_that_the_first_compiled(tmp_path, monkeypatch):
    """On an accelerator that program takes minutes, and the compile cache has it."""
    programs = []

    def compile_noted(self, state, frozen, batch, key):
        programs.append(self._update.trace(state, frozen, batch, key).lower().as_text())
        return compile_as_before(self, state, frozen, batch, key)

    compile_as_before = Stepper._compile
    monkeypatch.setattr(Stepper, "_compile", compile_noted)
    train(config(tmp_path, checkpointing_steps=3))
    train(config(tmp_path, resume_from_checkpoint="3"))
    assert len(programs) == 2 and programs[0] == programs[1]


def test_saving_does_not_see_later_steps(tmp_path):
    cfg = config(tmp_path, checkpointing_steps=2, checkpoints_total_limit=10)
    seen = {}
    train(cfg, hooks=[Hook(2, lambda step, state: seen.update({step: jax.tree.map(np.array, state)}))])
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (2, 4, 6):
        restored = checkpoints.restore(step, jax.tree.map(jnp.asarray, seen[step]))
        assert_equal_states(restored, seen[step])
    checkpoints.close()


def test_time_limit_stops_and_saves(tmp_path):
    state, complete = train(config(tmp_path, max_seconds=1e-9))
    assert (int(state.step), complete) == (1, False)
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_resume_choices(tmp_path):
    train(config(tmp_path, checkpointing_steps=2, checkpoints_total_limit=10))
    with pytest.raises(InputError, match=r"no step 5 .*2, 4, 6"):
        train(config(tmp_path, resume_from_checkpoint="5"))
    with pytest.raises(InputError, match="newest"):
        train(config(tmp_path, resume_from_checkpoint="newest"))
    steps = []
    train(config(tmp_path, resume_from_checkpoint="4"), hooks=[Hook(1, lambda step, state: steps.append(step))])
    assert steps == [5, 6]


def test_a_checkpoint_of_another_model_is_one_line(tmp_path):
    train(config(tmp_path))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    optimizer = optax.sgd(0.1)
    with pytest.raises(InputError, match="another model") as caught:
        checkpoints.restore(6, TrainState.create({"other": jnp.ones(2)}, optimizer))
    assert "\n" not in str(caught.value)
    checkpoints.close()


def test_a_loss_that_is_not_finite_stops_with_the_step_named_and_nothing_saved(tmp_path):
    def broken(params, frozen, batch, key):
        loss, metrics = loss_fn(params, frozen, batch, key)
        return jnp.where(params["block.0"]["to_out.0"]["bias"][0] != 0.0, jnp.nan, loss), metrics

    with pytest.raises(InputError, match="step 2: loss is nan; last good checkpoint: none") as caught:
        train(config(tmp_path, checkpointing_steps=2), broken)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == []


def test_a_loss_that_is_not_finite_names_the_rows_and_the_last_good_checkpoint(tmp_path):
    def broken(params, frozen, batch, key):
        loss, metrics = loss_fn(params, frozen, batch, key)
        return loss / (batch["y"][0, 0] != 0.0), metrics

    with pytest.raises(InputError) as caught:
        train(config(tmp_path, checkpointing_steps=1), broken, name_rows=True, zero_at=4)
    assert "step 4 (rows 4-0.png, 4-1.png, 4-2.png, 4-3.png): loss is inf" in str(caught.value)
    assert f"last good checkpoint: {tmp_path / 'checkpoints' / '3'};" in str(caught.value)


def test_logs_hold_means_learning_rate_and_samples(tmp_path):
    train(config(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[-1]["samples"] == 24
    assert rows[0]["learning_rate"] == pytest.approx(0.1)
    assert {"loss", "loss/t3", "grad_norm", "samples_per_second", "mfu"} <= set(rows[0])
    assert rows[-1]["samples_per_second"] > 0.0
    assert list((tmp_path / "logs").glob("events*"))


def test_pictures_of_hooks_become_files(tmp_path):
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    train(config(tmp_path, max_train_steps=2), hooks=[Hook(0, lambda step, state: {"grid": picture})])
    from PIL import Image

    np.testing.assert_array_equal(Image.open(tmp_path / "pictures" / "grid-0000002.png"), picture)


def test_the_update_is_traced_and_compiled_once_and_its_cost_is_told(tmp_path, capsys):
    traces = []

    def counted(params, frozen, batch, key):
        traces.append(None)
        return loss_fn(params, frozen, batch, key)

    train(config(tmp_path), counted)
    assert len(traces) == 1
    assert re.search(
        r"compiled in [\d.]+ s; .* TFLOP per step; peak .*measured .*GiB per device", capsys.readouterr().out
    )


def test_steps_between_two_rows_of_the_logs_are_not_lost_by_stopping(tmp_path):
    train(config(tmp_path / "whole", log_steps=4, max_train_steps=8))
    os_kill = lambda step, state: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None  # noqa: E731
    train(config(tmp_path / "parts", log_steps=4, max_train_steps=8), hooks=[Hook(1, os_kill)])
    train(config(tmp_path / "parts", log_steps=4, max_train_steps=8))
    rows = []
    for name in ("whole", "parts"):
        lines = map(json.loads, (tmp_path / name / "logs" / "metrics.jsonl").read_text().splitlines())
        rows.append([(row["step"], row["loss"], row["grad_norm"]) for row in lines])
    assert rows[0] == rows[1]


def test_means_leave_empty_bins_open():
    rows = [{"loss": 1.0, "bin_sum": np.array([2.0, 0.0]), "bin_count": np.array([1.0, 0.0])}] * 2
    means = mean_metrics(rows)
    assert means["loss"] == 1.0
    assert means["loss/t0"] == 2.0
    assert np.isnan(means["loss/t1"])


@pytest.mark.parametrize(
    "change", [{"output_dir": ""}, {"mixed_precision": "fp16"}, {"gradient_accumulation_steps": 3}]
)
def test_settings_that_cannot_work_are_named(tmp_path, change):
    with pytest.raises(InputError, match=next(iter(change))):
        config(tmp_path, **change)
