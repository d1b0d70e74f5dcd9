"""The parent's side of a worker process: start it, ask it, time it out, end it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from scripts.bench.rows import BenchRow

ROOT = Path(__file__).resolve().parents[2]


class WorkerError(Exception):
    """A worker could not carry out an order; the message says why."""


class Worker:
    """One engine in one process, with the persistent compile caches in ``cache``.

    ``about`` is its first answer: "versions" and "device", or a "reason" why there is no such engine here, with which
    every later order fails, too.
    """

    def __init__(self, engine: str, device: str, cache: Path, start_seconds: float = 300.0) -> None:
        cache.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cuda,cpu" if device == "gpu" else "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the GPU's memory is lent to one engine after another
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "PYTHONWARNINGS": "ignore",
        }
        if device != "gpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.engine = engine
        self._log = (cache / f"{engine}.log").open("a")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scripts.bench.engines", engine, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            self.about = self._answer(start_seconds)
        except WorkerError as error:
            self.about = {"reason": str(error)}

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            self.close()
            raise WorkerError(f"stopped after {seconds:.0f} s") from None
        if line is None:
            self._answers.put(None)  # for the next order
            status = self._process.wait()
            killed = " (killed: out of memory?)" if status == -9 else ""
            tail = Path(self._log.name).read_text(errors="replace").strip().splitlines()[-1:]
            raise WorkerError(f"the process ended with status {status}{killed}{': ' + tail[0][:160] if tail else ''}")
        return json.loads(line)

    def ask(self, op: str, row: BenchRow | None = None, seconds: float = 3600.0) -> dict[str, Any]:
        """Send an order and wait for its answer; raises `WorkerError` with the reason if there is none."""
        if "reason" in self.about:
            raise WorkerError(self.about["reason"])
        order: dict[str, Any] = {"op": op}
        if row is not None:
            order["row"] = dataclasses.asdict(row)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            seconds = 10.0  # it has ended, and the answer says how
        found = self._answer(seconds)
        if "reason" in found:
            raise WorkerError(found["reason"])
        return found

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def available_bytes() -> int:
    """Return the main memory that is still available to programs."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def machine() -> dict[str, Any]:
    """Return the name of the CPU, the cores that this process may use, and the main memory in GiB."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": memory,
    }
