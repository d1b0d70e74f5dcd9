"""Time ours, diffusers' Flax and torch diffusers (eager and compiled) side by side, in one run.

    python -m scripts.bench --preset cpu --out bench_cpu.json
    python -m scripts.bench --preset gpu --out bench_gpu.json
    python -m scripts.bench --preset gpu --device cpu --tiny      # shows that the GPU run works, without one

Every engine runs in its own process. See scripts/README.md for what is timed and how.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxmix import command
from jaxmix.types import InputError
from scripts.bench import rows as bench_rows
from scripts.bench.rows import PARAMETERS, PRESETS, BenchRow
from scripts.bench.table import markdown, peak_tflops, summary
from scripts.bench.workers import Worker, WorkerError, available_bytes, machine

_COMPILED = (
    "ours",
    "flax",
    "torch-compile",
    *bench_rows.ADAPTERS,
    *bench_rows.METHODS,
)  # engines whose first call compiles
_SLOW = 30.0  # seconds: if a call takes longer, its first run counts as a round, not a warm-up
_ROOM = 1.6  # memory of a running model as a multiple of its weights, for deciding what fits together


@dataclasses.dataclass
class Config:
    """What to time. Empty and 0 take the preset's value.

    Attributes:
        preset: quick (mini alone), cpu (mini, SD 1.5, SDXL in float32) or gpu (SD 1.5 and SDXL in bfloat16, under ten
            minutes).
        models: comma list of mini, sd15, sdxl.
        tasks: comma list of unet (one step of the UNet, two rows per image), sample (the guided sampler), decode.
        latents: comma list of sides, in latents of 8 px (4 px of mini).
        batch: comma list of numbers of images.
        engines: comma list of ours, flax, torch, torch-compile, and our sampler with a method: ours-vmix, ours-dense,
            ours-paint, ours-structured, ours-aligned, ours-styleid, ours-fusion, ours-composable, ours-ip (IP-Adapter
            of 4 tokens), ours-ip-plus (of 16), ours-controlnet, ours-controlnet-2 (two nets),
            ours-together (VMix, IP-Adapter, ControlNet, LoRA), ours-instantstyle-plus.
        rounds: timed calls of each engine.
        device: cpu or gpu.
        dtype: float32 or bfloat16.
        steps: sampling steps.
        tiny: shrink every model, to see that the script works.
        row_seconds: no further round of a row begins after this many seconds of its rounds.
        max_seconds: limit of the whole run; what is left then stays empty with the reason. 0 without a preset's: none.
        out: JSON file, rewritten after each row; none if empty.
    """

    preset: Literal["quick", "cpu", "gpu"] = "quick"
    models: str = ""
    tasks: str = ""
    latents: str = ""
    batch: str = ""
    engines: str = ""
    rounds: int = 0
    device: Literal["", "cpu", "gpu"] = ""
    dtype: Literal["", "float32", "bfloat16"] = ""
    steps: int = 0
    tiny: bool = False
    row_seconds: float = 0.0
    max_seconds: float = 0.0
    out: str = ""


class Bench:
    """One run: its rows, what is known of each cell so far, and the clock."""

    def __init__(self, config: Config, cache: Path) -> None:
        preset = PRESETS[config.preset]
        self.config, self.cache = config, cache
        self.device = config.device or ("gpu" if config.preset == "gpu" else "cpu")
        # One engine after another if the device has its own memory, which processes would compete for.
        self.alone = self.device == "gpu" or config.preset == "gpu"
        self.rounds = config.rounds or preset.rounds
        self.dtype = config.dtype or preset.dtype
        self.engines = bench_rows.names("engines", config.engines or preset.engines, bench_rows.ENGINES)
        for flag in ("rounds", "steps", "row_seconds", "max_seconds"):
            if getattr(config, flag) < 0:
                raise InputError(f"--{flag}: found {getattr(config, flag)}, expected a positive number")
        self.rows = bench_rows.plan(
            preset,
            bench_rows.names("models", config.models or preset.models, bench_rows.MODELS),
            bench_rows.names("tasks", config.tasks or preset.tasks, bench_rows.TASKS),
            bench_rows.numbers("latents", config.latents),
            bench_rows.numbers("batch", config.batch),
            self.dtype,
            config.steps or preset.steps,
            config.tiny,
        )
        self.cells: dict[BenchRow, dict[str, dict[str, Any]]] = {
            row: {e: {} for e in self.engines} for row in self.rows
        }
        self.notes: dict[BenchRow, str] = {}
        self.tflop: dict[BenchRow, float] = {}
        self.versions = {"python": platform.python_version()}
        self.device_name = ""
        self.row_seconds = config.row_seconds or preset.row_seconds
        self.max_seconds = config.max_seconds or preset.max_seconds
        self._end = time.monotonic() + self.max_seconds if self.max_seconds else float("inf")

    # The clock ----------------------------------------------------------------------------------------------------

    def left(self, end: float | None = None) -> float:
        """Return the seconds until ``end`` (the end of the run if None), at most an hour."""
        return min((self._end if end is None else end) - time.monotonic(), 3600.0)

    def fail(self, row: BenchRow, engine: str, reason: str) -> None:
        """Leave a cell empty; the first reason is kept."""
        self.cells[row][engine].setdefault("reason", reason)

    def open(self, row: BenchRow, engine: str) -> bool:
        """Return whether a cell is still to be timed; close it if there is no time left."""
        if "reason" not in self.cells[row][engine] and self.left() <= 0:
            self.fail(row, engine, f"no time left (--max-seconds {self.max_seconds:.0f})")
        return "reason" not in self.cells[row][engine]

    def say(self, text: str) -> None:
        """Print one line of progress on stderr."""
        print(f"bench: {text}", file=sys.stderr, flush=True)

    # What there is ------------------------------------------------------------------------------------------------

    def probe(self) -> None:
        """Start every engine once: versions and the device's name, or why its column stays empty."""
        for engine in self.engines:
            try:
                with Worker(engine, self.device, self.cache / "probe") as worker:
                    about = worker.about
            except WorkerError as error:
                about = {"reason": str(error)}
            if "reason" in about:
                self.say(f"{engine}: {about['reason']}")
                for row in self.rows:
                    self.fail(row, engine, about["reason"])
            else:
                self.versions.update(about["versions"])
                self.device_name = self.device_name or about["device"]

    def fits(self, row: BenchRow, engines: int) -> bool:
        """Return whether this many engines can hold a row's model in main memory at the same time."""
        if self.device == "gpu" or row.tiny:
            return True
        need = _ROOM * PARAMETERS[row.model] * (4 if row.dtype == "float32" else 2) * engines
        return need < available_bytes()

    # First calls --------------------------------------------------------------------------------------------------

    def compile_rows(self, worker: Worker, rows: Sequence[BenchRow], end: float | None = None) -> None:
        """Compile rows one after another."""
        for row in rows:
            if not self.open(row, worker.engine):
                continue
            if self.left(end) <= 0:
                self.fail(row, worker.engine, f"not compiled in its share of --max-seconds {self.max_seconds:.0f}")
                continue
            try:
                self.cells[row][worker.engine]["compiled"] = worker.ask("compile", row, self.left(end))
                self.say(f"{row.name}: {worker.engine} compiled")
            except WorkerError as error:
                self.fail(row, worker.engine, f"compiling: {error}")

    def count(self) -> None:
        """Count the FLOPs of the UNet and decoder rows, and take the sampler's as its steps of the UNet."""
        rows = [row for row in self.rows if row.task != "sample"]
        try:
            with Worker("ours", "cpu", self.cache / "count") as worker:
                for row in rows:
                    self.tflop[row] = worker.ask("count", row, self.left())["flops"] / 1e12
        except WorkerError as error:
            self.say(f"FLOPs not counted: {error}")
        for row in self.rows:
            step = dataclasses.replace(row, task="unet", steps=0)
            if row.task == "sample" and step in self.tflop:
                self.tflop[row] = row.steps * self.tflop[step]

    # Timing -------------------------------------------------------------------------------------------------------

    def prepare(self, worker: Worker, row: BenchRow, end: float | None = None) -> None:
        """Load from the cache unless this process has compiled the row, make weights, run once."""
        cell = self.cells[row][worker.engine]
        told = worker.ask("prepare", row, self.left(end))
        compiled = cell.pop("compiled", {})
        first = told["first_run_s"]
        loaded = told.get("compile_s", 0.0)
        cell["second_process_s"] = None if told.get("compiled_before") else loaded + first
        cell["first_call_s"] = compiled.get("compile_s", loaded) + (0.0 if compiled.get("with_run") else first)
        cell["peak_bytes"] = told["peak_bytes"]
        cell["program_bytes"] = told.get("program_bytes")
        cell["rounds"] = [{"wall_s": first, "cpu_s": told["first_cpu_s"]}] if first > _SLOW else []
        if not told["finite"]:
            self.notes[row] = f"{worker.engine}: values that are not finite (random weights)"

    def one_round(self, worker: Worker, row: BenchRow, end: float | None = None) -> None:
        """Time one call."""
        rounds = self.cells[row][worker.engine]["rounds"]
        rounds.append(worker.ask("run", seconds=self.left(end)))

    def settle(self, row: BenchRow, engine: str) -> None:
        """Turn the rounds of a cell into its numbers."""
        cell = self.cells[row][engine]
        if cell.get("rounds"):
            cell |= summary(cell["rounds"], cores=self.device == "cpu")
            cell.pop("reason", None)  # some rounds are better than none
            self.say(f"{row.name}: {engine} {cell['median_s']:.4g} s")

    def beside(self, row: BenchRow, cache: Path) -> None:
        """Time a row's engines in interleaved rounds, each in its own process, one working at a time."""
        workers: dict[str, Worker] = {}

        def each(do: Callable[[str], None]) -> None:
            for engine in self.engines:
                if self.open(row, engine):
                    try:
                        do(engine)
                    except WorkerError as error:
                        self.fail(row, engine, str(error))

        def begin(engine: str) -> None:
            workers[engine] = self.worker(engine, [row], cache)
            self.prepare(workers[engine], row)

        def once(engine: str) -> None:
            if len(self.cells[row][engine]["rounds"]) <= i:
                self.one_round(workers[engine], row)

        def count(engine: str) -> None:
            if engine.startswith("ours"):
                self.cells[row][engine] |= workers[engine].ask("count", row, self.left())

        try:
            each(begin)
            started = time.monotonic()
            for i in range(self.rounds):
                if i == 0 or time.monotonic() - started < self.row_seconds:
                    each(once)
            if row.task == "sample":
                each(count)
        finally:
            for worker in workers.values():
                worker.close()
        for engine in self.engines:
            self.settle(row, engine)

    def by_itself(self, worker: Worker, rows: Sequence[BenchRow], end: float | None = None) -> None:
        """Time rows of one engine running alone."""
        engine = worker.engine
        for row in rows:
            if not self.open(row, engine):
                continue
            if self.left(end) <= 0:
                self.fail(row, engine, f"no time left in its share of --max-seconds {self.max_seconds:.0f}")
                continue
            try:
                self.prepare(worker, row, end)
                started = time.monotonic()
                while len(self.cells[row][engine]["rounds"]) < self.rounds:
                    self.one_round(worker, row, end)
                    if time.monotonic() - started > self.row_seconds or self.left(end) <= 0:
                        break
            except WorkerError as error:
                self.fail(row, engine, str(error))
            self.settle(row, engine)

    def run(self) -> None:
        """Time everything."""
        self.probe()
        if self.alone:
            self._run_alone()
            return
        for k, row in enumerate(self.rows):
            cache = self.cache / f"row{k}"  # of its own, so that no row warms another's first call
            ready = [e for e in self.engines if self.open(row, e)]
            if ready and not self.fits(row, 1):
                for engine in ready:
                    self.fail(row, engine, f"about {_ROOM * PARAMETERS[row.model] * 4 / 1e9:.0f} GB do not fit")
                ready = []
            for engine in ready:
                if engine in _COMPILED:
                    with self.worker(engine, [row], cache) as worker:
                        self.compile_rows(worker, [row])
            if self.fits(row, len(ready)):
                self.beside(row, cache)
            else:
                self.notes[row] = "engines one after another: they do not fit into memory together"
                for engine in ready:
                    with self.worker(engine, [row], cache) as worker:
                        self.by_itself(worker, [row])
            self.write()

    def _run_alone(self) -> None:
        """Compile every engine at the same time, then time each with the device to itself.

        Compiling is mostly work for the CPU and would take all the time if the engines queued for it; half of the time
        is its share. Each engine keeps its process, so that nothing is traced twice. The start of a second process is
        timed last, for as many rows as time allows.
        """
        # torch.compile has to run in order to compile, and holds memory from then on: it is timed and ended first.
        ready = sorted(
            (e for e in self.engines if any(self.open(row, e) for row in self.rows)), key=lambda e: e != "torch-compile"
        )
        if not ready:
            return
        limited = self._end < float("inf")
        half = time.monotonic() + self.left() / 2 if limited else None
        with contextlib.ExitStack() as stack:
            workers = {
                e: stack.enter_context(self.worker(e, self.rows, self.cache / e)) for e in ready if e in _COMPILED
            }
            with concurrent.futures.ThreadPoolExecutor(len(ready) + 1) as pool:
                jobs = [pool.submit(self.compile_rows, worker, self.rows, half) for worker in workers.values()]
                for job in (*jobs, pool.submit(self.count)):
                    job.result()
            for k, engine in enumerate(ready):
                share = time.monotonic() + self.left() / (len(ready) - k) if limited else None
                with workers.get(engine) or self.worker(engine, self.rows, self.cache / engine) as worker:
                    self.by_itself(worker, self.rows, share)
                self.write()
        for engine in sorted(workers, key=ready.index):
            with self.worker(engine, [], self.cache / engine) as worker:
                for row in self.rows:
                    cell = self.cells[row][engine]
                    if "median_s" in cell and self.left() > 0:
                        with contextlib.suppress(WorkerError):
                            told = worker.ask("prepare", row, self.left())
                            cell["second_process_s"] = told.get("compile_s", 0.0) + told["first_run_s"]
            self.write()

    def worker(self, engine: str, rows: Sequence[BenchRow], cache: Path) -> Worker:
        """Start a worker; one that does not start fails every order, and so leaves ``rows`` empty."""
        worker = Worker(engine, self.device, cache)
        for row in rows:
            if "reason" in worker.about:
                self.fail(row, engine, worker.about["reason"])
        return worker

    # What came of it ----------------------------------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        """Return everything that was measured, ready for JSON."""
        rows = []
        for row in self.rows:
            told: dict[str, Any] = {**dataclasses.asdict(row), "engines": self.cells[row]}
            if row in self.tflop:
                told["tflop"] = self.tflop[row]
            rows.append(told | ({"note": self.notes[row]} if row in self.notes else {}))
        return {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": {"device": self.device_name or f"no {self.device}", **machine()},
            "versions": self.versions,
            "dtype": self.dtype,
            "peak_tflops": peak_tflops(self.device_name, self.dtype),
            "engines": list(self.engines),
            "config": dataclasses.asdict(self.config),
            "rows": rows,
        }

    def write(self) -> None:
        """Write the JSON file, if one was named, so that results survive later failures."""
        if self.config.out:
            path = Path(self.config.out)
            part = path.with_name(path.name + ".part")
            part.write_text(json.dumps(self.result(), indent=1) + "\n")
            part.replace(path)


def main(config: Config) -> int:
    """Time what the config names, print the tables."""
    if config.out and not Path(config.out).absolute().parent.is_dir():
        raise InputError(f"--out {config.out}: no such folder")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(config, Path(folder))
        bench.run()
        bench.write()
    print(markdown(bench.result()))
    return 0


if __name__ == "__main__":
    command.run(main)
