"""The loop that every trainer runs: batches in, logs and checkpoints out, stopping and resuming to the same numbers."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmix.tuning.checkpoints import Checkpoints, stop_on_signals
from jaxmix.tuning.update import OptimizerConfig, TrainState, make_learning_rate
from jaxmix.types import InputError


@dataclasses.dataclass
class FitConfig(OptimizerConfig):
    """What every trainer's config begins with.

    Attributes:
        output_dir: folder for checkpoints, logs, pictures and the exported model.
        seed: seed of the weights, of the data order and of the noise.
        train_batch_size: rows per update.
        checkpointing_steps: save the training state every so many steps; 0: only at the end.
        checkpoints_total_limit: older states are removed beyond so many.
        resume_from_checkpoint: latest (start anew if there is none), none, or a step.
        max_seconds: stop cleanly after so many seconds, for a later resume; 0: no limit.
        log_steps: write the means of so many steps to the logs.
        mixed_precision: "no" for float32, bf16 for bfloat16 compute on float32 weights.
        dataloader_num_workers: threads that prepare batches ahead.
    """

    output_dir: str = ""
    seed: int = 0
    train_batch_size: int = 32
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str = "latest"
    max_seconds: float = 0.0
    log_steps: int = 20
    mixed_precision: str = "no"
    dataloader_num_workers: int = 2

    def __post_init__(self) -> None:
        """Refuse values that could only fail later."""
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
    """Something to do with the state every `every` steps (0: never) and, with `at_end`, when the loop ends."""

    every: int
    run: Callable[[int, TrainState], None]
    at_end: bool = True


class ScalarLog:
    """Scalars by step, as TensorBoard events and as `metrics.jsonl` in one folder."""

    def __init__(self, folder: str | Path):
        """Open both files for appending."""
        from tensorboardX import SummaryWriter

        Path(folder).mkdir(parents=True, exist_ok=True)
        self._events = SummaryWriter(str(folder))
        self._lines = open(Path(folder) / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed in close()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Write one row of scalars; what is not finite (a timestep bin without rows) is left out."""
        import json

        scalars = {name: round(float(value), 7) for name, value in scalars.items() if math.isfinite(value)}
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
        self._lines.flush()

    def close(self) -> None:
        """Write what is buffered."""
        self._events.close()
        self._lines.close()


def mean_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the means over steps of scalar metrics; `bin_sum` and `bin_count` become loss/t0 .. loss/tN."""
    total = jax.tree.map(lambda *xs: np.sum(np.asarray(xs, np.float64), axis=0), *rows)
    sums, counts = total.pop("bin_sum", np.zeros(0)), total.pop("bin_count", np.zeros(0))
    means = {name: float(value) / len(rows) for name, value in total.items()}
    bins = {f"loss/t{i}": s / n if n else math.nan for i, (s, n) in enumerate(zip(sums, counts, strict=True))}
    return {**means, **bins}


def _check_finite(step: int, metrics: dict[str, Any]) -> None:
    loss = float(metrics["loss"])
    if not math.isfinite(loss):
        raise InputError(
            f"step {step}: loss is {loss}; the last checkpoint is sound: resume from it with a lower learning_rate "
            "or max_grad_norm"
        )


def fit(
    cfg: FitConfig,
    state: TrainState,
    update: Callable[..., tuple[TrainState, dict[str, Any]]],
    frozen: Any,
    batches: Callable[[int], Iterator[Any]],
    hooks: Sequence[Hook] = (),
    progress: Callable[..., Any] | None = None,
) -> tuple[TrainState, bool]:
    """Run `update` up to cfg.max_train_steps and return (state, whether the run is complete).

    state: the fresh state, replaced by a checkpoint's when cfg.resume_from_checkpoint finds one in
    cfg.output_dir/checkpoints. batches(k): iterator over the batches from step k on. The loop stops early, after
    saving, on SIGTERM, Ctrl-C or cfg.max_seconds. A loss that is not finite raises InputError naming the step, and
    nothing of that state is saved.
    """
    folder = Path(cfg.output_dir)
    checkpoints = Checkpoints(folder / "checkpoints", cfg.checkpoints_total_limit)
    log = ScalarLog(folder / "logs")
    try:
        found = checkpoints.find(cfg.resume_from_checkpoint)
        if found is not None:
            state = checkpoints.restore(found, state)
            print(f"resumed from step {found}", flush=True)
        with stop_on_signals() as signals:
            return _loop(cfg, state, update, frozen, batches, hooks, progress, checkpoints, log, signals)
    finally:
        checkpoints.close()
        log.close()


def _loop(
    cfg: FitConfig,
    state: TrainState,
    update: Callable[..., Any],
    frozen: Any,
    batches: Callable[[int], Iterator[Any]],
    hooks: Sequence[Hook],
    progress: Callable[..., Any] | None,
    checkpoints: Checkpoints,
    log: ScalarLog,
    signals: list[str],
) -> tuple[TrainState, bool]:
    key, learning_rate = jax.random.key(cfg.seed), make_learning_rate(cfg)
    start = step = int(state.step)
    window: list[dict[str, Any]] = []
    began = window_began = time.monotonic()
    spent_in_hooks, stopped, note = 0.0, "", ""
    rows = batches(start) if start < cfg.max_train_steps else iter(())
    bar = progress(max(cfg.max_train_steps - start, 0), "train", "steps") if progress else None
    while step < cfg.max_train_steps and not stopped:
        state, metrics = update(state, frozen, next(rows), key)
        step += 1
        if window:
            # One step behind, so that the device never waits for the host to look.
            _check_finite(step - 1, window[-1])
        window.append(metrics)
        if signals or (cfg.max_seconds and time.monotonic() - began > cfg.max_seconds):
            stopped = signals[0] if signals else f"{cfg.max_seconds:g} s are over"
        last = bool(stopped) or step == cfg.max_train_steps
        due = [hook for hook in hooks if (hook.at_end and last) or (hook.every and step % hook.every == 0)]
        save = last or (cfg.checkpointing_steps and step % cfg.checkpointing_steps == 0)
        logs = last or step % cfg.log_steps == 0
        if due or save or logs:
            _check_finite(step, metrics)
        if logs:
            means = mean_metrics(jax.device_get(window))
            seconds = time.monotonic() - window_began - spent_in_hooks
            means["samples_per_second"] = len(window) * cfg.train_batch_size / max(seconds, 1e-9)
            means["learning_rate"] = float(learning_rate(step - 1))
            means["samples"] = step * cfg.train_batch_size
            log.write(step, means)
            note = f"step {step} loss {means['loss']:.4f}, {means['samples_per_second']:.1f} samples/s"
            window, window_began, spent_in_hooks = [], time.monotonic(), 0.0
        if bar is not None:
            bar.update(1, note)
        paused = time.monotonic()
        if save:
            checkpoints.save(step, state)
        for hook in due:
            hook.run(step, state)
        spent_in_hooks += time.monotonic() - paused
    if stopped:
        print(f"stopped at step {step} ({stopped}), saved; the same command goes on from there", flush=True)
    return state, step >= cfg.max_train_steps
