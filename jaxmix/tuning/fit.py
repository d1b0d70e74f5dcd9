"""The loop of every trainer: batches in, logs and checkpoints out; stopped and resumed, it gives the same numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmix.signals import heard
from jaxmix.tuning import flops
from jaxmix.tuning.checkpoints import Checkpoints, stop_on_signals
from jaxmix.tuning.devices import CompiledUpdate, Stepper, agree, training_devices
from jaxmix.tuning.logs import ScalarLog, mean_metrics
from jaxmix.tuning.room import check_fits, held_bytes, told_if_full
from jaxmix.tuning.update import OptimizerConfig, TrainState, make_learning_rate
from jaxmix.types import InputError


@dataclasses.dataclass
class FitConfig(OptimizerConfig):
    """The settings that every trainer's config starts with.

    Attributes:
        output_dir: folder for checkpoints, logs, pictures and the exported model.
        seed: seed of the weights, of the data order and of the noise.
        train_batch_size: rows per update, over all devices and micro-batches.
        devices: number of devices to train on, which share the rows; 0: all of all processes (in a single process as
            many as divide a micro-batch's rows).
        fsdp: number of devices over which the weights, frozen and trained, their average and the optimiser state are
            split; 1: every device has them whole. Weights are gathered for use. It must divide the devices.
        checkpointing_steps: save the training state every this many steps, in the background; 0: only at the end.
        checkpoints_total_limit: how many checkpoints to keep; older ones are removed.
        resume_from_checkpoint: latest (the newest intact one; start afresh if there is none), none, or a step. Later
            checkpoints are moved to OUT/checkpoints-aside, later rows of the logs are dropped.
        max_seconds: stop cleanly after this many seconds, to resume later; 0: no limit.
        log_steps: log and show means over this many steps.
        mixed_precision: "no" for float32, bf16 for bfloat16 compute on float32 weights.
        dataloader_num_workers: threads that prepare batches ahead.
    """

    output_dir: str = ""
    seed: int = 0
    train_batch_size: int = 32
    devices: int = 0
    fsdp: int = 1
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str = "latest"
    max_seconds: float = 0.0
    log_steps: int = 20
    mixed_precision: str = "no"
    dataloader_num_workers: int = 2

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        if not self.output_dir:
            raise InputError("output_dir: not given, expected a folder to write to")
        if self.mixed_precision not in ("no", "bf16"):
            raise InputError(f"mixed_precision: found {self.mixed_precision!r}, expected 'no' or 'bf16'")
        if self.gradient_accumulation_steps < 1 or self.train_batch_size % self.gradient_accumulation_steps:
            raise InputError(
                f"gradient_accumulation_steps: found {self.gradient_accumulation_steps}, expected a divisor of "
                f"train_batch_size {self.train_batch_size}"
            )

    @property
    def dtype(self) -> Any:
        """The dtype that the models compute in."""
        return jax.numpy.bfloat16 if self.mixed_precision == "bf16" else jax.numpy.float32


@dataclasses.dataclass(frozen=True)
class Hook:
    """Something to do with the state every `every` steps (0: never) and, with `at_end`, when the loop ends.

    run(step, state) may return pictures, {name: (H, W, 3) uint8}, which become OUT/pictures/{name}-{step:07d}.png and
    TensorBoard images. It runs on process 0 only, with params and ema whole on one device whatever the mesh, so it must
    not need the other processes. `on_host` says that it takes them as NumPy arrays if there is a mesh: weights that are
    split because a device cannot hold them.
    """

    every: int
    run: Callable[[int, TrainState], Mapping[str, np.ndarray] | None]
    at_end: bool = True
    on_host: bool = False


def fit(
    cfg: FitConfig,
    state: TrainState,
    update: Callable[..., tuple[TrainState, dict[str, Any]]],
    frozen: Any,
    batches: Callable[[int], Iterator[Any]],
    hooks: Sequence[Hook] = (),
    progress: Callable[..., Any] | None = None,
    plan: Mapping[str, Any] | None = None,
) -> tuple[TrainState, bool]:
    """Run `update` up to cfg.max_train_steps and return (state, whether the run is complete).

    state: the fresh state, replaced by a checkpoint's when cfg.resume_from_checkpoint finds one in
    cfg.output_dir/checkpoints. batches(k): iterator over the batches from step k on; with several processes over this
    process's rows of them, where the batch is process 0's rows, then process 1's, and so on. An entry "id" (names of
    the rows) stays on the host. On several devices, state, frozen and rows are placed as `Stepper` does; pass `frozen`
    as NumPy arrays if it is too large for one of them. `plan` is that of `Checkpoints`.
    The returned state has params and ema whole on one device, or as hooks get them if these are all `on_host`.

    The loop stops early, after saving, on SIGTERM, Ctrl-C or cfg.max_seconds, and returns as usual, so that the command
    exits with status 0; several processes agree on the step, up to five short steps later, or the next one if they are
    long. After SIGTERM the state is saved and hooks are left out: a machine that is taken away leaves no time for them.
    While the first update compiles there is nothing new to save, and SIGTERM ends the process at once. A loss that is
    not finite raises InputError naming the step, the rows and the last good checkpoint, and that state is not saved; so
    does an update that does not fit a device's memory, before it runs, with the keys that would help.
    """
    micro = cfg.train_batch_size // cfg.gradient_accumulation_steps
    stepper = Stepper(update, training_devices(micro, cfg.fsdp, cfg.devices), cfg.fsdp)
    if len(stepper.devices) < len(jax.devices()) and not cfg.devices:
        _say(f"{len(stepper.devices)} of {len(jax.devices())} devices: no more divide a micro-batch of {micro} rows")
    folder = Path(cfg.output_dir)
    checkpoints = Checkpoints(folder / "checkpoints", cfg.checkpoints_total_limit, plan)
    log: ScalarLog | None = None
    check_fits(held_bytes((state, frozen), stepper.mesh), stepper.devices, cfg, "the weights and the optimizer")
    try:
        start, state, extra, remarks = checkpoints.resume(cfg.resume_from_checkpoint, stepper.place(state))
        _say(*remarks, *([f"resumed from step {start}"] if start else []))
        if jax.process_index() == 0:
            log = ScalarLog(folder / "logs", start)
        with stop_on_signals() as signals:
            run = _Run(cfg, stepper, hooks, checkpoints, log, signals)
            run.window = [{k: np.asarray(v) for k, v in row.items()} for row in (extra or {}).get("window", ())]
            state, complete = run.loop(state, stepper.place(frozen), batches, progress)
        return stepper.whole(state, bool(hooks) and all(hook.on_host for hook in hooks)), complete
    finally:
        checkpoints.close()
        if log is not None:
            log.close()


_AGREE_STEPS, _AGREE_SECONDS = 5, 1.0
"""Processes ask each other whether one of them was told to stop every so many steps, or seconds if these are fewer, and
in every step that takes longer: a preempted machine may have 15 s for the step, for agreeing and for saving."""
_LATE, _INTERRUPTED, _ENDING = 1, 2, 3
"""Why a run stops early; the greatest of all processes counts. After SIGTERM there is time to save, and no more."""


def _say(*lines: str) -> None:
    if jax.process_index() == 0:
        for line in lines:
            print(line, flush=True)


class _Run:
    """One run of the loop, with what it counts and writes between updates."""

    def __init__(
        self,
        cfg: FitConfig,
        stepper: Stepper,
        hooks: Sequence[Hook],
        checkpoints: Checkpoints,
        log: ScalarLog | None,
        signals: list[str],
    ):
        self.cfg, self.stepper, self.hooks = cfg, stepper, hooks
        self.checkpoints, self.log, self.signals = checkpoints, log, signals
        self.learning_rate = make_learning_rate(cfg)
        # The metrics of the steps since the last row of the logs, saved with the state so that the rows of a resumed
        # run are means over the same steps.
        self.window: list[dict[str, Any]] = []
        self.began = time.monotonic()
        self.peak = flops.Peak(math.inf, "unknown")
        self.ending = False
        self.asked, self.agreed, self.agree_at = 0, 0.0, 0
        self._restart_clock()

    def _restart_clock(self) -> None:
        self.clock, self.aside, self.timed, self.work = time.monotonic(), 0.0, 0, 0.0

    def loop(
        self,
        state: TrainState,
        frozen: Any,
        batches: Callable[[int], Iterator[Any]],
        progress: Callable[..., Any] | None,
    ) -> tuple[TrainState, bool]:
        cfg, stepper, key = self.cfg, self.stepper, self.stepper.key(self.cfg.seed)
        start = step = int(state.step)
        stopped, note, bar = "", "", None
        before: tuple[int, dict[str, Any], Any] | None = None
        rows = batches(start) if start < cfg.max_train_steps else iter(())
        while step < cfg.max_train_steps and not stopped:
            batch, ids = _split_ids(next(rows))
            batch = stepper.rows(batch)
            paused = time.monotonic()
            leaving = self._nothing_to_save() if step == start else contextlib.nullcontext()
            with told_if_full(stepper.devices, cfg, "the update and its weights"), leaving:
                compiled = stepper.compiled(state, frozen, batch, key)
            if step == start:
                self.asked, self.agreed = step, math.inf
                self._introduce(compiled)
                bar = progress(cfg.max_train_steps - start, "train", "steps") if self.log and progress else None
                self._restart_clock()  # placing, the first batch and compiling do not count as speed
            else:
                self.aside += time.monotonic() - paused
            state, metrics = compiled.run(state, frozen, batch, key)
            step += 1
            if before is not None:
                # One step behind, so that the device never waits for the host.
                self._check_finite(*before)
            before = step, metrics, ids
            self.window.append(metrics)
            self.timed, self.work = self.timed + 1, self.work + compiled.flops
            stopped = self._stop(step)
            complete = step == cfg.max_train_steps
            last = bool(stopped) or complete
            due = [h for h in self.hooks if (h.at_end and last) or (h.every and step % h.every == 0)]
            if self.ending and not complete:
                due = []
            save = last or (cfg.checkpointing_steps and step % cfg.checkpointing_steps == 0)
            logs = complete or step % cfg.log_steps == 0
            if due or save or logs:
                self._check_finite(*before)
            if logs:
                note = self._write(step)
            if bar is not None:
                bar.update(1, note)
            paused = time.monotonic()
            if save:
                window = [
                    {k: np.asarray(v, np.float64).tolist() for k, v in row.items()}
                    for row in jax.device_get(self.window)
                ]
                self.checkpoints.save(step, state, {"window": window})
            if due:
                self._run_hooks(step, due, stepper.whole(state, all(hook.on_host for hook in due)))
            self.aside += time.monotonic() - paused
        if stopped:
            _say(f"stopped at step {step} ({stopped}), saved; the same command resumes from there")
        return state, step >= cfg.max_train_steps

    def _stop(self, step: int) -> str:
        """Return why to stop after this step, "" to continue; the same in every process."""
        late = self.cfg.max_seconds and time.monotonic() - self.began > self.cfg.max_seconds
        code = _LATE if late else 0
        if self.signals:
            code = _ENDING if "SIGTERM" in self.signals else _INTERRUPTED
        if jax.process_count() > 1:
            code = self._agreed(step, code) if step >= self.agree_at else 0
        self.ending = code == _ENDING
        signalled = self.signals[0] if self.signals else "signal"
        return {0: "", _LATE: f"{self.cfg.max_seconds:g} s are over"}.get(code, signalled)

    def _agreed(self, step: int, code: int) -> int:
        """Return why the first of all processes stops, and settle at which step they ask each other again."""
        now = time.monotonic()
        # The slowest counts, and the first step, from whose time nothing follows, is taken for long.
        seconds = (now - self.agreed) / (step - self.asked) if math.isfinite(self.agreed) else _AGREE_SECONDS
        largest, seconds = agree(code, seconds)
        self.agree_at = step + max(1, min(_AGREE_STEPS, int(_AGREE_SECONDS / max(seconds, 1e-9))))
        self.asked, self.agreed = step, now
        return int(largest)

    @contextlib.contextmanager
    def _nothing_to_save(self) -> Iterator[None]:
        """Let SIGTERM end the process at once: a compilation cannot be interrupted, and takes minutes."""

        def leave(number: int = signal.SIGTERM) -> None:
            _say("stopped (SIGTERM) while the update compiled, with nothing new to save; the same command goes on")
            os._exit(0)

        if "SIGTERM" in self.signals:
            leave()
        with heard(leave):
            yield

    def _introduce(self, compiled: CompiledUpdate) -> None:
        if not compiled.seconds:
            return
        self.peak = flops.peak(self.stepper.devices, self.cfg.dtype)
        where = "" if self.stepper.mesh is None else f" for {dict(self.stepper.mesh.shape)}"
        said = (
            f"update compiled{where} in {compiled.seconds:.1f} s",
            f"{compiled.flops / 1e12:.3g} TFLOP per step",
            f"peak {self.peak.flops / 1e12:.3g} TFLOP/s ({self.peak.label})",
            compiled.memory,
        )
        _say("; ".join(filter(None, said)))
        check_fits(compiled.bytes, self.stepper.devices, self.cfg, "the weights and the update")

    def _write(self, step: int) -> str:
        """Write a row of the logs for the steps since the last one, and return the note for the progress line."""
        means = mean_metrics(jax.device_get(self.window))
        seconds = max(time.monotonic() - self.clock - self.aside, 1e-9)
        means["samples_per_second"] = self.timed * self.cfg.train_batch_size / seconds
        means["learning_rate"] = float(self.learning_rate(step - 1))
        means["samples"] = step * self.cfg.train_batch_size
        note = f"step {step} loss {means['loss']:.4f}, {means['samples_per_second']:.1f} samples/s"
        if self.work:
            means["mfu"] = self.work / seconds / self.peak.flops
            note += f", {100 * means['mfu']:.1f} % MFU"
        if self.log is not None:
            self.log.write(step, means)
        self.window = []
        self._restart_clock()
        return note

    def _run_hooks(self, step: int, due: Sequence[Hook], state: TrainState) -> None:
        if self.log is None:
            return
        for hook in due:
            for name, image in (hook.run(step, state) or {}).items():
                self.log.picture(step, name, image, Path(self.cfg.output_dir) / "pictures")

    def _check_finite(self, step: int, metrics: dict[str, Any], ids: Any) -> None:
        loss = float(metrics["loss"])
        if math.isfinite(loss):
            return
        rows = "" if ids is None else f" (rows {', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''})"
        good = self.checkpoints.newest()
        raise InputError(
            f"step {step}{rows}: loss is {loss}; last good checkpoint: {good or 'none'}; resume from it with a lower "
            "learning_rate or max_grad_norm"
        )


def _split_ids(batch: Any) -> tuple[Any, Any]:
    """Return (what goes to the device, the names of the rows or None)."""
    if not isinstance(batch, Mapping) or "id" not in batch:
        return batch, None
    return {name: value for name, value in batch.items() if name != "id"}, batch["id"]
