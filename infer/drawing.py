"""Batches to files: each is drawn, decoded and written; what cannot be drawn is recorded, and the job goes on."""

from __future__ import annotations

import collections
import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infer.batches import FilledBatch, halves
from infer.manifest import Manifest
from infer.measure import CompileClock
from infer.methods import method as made
from infer.methods.registry import Methods
from infer.pictures import open_picture
from infer.png import setting_chunks, write_png
from infer.report import Times
from infer.rows import BadRow, Row
from jaxmix.command import progress
from jaxmix.types import NOT_FINITE


class Drawing:
    """The part of a job in which pictures are made.

    `failed` are rows that turned out not to be drawable, `times` what the others took.
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
    ) -> None:
        self.pipe, self.mesh, self.tile, self.methods = pipe, mesh, tile, methods
        self.out, self.manifest, self.common = out, manifest, common
        self.times = Times()
        self.failed: list[BadRow] = []

    def run(self, batches: Sequence[FilledBatch], images: int, clock: CompileClock) -> bool:
        """Draw batches with so many images in all; return whether it was interrupted."""
        began, compiled = time.monotonic(), clock.seconds
        left = collections.deque(batches)
        interrupted = False
        with progress(images, "draw", "images") as bar, _interruptible():
            try:
                while left:
                    batch = left.popleft()
                    smaller = self._draw(batch, clock, bar)
                    if smaller:  # so are the others, which would run out of memory, too
                        rest = [self._halved(other) if other.bucket is batch.bucket else [other] for other in left]
                        left = collections.deque([*smaller, *(part for parts in rest for part in parts)])
            except KeyboardInterrupt:
                interrupted = True
        self.times.drawing = time.monotonic() - began - (clock.seconds - compiled)
        return interrupted

    def _draw(self, batch: FilledBatch, clock: CompileClock, bar: Any) -> list[FilledBatch]:
        """Draw and write a batch; return smaller ones in its place if it did not fit into memory."""
        try:
            images, shape = self._render(batch, clock)
        except Exception as error:
            if not _out_of_memory(error):
                raise
            smaller = self._halved(batch)
            if smaller != [batch]:
                bar.write(f"out of memory with {len(batch.filled)} images at a time, trying {len(smaller[0].filled)}")
                return smaller
            for row in batch.rows:
                self._fail(row, f"out of memory with {len(batch.filled)} images at a time", bar)
            bar.update(len(batch.rows))
            return []
        began = time.monotonic()
        for row, image in zip(batch.rows, images, strict=True):
            if not np.isfinite(image).all():
                self._fail(row, f"the result {NOT_FINITE}", bar)
                continue
            self._write(row, np.round(image * np.float32(255)).astype(np.uint8), shape)
            self.times.images += 1
        self.times.png += time.monotonic() - began
        bar.update(len(batch.rows))
        return []

    def _render(self, batch: FilledBatch, clock: CompileClock) -> tuple[np.ndarray, list[int]]:
        """Draw rows that share their program; return images (b, H, W, 3) in [0, 1] and the latents' shape of one."""
        asked = request(batch.filled)
        latents = self.pipe.draw(asked, build(self.pipe, asked, batch), mesh=self.mesh, output="latent")
        began, compiled = time.monotonic(), clock.seconds
        cells = cells_of(self.tile, self.pipe.vae.config.factor)
        images = self.pipe.decode(latents, mesh=self.mesh, tile=cells, output="float")
        self.times.decode += time.monotonic() - began - (clock.seconds - compiled)
        return images[batch.kept], list(latents.shape[1:])

    def _write(self, row: Row, image: np.ndarray, shape: list[int]) -> None:
        settings = {**self.methods.settings(row), **self.common}
        height, width = image.shape[:2]
        for method in self.methods.of(row):  # first: a picture that is there has them beside it
            method.write_inputs(row, self.out)
        size_bytes = write_png(self.out / row.file_name, image, setting_chunks(settings, (width, height)))
        extra: dict[str, Any] = {"width": width, "height": height, "latents": shape, "bytes": size_bytes}
        self.manifest.add_image(row.file_name, settings, extra)

    def _fail(self, row: Row, reason: str, bar: Any) -> None:
        bad = BadRow(row.number, row.where, reason)
        self.failed.append(bad)
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


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let a polite request to end (SIGTERM, as from a scheduler) be what Ctrl-C is."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
