"""A job from rows to pictures, shared by all commands here."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import secrets
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infer.batches import plan
from infer.checks import check_steps
from infer.drawing import Drawing, cells_of, open_pictures, request
from infer.flags import Config
from infer.folder import Folder, digest, job_of
from infer.grid import read_axes
from infer.hosts import ALONE, Hosts, Presence, join
from infer.leaving import CLOSING, Leaving
from infer.leftovers import sweep
from infer.manifest import Manifest
from infer.measure import CompileClock
from infer.methods.method import size_of
from infer.methods.registry import Methods
from infer.outlook import outlook
from infer.pictures import picture_size
from infer.report import summary, write_overview
from infer.rows import BadRow, Defaults, Fields, Row, read_rows, rows_of_objects, rows_of_prompts
from infer.thumbnails import FOLDER
from infer.wording import chunks_of, with_embeddings
from jaxmix import paths
from jaxmix.command import enable_compilation_cache
from jaxmix.samplers import image_to_image_start, make_solver, split_sampler
from jaxmix.types import InputError, NotFiniteWarning

BUILTIN_PROMPTS = Path(__file__).with_name("prompts.txt")


def run_job(config: Config, wanted: str = "") -> int:
    """Do a whole job: read the rows, load the model, draw. Returns the exit status.

    `wanted` names the method by which each row must be drawn, in the commands for a single method.
    """
    engine = make_engine(config)
    hosts = join(config)

    # Rows come first: loading a model takes seconds, and a misspelt file name should not have to wait for it.
    def read() -> tuple[Methods, list[Row], list[BadRow], Any]:
        methods = Methods(config, wanted)
        rows, bad = collect_rows(config, methods)
        if engine is not None:
            engine.start(methods, rows)
        mesh = None if engine else choose_mesh(config.devices, -(-len(rows) // hosts.count))
        for method in methods.all:
            method.prepare()
        return methods, rows, bad, mesh

    def told(made: tuple[Methods, list[Row], list[BadRow], Any]) -> dict[str, str]:
        _, rows, bad, mesh = made
        seen = digest([[row.number, row.prompt, row.seed] for row in rows] + [[row.number] for row in bad])
        flags = {"flags": job_of(config, wanted), "--batch-size": str(config.batch_size)}
        return {"rows": f"{len(rows)} rows ({seen})", "devices": str(mesh.size if mesh else 1), **flags}

    methods, rows, bad, mesh = hosts.agreed(read, told)
    return draw(config, rows, bad, lambda: open_model(config), mesh, methods, hosts, engine)


def make_engine(config: Config) -> Any:
    """Return what draws in place of this process, None if nothing does."""
    if not config.on_ray:
        return None
    from infer.on_ray import Cluster, Opening

    return Cluster(config, Opening(choose_mesh, open_model, prepare))


def open_model(config: Config) -> Any:
    """Return the pipeline that the flags name."""
    import jaxmix

    return jaxmix.load(
        config.model,
        dtype=config.dtype,
        sampler=config.sampler,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.zero_snr,
        vae=config.vae,
        base=config.base,
    )


def collect_rows(config: Config, methods: Methods) -> tuple[list[Row], list[BadRow]]:
    """Return the job's good and bad rows; raises InputError if the job as a whole cannot be read."""
    defaults = Defaults(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Defaults)})
    fields = methods.fields
    asked = config.times, read_axes(config.set)
    named = next((found for m in methods.all if (found := m.objects()) is not None), None)
    if named is not None and config.prompts is None:
        prompt = {} if config.prompt is None else {"prompt": config.prompt}
        objects = [(where, {**prompt, **held}) for where, held in named]
        rows, bad = rows_of_objects(objects, defaults, fields, *asked)
    elif config.prompt is not None and (config.prompt.strip() or not _speaks_without(fields)):
        rows, bad = rows_of_prompts([config.prompt], defaults, fields, *asked)
    elif config.prompts is None and (_speaks_without(fields) or "prompt" in [axis.key for axis in asked[1]]):
        rows, bad = rows_of_objects([("the flags", {})], defaults, fields, *asked)
    elif config.prompts is None and methods.wanted is not None:
        raise InputError(methods.wanted.needs_rows)
    else:
        chosen = BUILTIN_PROMPTS if config.prompts in (None, "builtin") else config.prompts
        rows, bad = read_rows(chosen, defaults, fields, *asked)
    rows = methods.arrange(rows)
    if not bad:  # a bad row may be the one a flag is meant for
        methods.check_flags(rows)
    return rows, bad


def _speaks_without(fields: Fields) -> bool:
    """Return whether a flag gives every row what is enough without a prompt, such as a picture to follow."""
    return any(field.enough and field.default is not None for field in fields.values())


def choose_mesh(devices: int | None, images: int) -> Any:
    """Return a data-parallel mesh over `devices` devices (None: all, up to one per image), or None for one device."""
    import jax

    there = jax.local_devices()
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
    hosts: Hosts = ALONE,
    engine: Any = None,
) -> int:
    """Draw this process's share of the good rows with the pipeline that `load` returns, into the job's folder.

    Returns 130 if the job was interrupted, 1 if a process has died and left rows, 2 if there were bad rows, else 0.
    Raises InputError if nothing can be drawn.
    """
    started = time.monotonic()
    methods = methods or Methods(config)
    refuse(config, rows, bad)
    folder = open_folder(config, methods, rows, hosts)
    rows = folder.seeded(rows)
    if engine is not None:
        engine.rows = rows
    cache = enable_compilation_cache()
    clock = CompileClock()
    with clock, warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore", NotFiniteWarning)  # with their rows, by this job itself
        make = functools.partial(prepare, config, rows, load, methods)
        pipe, common, rows, unfit = hosts.agreed(make, lambda made: {"rows": digest([row.mark for row in made[2]])})
        bad = sorted([*bad, *unfit], key=lambda row: row.number)
        refuse(config, rows, bad)
        if hosts.first:
            report(bad)
        run = "" if config.dry_run else claim(folder, hosts)
        manifest = stack.enter_context(Manifest(folder.path))
        todo, there = undone(rows, manifest, methods, common, pipe, hosts)
        devices = engine.devices if engine is not None else 1 if mesh is None else mesh.size
        batches = plan(config, folder.path, rows, todo, devices, methods, pipe, hosts)
        tile = cells_of(config.tile, pipe.vae.config.factor)
        for line in outlook(batches, manifest, methods, pipe, devices, tile):
            print(f"  {line}", flush=True)
        if config.dry_run:
            return 2 if bad else 0
        for failed in bad if hosts.first else ():
            manifest.add_error(failed.number, failed.where, failed.reason)
        presence = stack.enter_context(Presence(folder.path, hosts, run)) if hosts.together else None
        hosts.leave()
        mine = [row for batch in batches for row in batch.rows]
        drawing = (Drawing if engine is None else engine.drawing)(
            pipe, mesh, config.tile, methods, folder.path, manifest, common, there
        )

        def left() -> str:
            wanted = sum(row.number not in there for row in mine)
            return f"{drawing.times.images} of {wanted} images{{}}; go on with: {folder.again()}"

        def last(name: str, seconds: float) -> None:
            saving = threading.Thread(target=drawing.salvage, daemon=True)
            saving.start()
            saving.join(CLOSING)
            if presence is not None:
                presence.end()
            sweep(folder.path, own=True)
            told = f"told to end ({name}), and {seconds:g} s were not enough for what was in hand: "
            print(f"\n{told}{left().format(' are written')}", file=sys.stderr, flush=True)

        leaving = stack.enter_context(Leaving(last).watched())
        try:
            interrupted = drawing.run(batches, mine, clock, leaving)
        except (OSError, InputError):
            print(left().format(" are written"), file=sys.stderr)
            raise
        manifest.close()
        dead: list[int] = []
        if presence is not None:
            presence.end()
            dead = presence.wait(lambda: bool(leaving.told))
        failed_rows = {row.number: row for row in [*bad, *drawing.failed]}
        for error in manifest.refresh():  # of other processes
            failed_rows.setdefault(error[0], BadRow(*error))
        bad = [failed_rows[number] for number in sorted(failed_rows)]
        times = drawing.times
        times.compile = clock.seconds
        times.whole = time.monotonic() - started
        if not hosts.together or {*range(hosts.index)} <= {*dead}:
            if presence is not None:
                presence.clear()
            write_overview(folder.path, config.model, rows, bad, manifest, times, methods)
            sheet = ", contact_sheet.png" if (folder.path / "contact_sheet.png").exists() else ""
            print(f"wrote {folder.path / 'gallery.html'}{sheet}, manifest.jsonl and {times.images} PNGs")
        print(summary(times, clock, cached=cache is not None))
        if interrupted:
            print(f"interrupted after {left().format('')}", file=sys.stderr)
            return 130
        there = {name for name in paths.names(folder.path) if manifest.record(name) is not None}
        missing = [row for row in rows if row.number not in failed_rows and row.file_name not in there]
        if missing and hosts.count > 1:
            print(hosts.still_left([row.number for row in missing], dead, folder.again()), file=sys.stderr)
        return 1 if missing and hosts.together else 2 if bad else 0


def open_folder(config: Config, methods: Methods, rows: Sequence[Row], hosts: Hosts) -> Folder:
    """Return the folder of the job, in all processes with the same numbers for fresh seeds."""
    wanted = methods.wanted.name if methods.wanted is not None else ""
    opened: list[Folder] = []

    def first() -> Any:
        opened.append(Folder(config, wanted))
        opened[0].seeded(rows)
        return opened[0].identity

    identity = hosts.from_first(first)
    return opened[0] if opened else Folder(config, wanted, identity)


def claim(folder: Folder, hosts: Hosts) -> str:
    """Make the folder this job's, for all processes, which must see it; return a name for this run of theirs."""

    def first() -> Any:
        folder.claim()
        for place in (folder.path, folder.path / FOLDER):
            sweep(place)
        return folder.identity, secrets.token_hex(4)

    identity, run = hosts.from_first(first)
    if not hosts.first and hosts.together:
        folder.follow(identity)
    hosts.agreed(folder.check_seen if not hosts.first else lambda: None, lambda _: {"--out": str(identity[0])})
    return run


def prepare(
    config: Config, rows: Sequence[Row], load: Callable[[], Any], methods: Methods
) -> tuple[Any, dict[str, Any], list[Row], list[BadRow]]:
    """Return the model, the settings that all pictures share, and the completed rows, good and bad."""
    pipe = with_embeddings(load(), config.embedding)
    for method in methods.all:
        method.open(pipe)
    common: dict[str, Any] = {"model": config.model, "dtype": config.dtype}
    told = {key: getattr(config, key) for key in ("vae", "base", "prediction_type", "zero_snr", "embedding")}
    common |= {key: value for key, value in told.items() if value is not None}
    return pipe, common, *complete(rows, pipe, methods, config.tile, common, config.max_chunks)


def undone(
    rows: Sequence[Row], manifest: Manifest, methods: Methods, common: Mapping[str, Any], pipe: Any, hosts: Hosts
) -> tuple[list[Row], frozenset[int]]:
    """Return the rows that are to be drawn and the numbers of those that are there, as the first process finds it.

    A row may be in both: groups are drawn whole, and of theirs what is there is not written again.
    """

    def held(row: Row) -> bool:
        sides = (side // pipe.vae.config.factor for side in size_of(row))
        latents = {"latents": [*sides, pipe.latent_shape[2]]}
        return manifest.holds(row.file_name, {**methods.settings(row), **common}, latents)

    def first() -> tuple[list[int], list[int]]:
        done = [held(row) for row in rows]
        there = [row.number for row, held in zip(rows, done, strict=True) if held]
        return [row.number for row in methods.undone(rows, done)], there

    left, there = map(frozenset, hosts.from_first(first))
    return [row for row in rows if row.number in left], there


def complete(
    rows: Sequence[Row],
    pipe: Any,
    methods: Methods,
    tile: int | None = None,
    common: Mapping[str, Any] | None = None,
    max_chunks: int | None = None,
) -> tuple[list[Row], list[BadRow]]:
    """Fill in what follows from the model and the rows' pictures, and sort out rows that this model cannot draw."""
    good, bad = [], []
    most, factor = pipe.schedule.num_train_timesteps, pipe.vae.config.factor
    cells = cells_of(tile, factor)
    for row in rows:
        try:
            row = methods.adopt(row, pipe)
            height, width = (side * factor for side in pipe.latent_shape[:2])
            if row.image is not None:
                height, width = picture_size(row.image, factor)
            own = {"steps": pipe.default_steps, "guidance_scale": float(pipe.default_guidance_scale)}
            # A spacing alone stands above that of the model's sampler.
            sampler = pipe.sampler if row.spacing is None else split_sampler(pipe.sampler)[0]
            own |= {"sampler": sampler, "height": height, "width": width}
            whole: Any = methods.settle(row, own)
            check_steps("steps", whole.steps, most)
            for key in ("height", "width"):
                if (pixels := getattr(whole, key)) % factor:
                    raise InputError(f"{key}: found {pixels}, expected a multiple of {factor} pixels")
            guided = whole.guidance_scale > 1
            pipe.check_size(whole.height // factor, whole.width // factor, cells, row.image is not None, guided)
            if row.image is not None:
                image_to_image_start(whole.steps, row.strength)
            open_pictures([whole])
            make_solver(whole.sampler, pipe.schedule, whole.steps, whole.eta, whole.spacing)
            whole = methods.complete(whole, pipe)
            count = chunks_of(whole, pipe, max_chunks, methods.further_prompts(whole))
            whole = dataclasses.replace(whole, chunks=count)
        except InputError as error:
            bad.append(BadRow(row.number, row.where, str(error)))
            continue
        good.append(whole)
    good = marked(good, methods, common or {})
    bad += methods.check(pipe, good, request)
    failed = {row.number for row in bad}
    return [row for row in good if row.number not in failed], bad


def marked(rows: Sequence[Row], methods: Methods, common: Mapping[str, Any]) -> list[Row]:
    """Return the rows with marks of what their pictures depend on: their settings, and those of rows in their group."""
    companies = methods.companies(rows)
    rows = [
        dataclasses.replace(row, group_mark=digest([methods.settings(other) for other in others])) if others else row
        for row, others in zip(rows, companies, strict=True)
    ]
    held = [digest({**methods.settings(row), **common, "row": None}) for row in rows]
    return [dataclasses.replace(row, mark=mark) for row, mark in zip(rows, held, strict=True)]


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
