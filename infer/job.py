"""A job from rows to pictures, shared by all commands here."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infer.flags import Config
from infer.manifest import Manifest
from infer.measure import CompileClock
from infer.methods import method as made
from infer.methods.registry import Bucket, Methods
from infer.pictures import open_picture, picture_size
from infer.png import setting_chunks, write_png
from infer.report import Times, summary, write_overview
from infer.rows import BadRow, Defaults, Row, check_steps, read_rows, rows_of_objects, rows_of_prompts
from jaxmix.command import enable_compilation_cache, progress
from jaxmix.pipeline.batching import pack
from jaxmix.samplers import image_to_image_start, make_solver
from jaxmix.types import InputError

BUILTIN_PROMPTS = Path(__file__).with_name("prompts.txt")


class FilledBatch(NamedTuple):
    """Rows of a bucket to draw together, with repetitions to fill up the batch, and the places of those that count."""

    bucket: Bucket
    filled: list[Row]
    kept: np.ndarray
    groups: tuple[int, ...]

    @property
    def rows(self) -> list[Row]:
        """The rows, each once."""
        return [self.filled[i] for i in self.kept]


def run_job(config: Config, wanted: str = "") -> int:
    """Do a whole job: read the rows, load the model, draw. Returns the exit status.

    `wanted` names the method by which each row must be drawn, in the commands for a single method.
    """
    # Rows come first: loading a model takes seconds, and a misspelt file name should not have to wait for it.
    methods = Methods(config, wanted)
    rows, bad = collect_rows(config, methods)
    mesh = choose_mesh(config.devices, len(rows))
    import jaxmix

    for method in methods.all:
        method.prepare()
    return draw(config, rows, bad, lambda: jaxmix.load(config.model, dtype=config.dtype), mesh, methods)


def collect_rows(config: Config, methods: Methods) -> tuple[list[Row], list[BadRow]]:
    """Return the job's good and bad rows; raises InputError if the job as a whole cannot be read."""
    defaults = Defaults(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Defaults)})
    fields = methods.fields
    named = next((found for m in methods.all if (found := m.objects()) is not None), None)
    if named is not None and config.prompts is None:
        prompt = {} if config.prompt is None else {"prompt": config.prompt}
        rows, bad = rows_of_objects([(where, {**prompt, **held}) for where, held in named], defaults, fields)
    elif config.prompt is not None:
        rows, bad = rows_of_prompts([config.prompt], defaults, fields)
    elif config.prompts is None and methods.wanted is not None:
        raise InputError(methods.wanted.needs_rows)
    else:
        chosen = BUILTIN_PROMPTS if config.prompts in (None, "builtin") else Path(config.prompts)
        rows, bad = read_rows(chosen, defaults, fields)
    rows = methods.arrange(rows)
    if not bad:  # a bad row may be the one a flag is meant for
        methods.check_flags(rows)
    return rows, bad


def choose_mesh(devices: int | None, images: int) -> Any:
    """Return a data-parallel mesh over `devices` devices (None: all, up to one per image), or None for one device."""
    import jax

    there = jax.devices()
    count = max(1, min(len(there), images)) if devices is None else devices
    if count > len(there):
        raise InputError(f"--devices: found {count}, expected at most the {len(there)} here ({there[0].platform})")
    if count == 1:
        return None  # without a mesh nothing is partitioned
    from jaxmix.sharding import data_mesh

    return data_mesh(count)


def draw(
    config: Config,
    rows: Sequence[Row],
    bad: Sequence[BadRow],
    load: Callable[[], Any],
    mesh: Any = None,
    methods: Methods | None = None,
) -> int:
    """Draw all good rows with the pipeline that `load` returns, and write everything into config.out.

    Returns 2 if there were bad rows, else 0. Raises InputError if nothing can be drawn.
    """
    started = time.monotonic()
    methods = methods or Methods(config)
    refuse(config, rows, bad)
    cache = enable_compilation_cache()
    clock = CompileClock()
    with clock:
        pipe = load()
        for method in methods.all:
            method.open(pipe)
        rows, unfit = complete(rows, pipe, methods)
        bad = sorted([*bad, *unfit], key=lambda row: row.number)
        refuse(config, rows, bad)
        report(bad)
        cuts = warn_of_cuts(pipe, rows)

        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        common = {"model": config.model, "dtype": config.dtype}
        manifest = Manifest(out, resume=config.resume)
        done = [manifest.holds(row.file_name, {**methods.settings(row), **common}) for row in rows]
        todo = methods.undone(rows, done)
        batches = plan(config, rows, todo, mesh, methods, pipe)
        if config.dry_run:
            return 2 if bad else 0
        for failed in bad:
            manifest.add_error(failed.number, failed.where, failed.reason)
        times = Times()
        drawing_from, compiled_before = time.monotonic(), clock.seconds
        with progress(len(todo), "draw", "images") as bar:
            for part in batches:
                images, shape = render(pipe, part, mesh, config.tile, times, clock)
                begun = time.monotonic()
                for row, image in zip(part.rows, images, strict=True):
                    settings = {**methods.settings(row), **common}
                    height, width = image.shape[:2]
                    chunks = setting_chunks(settings, (width, height))
                    size_bytes = write_png(out / row.file_name, image, chunks)
                    for method in methods.of(row):
                        method.write_inputs(row, out)
                    extra = {"width": width, "height": height, "latents": shape, "bytes": size_bytes}
                    manifest.add_image(row.file_name, settings, extra | ({"cut": cuts[row]} if row in cuts else {}))
                times.png += time.monotonic() - begun
                times.images += len(part.rows)
                bar.update(len(part.rows))
    times.drawing = time.monotonic() - drawing_from - (clock.seconds - compiled_before)
    times.compile = clock.seconds
    times.whole = time.monotonic() - started
    write_overview(out, config.model, rows, bad, manifest, times, cuts, methods)
    print(f"wrote {out / 'gallery.html'}, contact_sheet.png, manifest.jsonl and {times.images} PNGs")
    print(summary(times, clock, cached=cache is not None))
    return 2 if bad else 0


def complete(rows: Sequence[Row], pipe: Any, methods: Methods) -> tuple[list[Row], list[BadRow]]:
    """Fill in what follows from the model and the rows' pictures, and sort out rows that this model cannot draw."""
    good, bad = [], []
    most, factor = pipe.schedule.num_train_timesteps, pipe.vae.config.factor
    for row in rows:
        try:
            height, width = (side * factor for side in pipe.latent_shape[:2])
            if row.image is not None:
                height, width = picture_size(row.image, factor)
            own = {"steps": pipe.default_steps, "guidance_scale": float(pipe.default_guidance_scale)}
            own |= {"sampler": pipe.sampler, "height": height, "width": width}
            whole: Any = methods.settle(row, own)
            check_steps("steps", whole.steps, most)
            for key in ("height", "width"):
                if (pixels := getattr(whole, key)) % factor:
                    raise InputError(f"{key}: found {pixels}, expected a multiple of {factor} pixels")
            if row.image is not None:
                image_to_image_start(whole.steps, row.strength)
            open_pictures([whole])
            make_solver(whole.sampler, pipe.schedule, whole.steps)
            whole = methods.complete(whole, pipe)
        except InputError as error:
            bad.append(BadRow(row.number, row.where, str(error)))
            continue
        good.append(whole)
    bad += methods.check(pipe, good, request)
    failed = {row.number for row in bad}
    return [row for row in good if row.number not in failed], bad


def warn_of_cuts(pipe: Any, rows: Sequence[Row]) -> dict[Row, str]:
    """Print a line for each prompt too long for the text encoder; return the words that each row lost."""
    cuts: dict[Row, str] = {}
    prompts = [(row, text) for row in rows for text in row.texts]
    for key, read in (("prompt", prompts), ("negative_prompt", [(row, row.negative_prompt) for row in rows])):
        _, cut = pipe.tokenize([text for _, text in read])
        for (row, _), words in zip(read, cut, strict=True):
            if words:
                print(f"warning: {row.where}: {key} is too long for the model; cut off: {words!r}", file=sys.stderr)
                cuts[row] = "; ".join(filter(None, (cuts.get(row), words)))
    return cuts


def request(rows: Sequence[Row]) -> Any:
    """Return the `jaxmix.Request` of completed rows that share their program, before methods extend it."""
    import jaxmix

    first = rows[0]
    return jaxmix.Request(
        prompts=[row.texts[0] for row in rows],
        negatives=[row.negative_prompt or None for row in rows],
        seeds=[row.seed for row in rows],
        guidance_scale=[row.guidance_scale for row in rows],  # type: ignore[misc]
        guidance_rescale=[row.guidance_rescale for row in rows],
        steps=first.steps,
        sampler=first.sampler,
        height=first.height,
        width=first.width,
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
        pictures["masks"] = np.stack([open_picture(row.mask, row.height, row.width, mask=True) for row in rows])
    return pictures


def render(
    pipe: Any, batch: FilledBatch, mesh: Any, tile: int | None, times: Times, clock: CompileClock
) -> tuple[np.ndarray, list[int]]:
    """Draw rows that share their program; return images (b, H, W, 3) uint8 and the latents' shape of one image."""
    asked = request(batch.filled)
    latents = pipe.draw(asked, build(pipe, asked, batch), mesh=mesh, output="latent")
    begun, compiled_before = time.monotonic(), clock.seconds
    cells = None if tile is None else max(1, tile // pipe.vae.config.factor)
    images = np.asarray(pipe.decode(latents, mesh=mesh, tile=cells))
    times.decode += time.monotonic() - begun - (clock.seconds - compiled_before)
    return images[batch.kept], list(latents.shape[1:])


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


def plan(
    config: Config, rows: Sequence[Row], todo: Sequence[Row], mesh: Any, methods: Methods, pipe: Any
) -> list[FilledBatch]:
    """Return the batches, after printing what each program will draw, before anything is compiled."""
    held = []
    kept = len(rows) - len(todo)
    devices = 1 if mesh is None else mesh.size
    print(
        f"plan: {len(todo)} images with {config.model} into {config.out}/"
        + (f", {kept} kept from before" if kept else "")
        + f", {devices} device{'s' * (devices > 1)}"
    )
    for bucket in methods.buckets(todo):
        first = bucket.rows[0]
        parts = list(batches_of(bucket, config.batch_size, devices))
        held += parts
        size, batches = len(parts[0].filled), len(parts)
        start = "" if first.image is None else f", strength {first.strength:g}" + ", masked" * (first.mask is not None)
        row_of = {m: next(row for row in bucket.rows if m in methods.of(row)) for m in bucket.methods}
        start += "".join(f", {method.plan(row)}" for method, row in row_of.items())
        note = "".join(method.note(pipe, bucket.rows, size) for method in bucket.methods)
        print(
            f"  {first.steps} steps of {first.sampler}, {first.width}x{first.height}{start}: {len(bucket.rows)} images "
            f"in {batches} batch{'es' * (batches > 1)} of {size}{note}",
            flush=True,
        )
    return held


def batches_of(bucket: Bucket, size: int, devices: int) -> Iterator[FilledBatch]:
    """Cut a bucket into batches of one size: a multiple of the devices, no more than needed, and whole groups."""
    n = len(bucket.rows)
    size = -(-min(size, n) // devices) * devices
    if bucket.groups is not None:  # a group is drawn on one device, whatever the size
        size = max(size, devices * max(bucket.groups))
    for batch in pack(n, size, devices, bucket.groups):
        yield FilledBatch(bucket, [bucket.rows[i] for i in batch.rows], batch.kept, batch.groups)


def refuse(config: Config, rows: Sequence[Row], bad: Sequence[BadRow]) -> None:
    """Raise InputError, after listing the bad rows, if nothing is to be drawn."""
    if rows and not (bad and config.strict):
        return
    report(bad)
    raise InputError("no row can be drawn" if not rows else "nothing drawn: found bad rows with --strict")


def report(bad: Sequence[BadRow]) -> None:
    """List bad rows on stderr, one line each."""
    for row in bad:
        print(f"bad row: {row}", file=sys.stderr)
