"""Kill a job of pictures over and over (SIGKILL), go on, and compare what is there with an undisturbed run.

Kills come at random moments: by the clock, with half a picture written, between a picture and its line in the
manifest, with half a line written, and while manifests are merged. With --processes 2 both share the job under
jax.distributed and one of them is killed; with --engine ray it is one of the actors.

    python -m scripts.kills --rows 200 --kills 50                # random weights, one process
    python -m scripts.kills --rows 40 --kills 2 --processes 2    # of 4 virtual devices each
    python -m scripts.kills --rows 40 --kills 1 --engine ray
    python -m scripts.kills --model mini --rows 500 --mixed true --kills 10 --devices 8
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from jaxmix.command import run
from jaxmix.types import InputError
from scripts.kills.moments import KINDS, Kill, watch_writes
from scripts.kills.rows import mixed_rows
from scripts.kills.stand_in import StandIn

FINISHED = {"job.json", "manifest.jsonl", "gallery.html", "contact_sheet.png", "thumbs"}


@dataclasses.dataclass
class Config:
    """What to kill, and how often.

    Attributes:
        rows: of the job.
        kills: how many; a job that is done before them is begun again.
        model: "none" (noise instead of pictures: files alone are tested), "tiny" (random weights), "mini" or another.
        mixed: rows of several methods and three sizes for the embedded model, ten of them bad.
        steps: of each picture.
        batch_size: pictures drawn at a time.
        devices: virtual devices of a process.
        processes: that share the job.
        engine: ray kills an actor of a local cluster.
        dead_after: seconds after which the others take a process for dead.
        seed: of the moments.
        out: folder for both runs; default: one that is removed.
    """

    rows: int = 200
    kills: int = 50
    model: str = "tiny"
    mixed: bool = False
    steps: int = 2
    batch_size: int = 8
    devices: int = 4
    processes: int = 1
    engine: Literal["local", "ray"] = "local"
    dead_after: float = 3.0
    seed: int = 0
    out: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        least = {"rows": 1, "steps": 1, "batch_size": 1, "devices": 1, "processes": 1, "kills": 0}
        for key, value in least.items():
            if getattr(self, key) < value:
                raise InputError(f"--{key.replace('_', '-')}: found {getattr(self, key)}, expected at least {value}")


class Jobs:
    """Runs of the job, each in forks of this process, which has imported everything and touched no device."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.model = config.model
        self.runs = 0
        rows = folder / "rows.jsonl"
        count = config.rows
        plain = [json.dumps({"prompt": f"picture {i}"}) for i in range(count)]
        lines = mixed_rows(count, config.seed) if config.mixed else plain
        rows.write_text("".join(f"{line}\n" for line in lines))
        if config.model == "tiny":
            self.model = str(folder / "tiny")
            assert ended(forked(self._save_tiny)) == 0

    def _save_tiny(self) -> int:
        from jaxmix.testing import tiny_pipeline

        tiny_pipeline().save(self.model)
        return 0

    def flags(self, out: str, together: bool) -> Any:
        """Return the flags of the job."""
        from infer.flags import Config as Flags

        own: dict[str, Any] = {"steps": self.config.steps, "batch_size": self.config.batch_size}
        if self.config.engine == "ray" and out != "whole":
            own |= {"engine": "ray", "resources": "CPU=1"}
        rows, place = str(self.folder / "rows.jsonl"), str(self.folder / out)
        return Flags(model=self.model, prompts=rows, out=place, distributed=together, **own)

    def start(self, out: str, kills: dict[int, Kill] | None = None, processes: int = 1) -> list[int]:
        """Begin a run, and return its processes; what they say goes into files."""
        self.runs += 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for index in range(processes):
            kill = (kills or {}).get(index)

            def work(index: int = index, kill: Kill | None = kill) -> int:
                said = os.open(self.said(index), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(said, 1)
                os.dup2(said, 2)
                return self._draw(out, kill, processes, index, port)

            started.append(forked(work))
        return started

    def said(self, index: int) -> Path:
        """Return the file of what a process of the last run said."""
        return self.folder / f"run-{self.runs}-{index}.txt"

    def _draw(self, out: str, kill: Kill | None, processes: int, index: int, port: int) -> int:
        import jax

        from infer import hosts, job

        environment = {"COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NUM_PROCESSES": processes, "PROCESS_ID": index}
        os.environ.update({f"JAX_{key}": str(value) for key, value in environment.items()} if processes > 1 else {})
        if self.config.model == "none":
            job.open_model = lambda config: StandIn()
        jax.config.update("jax_num_cpu_devices", self.config.devices)
        hosts.DEAD_AFTER = self.config.dead_after
        watch_writes(self.folder / f"{out}.drawn", kill)
        return job.run_job(self.flags(out, processes > 1))


def forked(work: Callable[[], int]) -> int:
    """Return the id of a fork that does `work` and ends with its status."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        status = work()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int) -> int:
    """Return how a fork ended: its status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def pictures(folder: Path) -> dict[str, bytes]:
    """Return the pictures under their names."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[0-9]*.png"))}


def faults(whole: Path, parts: Path, drawn: Path) -> list[str]:
    """Return what differs between an undisturbed run and one that was killed and went on."""
    one, other = pictures(whole), pictures(parts)
    found = [f"{name}: missing" for name in one if name not in other]
    found += [f"{name}: not one of the job" for name in other if name not in one]
    found += [f"{name}: differs" for name in one if name in other and one[name] != other[name]]
    found += ["manifest.jsonl differs"] if said_of(whole) != said_of(parts) else []
    found += [f"{path.name}: left over" for path in parts.iterdir() if path.name not in {*one, *FINISHED}]
    found += [f"{path.name}: left over" for path in (parts / "thumbs").glob(".*")]
    twice = [name for name, count in Counter(drawn.read_text().split()).items() if count > 1] if drawn.exists() else []
    return found + [f"{name}: written twice" for name in twice]


def said_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a manifest without what a clock decides."""
    lines = map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in ("seconds", "devices")} for line in lines]


def moments(config: Config, seconds: float) -> Iterator[Kill]:
    """Yield when to kill: every kind in turn, so many pictures after the last that the job lasts for all kills.

    Every second time by the clock it is within the first `seconds`, before the first picture or after.
    """
    numbers = random.Random(config.seed)
    each = max(1, min(config.rows // max(config.kills, 1), 2 * config.batch_size))
    while True:
        for early in (False, True):
            for kind in KINDS:
                number = numbers.randint(1, 2) if kind == "merge" else numbers.randint(1, each)
                yield Kill(kind, number, numbers.uniform(0, seconds if early else 0.05), early)


def kill_one(jobs: Jobs, kill: Kill, victim: int) -> list[str] | None:
    """Run the job until one of its processes is killed; return what was wrong, None if it was done before."""
    config = jobs.config
    started = jobs.start("parts", {victim: kill}, config.processes)
    if kill.kind == "clock":
        log = jobs.folder / "parts.drawn"
        before, since = lines_in(log), time.monotonic()
        while lines_in(log) < before + kill.number and time.monotonic() < since + 900 and not kill.early:
            if os.waitid(os.P_PID, started[victim], os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break  # there was not so much left to draw
            time.sleep(0.001)
        time.sleep(kill.seconds)
        os.kill(started[victim], signal.SIGKILL)  # nothing, if it has ended
    statuses = [ended(process) for process in started]
    said = [jobs.said(index).read_text() for index in range(config.processes) if index != victim]
    others = [status for index, status in enumerate(statuses) if index != victim]
    if statuses[victim] == expected_of(config) and all(status == expected_of(config) for status in others):
        return None
    wrong = [] if statuses[victim] == -signal.SIGKILL else [f"the process to kill ended with {statuses[victim]}"]
    for status, text in zip(others, said, strict=True):
        if status not in (0, 1, 2) or (status == 1 and f"process {victim} of" not in text):
            wrong.append(f"another process ended with {status}: {text[-500:]}")
    return wrong


def expected_of(config: Config) -> int:
    """Return the status of a job that has drawn what it can."""
    return 2 if config.mixed else 0


def lines_in(path: Path) -> int:
    """Return how many lines a file has, none if it is not there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_actor(jobs: Jobs) -> list[str]:
    """Run the job on Ray, and kill one of the processes that draw as soon as there is a picture."""
    (driver,) = jobs.start("parts")
    killed: list[int] = []

    def watch() -> None:
        while not killed and Path(f"/proc/{driver}").exists():
            time.sleep(0.05)
            if len(pictures(jobs.folder / "parts")) > 2:
                with contextlib.suppress(StopIteration, ProcessLookupError):
                    actor = next(pid for pid, text in below(driver).items() if "MapWorker" in text)
                    os.kill(actor, signal.SIGKILL)
                    killed.append(actor)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    status = ended(driver)
    watcher.join(1)
    wrong = [] if killed else ["no actor was killed"]
    return wrong + ([f"the driver ended with {status}: {jobs.said(0).read_text()[-2000:]}"] if status else [])


def below(process: int) -> dict[int, str]:
    """Return the command lines of the processes that a process started, and they in turn."""
    parents, texts = {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            texts[int(place.name)] = (place / "cmdline").read_text()
    found: dict[int, str] = {}
    more = {process}
    while more:
        more = {pid for pid, parent in parents.items() if parent in more and pid not in found}
        found |= {pid: texts.get(pid, "") for pid in more}
    return found


def main(config: Config) -> int:
    """Run, kill, go on, compare; return 0 if nothing was lost and nothing was done twice."""
    os.environ.pop("XLA_FLAGS", None)  # the number of devices is said here
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import transformers  # noqa: F401
    from PIL import Image  # noqa: F401

    import jaxmix.testing  # noqa: F401 - once for all forks

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config.out or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        jobs = Jobs(config, folder)
        expected = expected_of(config)
        began = time.monotonic()
        status = ended(jobs.start("whole")[0])
        if status != expected:
            raise InputError(f"the undisturbed run ended with {status}: {jobs.said(0).read_text()[-2000:]}")
        undisturbed = time.monotonic() - began
        found: list[str] = []
        kinds: Counter[str] = Counter()
        numbers = random.Random(config.seed + 1)
        rounds = 0
        whole = pictures(folder / "whole")
        when = moments(config, undisturbed / 2)
        kill = next(when)
        for _ in range(10 + 4 * config.kills):
            if kinds.total() == config.kills:
                break
            if config.engine == "ray":
                wrong: list[str] | None = kill_actor(jobs)
                kill = Kill("actor")
            else:
                wrong = kill_one(jobs, kill, numbers.randrange(config.processes))
            if wrong is None:  # the job is done, and kills are left: once more from the beginning
                found += faults(folder / "whole", folder / "parts", folder / "parts.drawn")
                rounds += 1
                shutil.rmtree(folder / "parts", ignore_errors=True)
                (folder / "parts.drawn").unlink(missing_ok=True)
                continue
            found += wrong
            kinds[kill.kind] += 1
            made, kill = kill, next(when)
            there = pictures(folder / "parts")
            found += [f"{name}: half-written" for name, content in there.items() if content != whole.get(name)]
            line = f"kill {kinds.total()} ({made.kind}): {len(there)} of {len(whole)} pictures"
            print(line, file=sys.stderr, flush=True)
        if kinds.total() < config.kills:
            found.append(f"{kinds.total()} kills of {config.kills} could be made")
        statuses = [ended(process) for process in jobs.start("parts", processes=config.processes)]
        if any(status != expected for status in statuses):
            found.append(f"the last run ended with {statuses}: {jobs.said(0).read_text()[-2000:]}")
        found += faults(folder / "whole", folder / "parts", folder / "parts.drawn")
        told = {
            "pictures": len(whole),
            "jobs": rounds + 1,
            "kills": dict(kinds),
            "faults": found,
            "undisturbed_seconds": round(undisturbed, 1),
            "seconds": round(time.monotonic() - began, 1),
        }
        print(json.dumps(told))
        return 1 if found else 0


if __name__ == "__main__":
    run(main)
