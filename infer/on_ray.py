"""Drawing on a Ray cluster (`--engine ray`): this process reads, plans and writes, actors on the machines there draw.

Ray Data hands the batches to a pool of actors that hold one pipeline each, starts actors anew that died with their
machine, and gives their batches to others. A batch that is drawn twice for that is the same twice: names and seeds are
functions of the row. Pictures come back as PNGs, so machines need not share a folder for results.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infer.ahead import Writers
from infer.batches import FilledBatch
from infer.drawing import Drawing
from infer.flags import Config
from infer.leaving import Leaving
from infer.measure import CompileClock
from infer.methods.registry import Methods
from infer.rows import Row
from jaxmix.command import progress
from jaxmix.types import InputError

TOGETHER = 4
"""Batches that an actor takes at once: the device draws one while the host is at the next."""


class Opening(NamedTuple):
    """How a job opens its devices and its model, and completes its rows: functions of `infer.job`, which runs this."""

    mesh: Callable[..., Any]
    model: Callable[..., Any]
    prepare: Callable[..., Any]


class Cluster:
    """The machines of a Ray cluster, or this one if there is none. `devices` are those of one actor."""

    def __init__(self, config: Config, opening: Opening) -> None:
        asked = resources_of(config.resources) if config.resources is not None else None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
            import ray.data  # lacks its parts in an installation of Ray alone
        except ImportError as error:
            raise InputError(
                f"--engine ray: found no {error.name or 'ray'}, expected it: pip install 'jaxmix-diffusion[ray]'"
            ) from None
        import jax

        # What this machine has is for the actors on it, and cannot be shared. Here only rows are checked.
        jax.config.update("jax_platforms", "cpu")
        if not ray.is_initialized():
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
            except (OSError, RuntimeError, ValueError) as error:
                where = os.environ.get("RAY_ADDRESS", "not set")
                said = " ".join(str(error).split())[:300]
                raise InputError(f"--engine ray: found no cluster (RAY_ADDRESS={where}): {said}") from None
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        self._config, self._opening = config, opening
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.each = asked or _usual(machines)
        self.most = sum(_fitting(self.each, machine) for machine in machines)
        if not self.most:
            there = "; ".join(_shown(machine) for machine in machines)
            raise InputError(f"--resources: found {_shown(self.each)}, expected what a machine has: {there}")
        self.devices = 1
        self._methods = b""
        self.rows: Sequence[Row] = ()

    def start(self, methods: Methods, rows: Sequence[Row]) -> None:
        """Take the methods as they are before anything is opened, and ask for the devices of an actor."""
        import ray
        from ray import cloudpickle

        self._methods = cloudpickle.dumps(methods)
        # In a process of its own, which ends and gives them back.
        ask = ray.remote(max_calls=1, **_options(self.each))(_count_devices)
        found = ray.get(ask.remote(self._opening, self._config.devices, len(rows)))
        if isinstance(found, str):
            raise InputError(found)
        self.devices = found

    def drawing(self, *arguments: Any) -> Drawing:
        """Return what draws; the arguments are those of `Drawing`."""
        return RayDrawing(self, *arguments)

    def results(self, batches: Sequence[FilledBatch]) -> Iterator[dict[str, Any]]:
        """Yield what a `Painter` gives for batches, in the order in which they are done."""
        import ray.data

        together = max(1, min(TOGETHER, len(batches) // (2 * self.most)))
        parts = [batches[first : first + together] for first in range(0, len(batches), together)]
        specs = [{"batches": json.dumps([_spec(batch) for batch in part])} for part in parts]
        most = min(self.most, len(specs))
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=most, max_tasks_in_flight_per_actor=2)
        given = (self._config, self._opening, self._methods, list(self.rows), self.devices, os.getcwd())
        done = ray.data.from_items(specs, override_num_blocks=len(specs)).map_batches(
            Painter, fn_constructor_args=given, batch_size=None, compute=pool, **_options(self.each)
        )
        yield from done.iter_rows()


class RayDrawing(Drawing):
    """The drawing of a job whose batches go to a cluster. This process writes what comes back."""

    def __init__(self, cluster: Cluster, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._cluster = cluster
        self.times.devices = cluster.devices * cluster.most

    def run(self, batches: Sequence[FilledBatch], rows: Sequence[Row], clock: CompileClock, leaving: Leaving) -> bool:
        """Draw the batches of these rows; return whether it was interrupted."""
        began = time.monotonic()
        left = {row.number: row for row in rows}
        with progress(len(rows), "draw", "images") as bar:
            try:
                for result in self._cluster.results(batches) if batches else ():
                    self._take(result, left, bar)
                    if leaving.told:
                        break
            except KeyboardInterrupt:
                return True
            finally:
                leaving.drawing = False
                self.times.drawing = time.monotonic() - began
        return bool(left)

    def _take(self, result: Mapping[str, Any], left: dict[int, Row], bar: Any) -> None:
        """Keep a picture, or say why there is none."""
        if result["row"] < 0:
            raise InputError(f"--engine ray: {result['told']}")
        row = left.pop(result["row"], None)
        if row is None:  # it has come before
            return
        if row.number in self.there:
            pass
        elif result["png"]:
            self._keep(row, result["png"], json.loads(result["told"]), bar)
            self.times.images += 1
        else:
            self._fail(row, result["told"], bar)
        bar.update(1)


class Painter:
    """An actor: it opens the model and the rows as the process that reads them does, and draws batches.

    What is wrong on its machine, such as a file that is not there, comes back as a row of number -1.
    """

    def __init__(
        self, config: Config, opening: Opening, methods: bytes, rows: list[Row], devices: int, folder: str
    ) -> None:
        from ray import cloudpickle

        from jaxmix.command import enable_compilation_cache

        self.error = ""
        try:
            if os.path.isdir(folder):  # paths of pictures and models are relative to it
                os.chdir(folder)
            enable_compilation_cache()
            mesh = opening.mesh(config.devices, len(rows))
            found = 1 if mesh is None else mesh.size
            if found != devices:
                raise InputError(f"found {found} devices, expected {devices} as on other machines, or --devices N")
            made: Methods = cloudpickle.loads(methods)
            for method in made.all:
                method.prepare()
            pipe, common, rows, bad = opening.prepare(config, rows, lambda: opening.model(config), made)
            self.bad = {row.number: str(row) for row in bad}
            self.rows = {row.number: row for row in rows}
            self.buckets = {row.number: bucket for bucket in made.buckets(rows) for row in bucket.rows}
            self.drawing = Collected(pipe, mesh, config.tile, made, Path(), common)
        except InputError as error:
            self.error = _where(error)

    def __call__(self, given: Mapping[str, Sequence[str]]) -> Iterator[dict[str, np.ndarray]]:
        """Draw batches, named by the numbers of their rows."""
        for text in given["batches"]:
            made = [(-1, b"", self.error)]
            if not self.error:
                try:
                    made = self.drawing.draw([self._batch(spec) for spec in json.loads(text)])
                except InputError as error:
                    made = [(-1, b"", _where(error))]
            numbers, pngs, told = zip(*made, strict=True)
            yield {"row": np.array(numbers), "png": np.array(pngs, object), "told": np.array(told, object)}

    def _batch(self, spec: Mapping[str, Any]) -> FilledBatch:
        for number, mark in zip(spec["rows"], spec["marks"], strict=True):
            if number in self.bad:
                raise InputError(self.bad[number])
            if self.rows[number].mark != mark:
                raise InputError(f"row {number}: found other pictures or another model than where rows are read")
        filled = [self.rows[number] for number in spec["rows"]]
        kept, groups = np.asarray(spec["kept"]), tuple(spec["groups"])
        return FilledBatch(self.buckets[filled[0].number], filled, kept, groups)


class Collected(Drawing):
    """A drawing that writes nothing: its pictures are handed over."""

    def __init__(self, pipe: Any, mesh: Any, tile: int | None, methods: Methods, out: Path, common: Any) -> None:
        super().__init__(pipe, mesh, tile, methods, out, None, common)  # type: ignore[arg-type]
        self._made: list[tuple[int, bytes, str]] = []

    def draw(self, batches: Sequence[FilledBatch]) -> list[tuple[int, bytes, str]]:
        """Return (row, PNG, what its line says besides settings) of all rows, or (row, b"", what is wrong)."""
        self._made, self._writers = [], Writers()
        with CompileClock() as clock:
            self.run(batches, [row for batch in batches for row in batch.rows], clock, Leaving(lambda *_: None))
        return self._made

    def _keep(self, row: Row, content: bytes, extra: Mapping[str, Any], bar: Any) -> None:
        self._made.append((row.number, content, json.dumps(extra)))

    def _beside(self, row: Row, image: np.ndarray) -> None:
        pass  # made at the end, where the pictures are

    def _fail(self, row: Row, reason: str, bar: Any) -> None:
        self._made.append((row.number, b"", reason))


def _spec(batch: FilledBatch) -> dict[str, Any]:
    """Return a batch in numbers."""
    rows, marks = [row.number for row in batch.filled], [row.mark for row in batch.filled]
    return {"rows": rows, "marks": marks, "kept": batch.kept.tolist(), "groups": list(batch.groups)}


def _where(error: InputError) -> str:
    return f"on machine {platform.node()}: {error}"


def _count_devices(opening: Opening, devices: int | None, images: int) -> int | str:
    """Return how many devices share a batch here, or why none does."""
    try:
        mesh = opening.mesh(devices, images)
    except InputError as error:
        return _where(error)
    return 1 if mesh is None else mesh.size


def resources_of(text: str) -> dict[str, float]:
    """Return the resources in text such as TPU=4 or GPU=1,CPU=8; raises InputError for what is none."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        try:
            amount = float(number)
        except ValueError:
            amount = math.nan
        if not re.fullmatch(r"[A-Za-z][\w:.-]*", name) or not equals or not 0 < amount < math.inf or name in found:
            raise InputError(f"--resources: found {text!r}, expected as in TPU=4, GPU=1 or CPU=2")
        found[name.upper() if name.upper() in ("CPU", "GPU", "TPU") else name] = amount
    return found


def _usual(machines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return what an actor takes if nobody says: the chips of a TPU host, else a GPU, else a CPU core."""
    for kind, amount in (("TPU", max((machine.get("TPU", 0) for machine in machines), default=0)), ("GPU", 1)):
        if amount and any(machine.get(kind, 0) >= amount for machine in machines):
            return {kind: amount}
    return {"CPU": 1}


def _fitting(each: Mapping[str, float], machine: Mapping[str, float]) -> int:
    return min(int(machine.get(name, 0) / amount) for name, amount in each.items())


def _shown(resources: Mapping[str, float]) -> str:
    kinds = {name: amount for name, amount in resources.items() if name in ("CPU", "GPU", "TPU")} or resources
    return ",".join(f"{name}={amount:g}" for name, amount in kinds.items())


def _options(each: Mapping[str, float]) -> dict[str, Any]:
    """Return the resources of a task or an actor as Ray names them."""
    names = {"CPU": "num_cpus", "GPU": "num_gpus"}
    own = {name: amount for name, amount in each.items() if name not in names}
    return {names[name]: each[name] for name in names if name in each} | ({"resources": own} if own else {})
