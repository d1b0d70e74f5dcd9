"""A checked request drawn batch by batch by a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmix import rows as over
from jaxmix.pipeline import programs, showing
from jaxmix.pipeline.batching import Batch, on_host, pack_alike, warn_of_broken
from jaxmix.pipeline.job import denoise
from jaxmix.pipeline.request import WEIGHTS, Method, Request
from jaxmix.pipeline.stacking import beside, common_groups
from jaxmix.sharding import DATA
from jaxmix.types import Array

GIVEN = "/jaxmix/draw/given"
"""The event (`jax.monitoring`) that a batch is given to the device: all that the host prepares is done."""


def draw_rows(
    pipe: Any,
    request: Request,
    methods: Sequence[Method],
    *,
    mesh: Mesh | None,
    output: str,
    batch_size: int | None,
    tile: int | None,
    watcher: showing.Watcher | None,
    progress: Any,
) -> Any:
    """Draw a checked request under methods in their order: `Pipeline.draw`, which has the meaning of everything."""
    done: list[tuple[np.ndarray, np.ndarray]] = []
    order: list[np.ndarray] = []
    waiting: tuple[Array, np.ndarray] | None = None
    left: list[Array] = []
    with showing.bar(progress, request.n) as told:
        for chunks, batch in _batches(pipe, request, methods, mesh, batch_size):
            part = dataclasses.replace(request, chunks=chunks)
            x, kept = _draw_batch(pipe, part, methods, batch, mesh, watcher)
            order.append(batch.rows[batch.kept])
            if output != "latent":
                x = programs.decode(pipe.vae, mesh, tile, pipe.params["vae"], x)
            if output == "device":
                left.append(x if np.array_equal(kept, np.arange(len(x))) else x[jnp.asarray(kept)])
                continue
            if waiting is not None:  # one batch behind, so that the device draws while the host copies pixels
                done.append(on_host(*waiting, output))
                told(sum(len(x) for x, _ in done), request.n)
            waiting = x, kept
        if left:
            return in_order(left, np.argsort(np.concatenate(order)))
        assert waiting is not None, "a request has an image"
        done.append(on_host(*waiting, output))
        told(request.n, request.n)
    back = np.argsort(np.concatenate(order))
    images, finite = (np.concatenate(parts)[back] for parts in zip(*done, strict=True))
    warn_of_broken(finite)
    return showing.as_pil(images) if output == "pil" else images


def in_order(parts: Sequence[Array], back: np.ndarray) -> jax.Array:
    """Return the images of batches on the device, in the order ``back``; what is in order already is not touched."""
    x = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return x if np.array_equal(back, np.arange(len(back))) else x[jnp.asarray(back)]


def _batches(
    pipe: Any, request: Request, methods: Sequence[Method], mesh: Mesh | None, batch_size: int | None
) -> list[tuple[int, Batch]]:
    """Return the batches, each with the number of chunks of its texts."""
    devices = 1 if mesh is None else mesh.shape[DATA]
    n, groups = request.n, common_groups(methods, request.n)
    counts = request.chunk_counts(pipe, beside(methods, n))
    if groups is None and over.looks_back(request.controls):
        counts[:] = counts.max()
    batches = list(pack_alike(counts, batch_size, devices, groups))
    if groups is None:
        over.check_together(request.controls, n, len(batches[0][1].rows) // devices)
    return batches


def _draw_batch(
    pipe: Any,
    request: Request,
    methods: Sequence[Method],
    batch: Batch,
    mesh: Mesh | None,
    watcher: showing.Watcher | None,
) -> tuple[Array, np.ndarray]:
    """Return the latents of a batch, and which of its rows to keep."""
    part, now, n = request.take(batch.rows), pipe, request.n
    for method in methods:
        if method.when > WEIGHTS:  # all edits at once: only one set is cached, and a part of it would evict it
            now = pipe.merged(part.weights)
        part = method.take(batch, n).apply(now, part)
    now = pipe.merged(part.weights)
    now.check_controls(part.controls, part.hw(now))
    solver = part.solver(pipe)
    kept = batch.kept if part.kept is None else np.asarray(part.kept)[batch.kept]
    job, watch = now.job(part, solver), None if watcher is None else watcher.watch
    with showing.watched(watcher, batch.rows[batch.kept], kept, solver.steps, mesh) as number:
        jax.monitoring.record_event(GIVEN)
        return denoise(job, solver, *part.span, mesh, watch, np.int32(number)), kept
