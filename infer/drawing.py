"""Batches to files: each is drawn, decoded and written; what cannot be drawn is recorded, and the job goes on.

One batch is always ahead: the device draws it while the host writes the last one and prepares the next.
"""

from __future__ import annotations

import collections
import errno
import functools
import sys
import threading
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infer.ahead import DeviceClock, Writers, ticking
from infer.batches import FilledBatch, halves
from infer.leaving import Leaving
from infer.manifest import Manifest
from infer.measure import CompileClock
from infer.methods import method as made
from infer.methods.registry import Methods
from infer.outlook import devices_of
from infer.pictures import open_picture
from infer.png import png_bytes, setting_chunks, write_whole
from infer.report import Times
from infer.rows import BadRow, Row
from infer.thumbnails import write_beside
from jaxmix.command import format_seconds, progress
from jaxmix.pipeline.batching import start_bytes
from jaxmix.types import NOT_FINITE

RETRIES = (1.0, 5.0, 15.0)
"""Seconds between attempts to write where that fails for a reason that may pass."""
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN)


class Started(NamedTuple):
    """A batch that the device has been given: its images uint8 and which are finite, perhaps unfinished.

    `since` says when, `compiled` how many seconds had gone into compiling by then, and `compiling` how many this took.
    """

    batch: FilledBatch
    images: Any
    finite: Any
    since: float
    compiled: float
    compiling: float


class Drawing:
    """The part of a job in which pictures are made.

    `failed` are rows that turned out not to be drawable, `times` what the others took. Of the rows whose numbers are in
    `there`, which are drawn only because others of their group are not, nothing is written again.
    """

    def __init__(
        self,
        pipe: Any,
        mesh: Any,
        tile: int | None,
        methods: Methods,
        out: Path,
        manifest: Manifest,
        common: Mapping[str, Any],
        there: Container[int] = frozenset(),
    ) -> None:
        self.pipe, self.mesh, self.tile, self.methods = pipe, mesh, tile, methods
        self.out, self.manifest, self.common, self.there = out, manifest, common, there
        self.times = Times(devices=1 if mesh is None else mesh.size)
        self.failed: list[BadRow] = []
        self._left: collections.deque[FilledBatch] = collections.deque()
        self._writers, self._given = Writers(), collections.deque[Started]()
        self._gave_up = False
        self._lock = threading.Lock()  # of what writers change
        self._on_device: tuple[FilledBatch, float] | None = None  # and since when
        self._took: dict[int, float] = {}  # seconds of a batch of each bucket
        self._ended = 0.0, 0.0  # when the last batch was drawn, and the seconds of compiling by then
        self._told = False  # how long the others will take

    def run(self, batches: Sequence[FilledBatch], rows: Sequence[Row], clock: CompileClock, leaving: Leaving) -> bool:
        """Draw the batches of these rows; return whether it was interrupted.

        The device is given the next batch before the pictures of the last one are asked for; none once the job is told
        to end.
        """
        began, compiled = time.monotonic(), clock.seconds
        self._left = collections.deque(batches)
        interrupted = False
        with progress(len(rows), "draw", "images") as bar, DeviceClock(lambda: clock.seconds) as device:
            writers, given = self._writers, self._given
            try:
                self._begin(rows)
                with ticking(lambda: self._tell(bar)):
                    while (more := bool(self._left) and not leaving.told) or given:
                        if more and (started := self._start(self._left.popleft(), device, clock, bar)) is not None:
                            given.append(started)
                        if given and (len(given) > 1 or not self._left or leaving.told):
                            self._finish(given, writers, clock, bar)
                interrupted = bool(self._left)
            except KeyboardInterrupt:
                interrupted = True
                while given and given[0].finite.is_ready():
                    self._finish(given, writers, clock, bar)
            finally:
                writers.close()
            writers.check()
        leaving.drawing = False
        self.times.drawing = time.monotonic() - began - (clock.seconds - compiled)
        self.times.waited = device.share
        return interrupted

    def _begin(self, rows: Sequence[Row]) -> None:
        """Make what rows have in common, once for all of them."""
        self.methods.begin(self.pipe, rows)

    def _start(self, batch: FilledBatch, device: DeviceClock, clock: CompileClock, bar: Any) -> Started | None:
        """Hand a batch to the device; None if it does not fit into memory: smaller ones then stand in its place."""
        since, compiled = time.monotonic(), clock.seconds
        self._on_device = self._on_device or (batch, since)
        try:
            asked = request(batch.filled)
            cells = cells_of(self.tile, self.pipe.vae.config.factor)
            methods = build(self.pipe, asked, batch)
            images = self.pipe.draw(asked, methods, mesh=self.mesh, tile=cells, output="device")
            images, finite = start_bytes(images)
        except Exception as error:
            self._split(batch, error, bar)
            return None
        device.started(images)
        return Started(batch, images, finite, since, compiled, clock.seconds - compiled)

    def _finish(self, given: collections.deque[Started], writers: Writers, clock: CompileClock, bar: Any) -> None:
        """Wait for the first of the batches that the device has, and have its pictures written."""
        batch = given[0].batch
        try:
            images, finite = np.asarray(given[0].images), np.asarray(given[0].finite)
        except Exception as error:
            given.popleft()
            self._split(batch, error, bar)
            return
        started = given.popleft()  # now: an interruption may come while it waits
        now = time.monotonic()
        took = self._measured(started, now, clock.seconds)
        self._ended = now, clock.seconds
        if took is not None:
            self._took[id(batch.bucket)] = took
        self._on_device = (given[0].batch, now) if given else None
        if took is not None and not self._told and (left := bar.total - bar.done - len(batch.rows)) > 0:
            self._told = True
            told = format_seconds(left * took / len(batch.rows))
            bar.write(f"expected time: {told} for the other {left} images, as this batch took, without compiling")
        each = None if took is None else took / len(batch.rows)
        for row, place in self._wanted(batch):
            if finite[place]:
                writers.hand(functools.partial(self._write, row, images[place], bar, each))
            else:
                self._fail(row, f"the result {NOT_FINITE}", bar)
        bar.update(len(batch.rows))
        writers.check()

    def _wanted(self, batch: FilledBatch) -> Iterator[tuple[Row, int]]:
        """Yield the rows of a batch whose pictures are not there yet, and their places."""
        for row, place in zip(batch.rows, batch.kept, strict=True):
            if row.number not in self.there:
                yield row, place

    def _measured(self, started: Started, now: float, compiled: float) -> float | None:
        """Return the seconds that the device took for a batch, None if another was compiled while it worked."""
        ended, by_then = self._ended
        if started.since >= ended:  # it was compiled, and then the device began
            seconds, other = now - started.since - started.compiling, compiled - started.compiled - started.compiling
        else:  # the device began when it had done the one before
            seconds, other = now - ended, compiled - by_then
        return max(0.0, seconds) if other <= 0.05 * max(seconds, 0.0) else None

    def _split(self, batch: FilledBatch, error: Exception, bar: Any) -> None:
        """Put batches of half its size in the place of one that did not fit into memory; raises other errors."""
        if not _out_of_memory(error):
            raise error
        self._on_device = None
        smaller = self._halved(batch)
        if smaller != [batch]:
            bar.write(f"out of memory with {len(batch.filled)} images at a time, trying {len(smaller[0].filled)}")
            # So are the others, which would run out of memory, too.
            rest = [self._halved(other) if other.bucket is batch.bucket else [other] for other in self._left]
            self._left = collections.deque([*smaller, *(part for parts in rest for part in parts)])
            return
        for row in batch.rows:
            self._fail(row, f"out of memory with {len(batch.filled)} images at a time", bar)
        bar.update(len(batch.rows))

    def salvage(self) -> None:
        """Write, from another thread, what the device has drawn while the main one is at what cannot be interrupted."""
        for started in [*self._given]:
            if started.finite.is_ready():
                images, finite = np.asarray(started.images), np.asarray(started.finite)
                for row, place in self._wanted(started.batch):
                    if finite[place]:
                        self._write(row, images[place], sys.stderr, None)
        self._writers.wait()

    def _tell(self, bar: Any) -> None:
        """Say which step the device is at if the batch takes as long as the last such one, or for how long it runs."""
        if (now := self._on_device) is None:
            return
        batch, since = now
        took, steps = self._took.get(id(batch.bucket)), batch.filled[0].steps or 1
        passed = time.monotonic() - since
        if took is None:
            bar.tick(f"first batch of its kind, {passed:.0f} s")
        else:
            bar.tick(f"about step {min(steps, 1 + int(steps * passed / max(took, 1e-9)))} of {steps}")

    def _write(self, row: Row, image: np.ndarray, bar: Any, took: float | None) -> None:
        """Make the PNG of a picture, in a thread of its own, and keep it; drawing it `took` so many seconds."""
        began = time.monotonic()
        height, width = image.shape[:2]
        content = png_bytes(image, setting_chunks(self.settings(row), (width, height)))
        factor = self.pipe.vae.config.factor
        shape = [height // factor, width // factor, self.pipe.latent_shape[-1]]
        extra: dict[str, Any] = {"width": width, "height": height, "latents": shape, "bytes": len(content)}
        if took is not None:
            extra |= {"seconds": round(took, 4), "devices": devices_of(self.times.devices)}
        self._keep(row, content, extra, bar)
        self._beside(row, image)
        with self._lock:
            self.times.images += 1
            self.times.png += time.monotonic() - began

    def _beside(self, row: Row, image: np.ndarray) -> None:
        """Write the small copy of a picture."""
        write_beside(self.out, row.file_name, image)

    def settings(self, row: Row) -> dict[str, Any]:
        """Return all settings of a row, as its PNG holds them."""
        return {**self.methods.settings(row), **self.common}

    def _keep(self, row: Row, content: bytes, extra: Mapping[str, Any], bar: Any) -> None:
        """Write a PNG, and then its line; wait a while where the place for it is full or away."""

        def write() -> None:
            for method in self.methods.of(row):  # first: a picture that is there has them beside it
                method.write_inputs(row, self.out)
            write_whole(self.out / row.file_name, content)
            with self._lock:
                self.manifest.add_image(row.file_name, self.settings(row), extra)

        for seconds in (*RETRIES, None):
            try:
                return write()
            except OSError as error:
                if error.errno not in PASSING or seconds is None or self._gave_up:
                    self._gave_up = True  # nor do pictures wait that other threads have
                    raise
                bar.write(f"{error.filename or self.out}: {error.strerror}, trying again in {seconds:g} s")
            time.sleep(seconds)

    def _fail(self, row: Row, reason: str, bar: Any) -> None:
        bad = BadRow(row.number, row.where, reason)
        self.failed.append(bad)
        with self._lock:
            self.manifest.add_error(bad.number, bad.where, bad.reason)
        bar.write(f"bad row: {bad}")

    def _halved(self, batch: FilledBatch) -> list[FilledBatch]:
        """Return a batch in halves, or itself if it has none."""
        return halves(batch, 1 if self.mesh is None else self.mesh.size, self.methods) or [batch]


def request(rows: Sequence[Row]) -> Any:
    """Return the `jaxmix.Request` of completed rows that share their program, before methods extend it."""
    import jaxmix

    first = rows[0]
    return jaxmix.Request(
        prompts=[row.texts[0] for row in rows],
        negatives=[row.negative_prompt for row in rows],
        seeds=[row.seed for row in rows],
        guidance_scale=[row.guidance_scale for row in rows],  # type: ignore[misc]
        guidance_rescale=[row.guidance_rescale for row in rows],
        steps=first.steps,
        sampler=first.sampler,
        spacing=first.spacing,
        eta=first.eta,
        height=first.height,
        width=first.width,
        prompts_2=None if all(row.prompt_2 is None for row in rows) else [row.prompt_2 for row in rows],
        negatives_2=None if all(row.negative_prompt_2 is None for row in rows) else [r.negative_prompt_2 for r in rows],
        syntax=first.prompt_syntax,
        max_chunks=None,
        clip_skip=first.clip_skip,
        **open_pictures(rows),
    )


def open_pictures(rows: Sequence[Any]) -> dict[str, Any]:
    """Return the start pictures of rows that share their program, as arguments of a request."""
    first = rows[0]
    pictures: dict[str, Any] = {}
    if first.image is not None:
        pictures["images"] = np.stack([open_picture(row.image, row.height, row.width) for row in rows])
        pictures["strength"] = first.strength
    if first.mask is not None:
        pictures["masks"] = np.stack([open_picture(row.mask, row.height, row.width, mask=True) > 127 for row in rows])
    return pictures


def build(pipe: Any, asked: Any, batch: FilledBatch) -> list[Any]:
    """Return the `jaxmix.Method`s of a batch; their inversions use the weights of the batch."""
    from jaxmix.pipeline.request import WEIGHTS

    methods, weights = batch.bucket.methods, batch.bucket.weights
    rows = made.BatchRows(batch.filled, batch.groups, frozenset(method.name for method in methods), weights)
    of_model = [one for method in methods if method.part_of_model for one in method.build(pipe, rows)]
    for one in of_model:
        if one.when == WEIGHTS:
            asked = one.apply(pipe, asked)
    pipe = pipe.merged(asked.weights) if of_model else pipe  # cached, so that drawing need not merge again
    return [*of_model, *(one for method in methods if not method.part_of_model for one in method.build(pipe, rows))]


def cells_of(tile: int | None, factor: int) -> int | None:
    """Return the side of the decoder's tiles in latent cells."""
    return None if tile is None else max(1, tile // factor)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
