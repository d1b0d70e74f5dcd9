"""Draw images from prompts: rows in; PNGs, a manifest, a contact sheet and a gallery out.

Examples: python -m infer.generate --prompt "a 3d render of an apple by the sea" --out gallery
          python -m infer.generate --model FOLDER --prompts rows.jsonl --out gallery --steps 50 --seed 7
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infer.gallery import Item, Picture, write_contact_sheet, write_gallery
from infer.manifest import Manifest
from infer.measure import CompileClock
from infer.png import setting_chunks, write_png
from infer.rows import (
    BadRow,
    Defaults,
    Row,
    buckets,
    check_number,
    check_seed,
    check_steps,
    check_text,
    read_rows,
    rows_of_prompts,
)
from jaxmix.command import enable_compilation_cache, progress, run
from jaxmix.types import InputError

BUILTIN_PROMPTS = Path(__file__).with_name("prompts.txt")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to draw, how, and where to.

    Attributes:
        model: "mini" (embedded), or a diffusers folder
        prompt: one prompt to draw
        prompts: a .txt (one prompt a line) or .jsonl file (one object a line: prompt, and optionally negative_prompt,
            seed, steps, guidance_scale, id), or "builtin"; without either flag the built-in prompts are drawn
        out: folder for the PNGs, manifest.jsonl, contact_sheet.png and gallery.html
        negative_prompt: what to steer away from, for rows that name nothing themselves
        steps: denoising steps, from 1 to the 1000 that models are usually trained with; default: the model's own
        guidance_scale: classifier-free guidance, 1 is none (no unit); default: the model's own
        seed: seed of the first row, 0 to 2^32 - 1; row k draws with seed + k unless it names its own
        batch_size: images denoised together (more is faster, and takes more memory); no image depends on it
        dtype: number format of the weights and the arithmetic
        devices: accelerators (or CPU devices) to spread a batch over; default: all that have an image to draw
        resume: keep the rows that this folder already holds with the same settings
        strict: draw nothing if any row is bad
        dry_run: check the rows, print the plan, draw nothing
    """

    model: str = "mini"
    prompt: str | None = None
    prompts: str | None = None
    out: str = "gallery"
    negative_prompt: str = ""
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 8
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    devices: int | None = None
    resume: bool = False
    strict: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompts is not None:
            raise InputError("give --prompt or --prompts, not both")
        check_text("--negative-prompt", self.negative_prompt)
        check_seed("--seed", self.seed)
        if self.steps is not None:
            check_steps("--steps", self.steps)
        if self.guidance_scale is not None:
            check_number("--guidance-scale", self.guidance_scale)
        for flag, value in (("--batch-size", self.batch_size), ("--devices", self.devices)):
            if value is not None and value < 1:
                raise InputError(f"{flag}: expected at least 1, found {value}")


@dataclasses.dataclass
class Times:
    """Images drawn in one run, and the seconds it took; `drawing` and `decode` are without the compiling in them."""

    images: int = 0
    whole: float = 0.0
    drawing: float = 0.0
    compile: float = 0.0
    decode: float = 0.0
    png: float = 0.0

    @property
    def rate(self) -> float:
        """Images per second once everything is compiled."""
        return self.images / max(self.drawing, 1e-9)


def main(config: Config) -> int:
    """Load the model and draw; return 0, or 2 if any row was bad."""
    # The rows come first: loading a model takes seconds, and a misspelt file name should not have to wait for it.
    rows, bad = collect_rows(config)
    mesh = choose_mesh(config.devices, len(rows))
    import jaxmix

    return draw(config, rows, bad, lambda: jaxmix.load(config.model, dtype=config.dtype), mesh)


def collect_rows(config: Config) -> tuple[list[Row], list[BadRow]]:
    """Return the job's good and bad rows; raises InputError if the job as a whole cannot be read."""
    defaults = Defaults(config.negative_prompt, config.seed, config.steps, config.guidance_scale)
    if config.prompt is not None:
        return rows_of_prompts([config.prompt], defaults)
    chosen = BUILTIN_PROMPTS if config.prompts in (None, "builtin") else Path(config.prompts)
    return read_rows(chosen, defaults)


def choose_mesh(devices: int | None, images: int) -> Any:
    """Return a data-parallel mesh over `devices` devices (None: as many as there are images for), or None for one."""
    import jax

    there = jax.devices()
    count = max(1, min(len(there), images)) if devices is None else devices
    if count > len(there):
        raise InputError(f"--devices {count}: only {len(there)} here ({there[0].platform})")
    if count == 1:
        return None  # without a mesh nothing is partitioned
    from jaxmix.sharding import data_mesh

    return data_mesh(count)


def draw(config: Config, rows: Sequence[Row], bad: Sequence[BadRow], load: Callable[[], Any], mesh: Any = None) -> int:
    """Draw all good rows with the pipeline that `load` returns, and write everything into config.out.

    Returns 2 if there were bad rows, else 0. Raises InputError if nothing can be drawn.
    """
    started = time.monotonic()
    refuse(config, rows, bad)
    cache = enable_compilation_cache()
    clock = CompileClock()
    with clock:
        pipe = load()
        rows, too_long = complete(rows, pipe)
        bad = sorted([*bad, *too_long], key=lambda row: row.number)
        refuse(config, rows, bad)
        report(bad)
        cuts = warn_of_cuts(pipe, rows)

        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        common = {"model": config.model, "sampler": "DDIM", "dtype": config.dtype}
        manifest = Manifest(out, resume=config.resume)
        todo = [row for row in rows if not manifest.holds(row.file_name, {**row.settings(), **common})]
        print_plan(config, rows, todo, mesh)
        if config.dry_run:
            return 2 if bad else 0
        for failed in bad:
            manifest.add_error(failed.number, failed.where, failed.reason)
        times = Times()
        drawing_from, compiled_before = time.monotonic(), clock.seconds
        with progress(len(todo), "draw", "images") as bar:
            for _, bucket in buckets(todo):
                size = batch_size(config, bucket, mesh)
                for start in range(0, len(bucket), size):
                    part = bucket[start : start + size]
                    images, shapes = render(pipe, part, size, mesh, times, clock)
                    begun = time.monotonic()
                    for row, image, shape in zip(part, images, shapes, strict=True):
                        settings = {**row.settings(), **common}
                        height, width = image.shape[:2]
                        chunks = setting_chunks(settings, (width, height))
                        size_bytes = write_png(out / row.file_name, image, chunks)
                        extra = {"width": width, "height": height, "latents": shape, "bytes": size_bytes}
                        manifest.add_image(row.file_name, settings, extra | ({"cut": cuts[row]} if row in cuts else {}))
                    times.png += time.monotonic() - begun
                    times.images += len(part)
                    bar.update(len(part))
    times.drawing = time.monotonic() - drawing_from - (clock.seconds - compiled_before)
    times.compile = clock.seconds
    times.whole = time.monotonic() - started
    write_overview(config, rows, bad, manifest, times, cuts)
    print(f"wrote {out / 'gallery.html'}, contact_sheet.png, manifest.jsonl and {times.images} PNGs")
    print(summary(times, clock, cached=cache is not None))
    return 2 if bad else 0


def complete(rows: Sequence[Row], pipe: Any) -> tuple[list[Row], list[BadRow]]:
    """Fill in the model's own steps and guidance, and sort out rows with more steps than the model has."""
    good, bad = [], []
    most = pipe.schedule.num_train_timesteps
    for row in rows:
        row = row.complete(pipe.default_steps, pipe.default_guidance_scale)
        try:
            check_steps("steps", row.steps, most)
        except InputError as error:
            bad.append(BadRow(row.number, row.where, str(error)))
            continue
        good.append(row)
    return good, bad


def warn_of_cuts(pipe: Any, rows: Sequence[Row]) -> dict[Row, str]:
    """Print a line for each prompt that is longer than the text encoder reads; return the words each row lost."""
    cuts: dict[Row, str] = {}
    for key in ("prompt", "negative_prompt"):
        _, cut = pipe.tokenize([getattr(row, key) for row in rows])
        for row, words in zip(rows, cut, strict=True):
            if words:
                print(f"warning: {row.where}: {key} is too long for the model; cut off: {words!r}", file=sys.stderr)
                cuts[row] = "; ".join(filter(None, (cuts.get(row), words)))
    return cuts


def batch_size(config: Config, bucket: Sequence[Row], mesh: Any) -> int:
    """Return how many images of a bucket are drawn at a time: a multiple of the devices, no more than needed."""
    devices = 1 if mesh is None else mesh.size
    return -(-min(config.batch_size, len(bucket)) // devices) * devices


def render(
    pipe: Any, rows: Sequence[Row], size: int, mesh: Any, times: Times, clock: CompileClock
) -> tuple[np.ndarray, list[list[int]]]:
    """Draw rows that share their step count; return images (b, H, W, 3) uint8 and the shape of each row's latents."""
    # A short last batch is filled up with its last row, so that every program of a bucket is compiled once.
    filled = [*rows, *[rows[-1]] * (size - len(rows))]
    latents = pipe.generate(
        [row.prompt for row in filled],
        seeds=[row.seed for row in filled],
        steps=rows[0].steps,
        guidance_scale=[row.guidance_scale for row in filled],
        negative_prompts=[row.negative_prompt for row in filled],  # "" where none: one program either way
        mesh=mesh,
        output="latent",
    )
    begun, compiled_before = time.monotonic(), clock.seconds
    images = np.asarray(pipe.decode(latents, mesh=mesh))
    times.decode += time.monotonic() - begun - (clock.seconds - compiled_before)
    return images[: len(rows)], [list(latents.shape[1:])] * len(rows)


def refuse(config: Config, rows: Sequence[Row], bad: Sequence[BadRow]) -> None:
    """Raise InputError, after listing the bad rows, where nothing is to be drawn."""
    if rows and not (bad and config.strict):
        return
    report(bad)
    raise InputError("no row can be drawn" if not rows else "nothing drawn: there are bad rows, and --strict is set")


def report(bad: Sequence[BadRow]) -> None:
    """List bad rows on stderr, one line each."""
    for row in bad:
        print(f"bad row: {row}", file=sys.stderr)


def print_plan(config: Config, rows: Sequence[Row], todo: Sequence[Row], mesh: Any) -> None:
    """Say what will be drawn, in which batches, before the first compile."""
    kept = len(rows) - len(todo)
    devices = 1 if mesh is None else mesh.size
    print(
        f"plan: {len(todo)} images with {config.model} into {config.out}/"
        + (f", {kept} kept from before" if kept else "")
        + f", {devices} device{'s' * (devices > 1)}"
    )
    for steps, bucket in buckets(todo):
        size = batch_size(config, bucket, mesh)
        batches = -(-len(bucket) // size)
        print(f"  {steps} steps: {len(bucket)} images in {batches} batch{'es' * (batches > 1)} of {size}", flush=True)


def write_overview(
    config: Config,
    rows: Sequence[Row],
    bad: Sequence[BadRow],
    manifest: Manifest,
    times: Times,
    cuts: dict[Row, str],
) -> None:
    """Write gallery.html and contact_sheet.png over all rows of the job, drawn now or before."""
    out = Path(config.out)
    items = []
    for row in rows:
        record = manifest.record(row.file_name)
        shown = {"seed": str(row.seed), "steps": str(row.steps), "guidance": f"{row.guidance_scale:g}"}
        if row.negative_prompt:
            shown["negative"] = row.negative_prompt
        if row in cuts:
            shown["cut off"] = cuts[row]
        if row.id is not None:
            shown["id"] = row.id
        picture = Picture(row.file_name, record["width"], record["height"])
        items.append(Item(row.prompt, [picture], shown))
    items += [Item("", error=str(failed)) for failed in bad]
    facts = {"model": config.model, "images": str(len(rows))}
    if bad:
        facts["rows not drawn"] = str(len(bad))
    facts["date"] = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    if times.images:
        facts["speed"] = f"{times.rate:.3g} images/s"
        facts["compile"] = f"{times.compile:.1f} s"
    write_gallery(out, items, f"Drawn by {Path(config.model).name}", facts)
    write_contact_sheet(out, items, f"{Path(config.model).name}: {len(rows)} images")


def summary(times: Times, clock: CompileClock, cached: bool) -> str:
    """Return the last line: images/s is over the drawing alone, without loading and compiling."""
    if not times.images:
        return f"0 images drawn in {times.whole:.1f} s (all kept from before)"
    hits = f" ({clock.hits} of {clock.programs} programs from the cache)" if cached else ""
    return (
        f"{times.images} images in {times.whole:.1f} s: {times.rate:.3g} images/s; "
        f"compile {times.compile:.1f} s{hits}, decode {times.decode:.1f} s, PNG {times.png:.2f} s"
    )


if __name__ == "__main__":
    run(main)
