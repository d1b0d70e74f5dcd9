"""Draw images from prompts: rows in; PNGs, a manifest, a contact sheet and a gallery out.

Examples: python -m infer.generate --prompt "a 3d render of an apple by the sea" --out gallery
          python -m infer.generate --model FOLDER --prompts rows.jsonl --out gallery --steps 50 --seed 7
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infer.adapters import Adapters, open_adapters
from infer.manifest import Manifest
from infer.measure import CompileClock
from infer.method import Batch, Method
from infer.pictures import open_picture, picture_size
from infer.png import setting_chunks, write_png
from infer.report import Times, summary, write_overview
from infer.rows import (
    BadRow,
    Defaults,
    Row,
    buckets,
    check_file,
    check_number,
    check_pixels,
    check_sampler,
    check_seed,
    check_share,
    check_steps,
    check_text,
    read_rows,
    rows_of_objects,
    rows_of_prompts,
)
from jaxmix.command import enable_compilation_cache, progress, run
from jaxmix.samplers import image_to_image_start, make_solver
from jaxmix.types import InputError

BUILTIN_PROMPTS = Path(__file__).with_name("prompts.txt")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to draw, how, and where to.

    Attributes:
        model: "mini" (embedded), a diffusers folder, a single .safetensors file, or a hub id "owner/name"
        prompt: one prompt to draw
        prompts: a .txt (one prompt a line) or .jsonl file (one object a line: prompt, and optionally negative_prompt,
            seed, steps, guidance_scale, guidance_rescale, sampler, height, width, image, mask, strength, labels,
            vmix_scale, id), or "builtin"; without either flag the built-in prompts are drawn
        out: folder for the PNGs, manifest.jsonl, contact_sheet.png and gallery.html
        negative_prompt: what to steer away from, for rows that name nothing themselves
        steps: denoising steps, from 1 to the 1000 that models are usually trained with; default: the model's own
        guidance_scale: classifier-free guidance, 1 is none (no unit); default: the model's own
        guidance_rescale: how far to bring guided predictions back to the unguided contrast, 0 to 1 (no unit)
        sampler: the solver, such as ddim, euler, euler_ancestral, dpmpp_2m_karras; default: the model's own
        height: of the images in pixels, a multiple of 8; default: the model's own
        width: of the images in pixels, a multiple of 8; default: the model's own
        image: a picture to start from (image-to-image)
        mask: a picture, white where `image` is to be repainted (inpainting)
        strength: how much of `image` is drawn anew, above 0 to 1
        vmix: a VMix adapter: "mini-vmix" (embedded) or an adapter.safetensors that train.vmix wrote
        vmix_scale: how strongly to apply it, 0 for not at all (no unit; the paper shows 0 to 2); default: 1
        labels: its labels that the images shall have: all, none, or some, such as color,light; default: all
        vmix_lora: whether to use the LoRA that was trained along with it, too
        lora: LoRA files (diffusers, PEFT or kohya) to merge into the model, PATH[:STRENGTH][,PATH[:STRENGTH]...]
        seed: seed of the first row, 0 to 2^32 - 1; row k draws with seed + k unless it names its own
        batch_size: images denoised together (more is faster, and takes more memory); no image depends on it
        dtype: number format of the weights and the arithmetic; auto is the one that they are stored in
        tile: decode large images in tiles of this many pixels, in the memory of one
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
    guidance_rescale: float = 0.0
    sampler: str | None = None
    height: int | None = None
    width: int | None = None
    image: str | None = None
    mask: str | None = None
    strength: float = 0.8
    vmix: str | None = None
    vmix_scale: float | None = None
    labels: str | None = None
    vmix_lora: Literal["on", "off"] = "on"
    lora: str | None = None
    seed: int = 0
    batch_size: int = 8
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    tile: int | None = None
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
        for flag, value, check in (
            ("--sampler", self.sampler, check_sampler),
            ("--height", self.height, check_pixels),
            ("--width", self.width, check_pixels),
            ("--guidance-rescale", self.guidance_rescale, check_share),
            ("--strength", self.strength, check_share),
            ("--image", self.image, check_file),
            ("--mask", self.mask, check_file),
            ("--tile", self.tile, check_pixels),
            ("--vmix-scale", self.vmix_scale, check_number),
        ):
            if value is not None:
                check(flag, value)
        for flag, value in (("--batch-size", self.batch_size), ("--devices", self.devices)):
            if value is not None and value < 1:
                raise InputError(f"{flag}: expected at least 1, found {value}")


def main(config: Config) -> int:
    """Load the model and draw; return 0, or 2 if any row was bad."""
    return job(config, Method())


def job(config: Config, method: Method) -> int:
    """Do a whole job with a method: read the rows, load the model, draw. Returns the exit status."""
    # The rows come first: loading a model takes seconds, and a misspelt file name should not have to wait for it.
    rows, bad = collect_rows(config, method)
    rows = method.arrange(rows)
    mesh = choose_mesh(config.devices, len(rows))
    import jaxmix

    adapters = open_adapters(config.vmix, config.vmix_lora == "on", config.lora)

    def load() -> Any:
        return adapters.apply(jaxmix.load(config.model, dtype=config.dtype))

    return draw(config, rows, bad, load, mesh, adapters, method)


def collect_rows(
    config: Config,
    method: Method = Method(),  # noqa: B008 - it holds nothing
) -> tuple[list[Row], list[BadRow]]:
    """Return the job's good and bad rows; raises InputError if the job as a whole cannot be read."""
    defaults = Defaults(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Defaults)})
    named = method.objects()
    if named is not None and config.prompts is None:
        return rows_of_objects(named, defaults, method.fields)
    if config.prompt is not None:
        return rows_of_prompts([config.prompt], defaults, method.fields)
    if config.prompts is None and method.needs_rows:
        raise InputError(f"{method.needs_rows}")
    chosen = BUILTIN_PROMPTS if config.prompts in (None, "builtin") else Path(config.prompts)
    return read_rows(chosen, defaults, method.fields)


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


def draw(
    config: Config,
    rows: Sequence[Row],
    bad: Sequence[BadRow],
    load: Callable[[], Any],
    mesh: Any = None,
    adapters: Adapters = Adapters(),  # noqa: B008 - frozen
    method: Method | None = None,
) -> int:
    """Draw all good rows with the pipeline that `load` returns, and write everything into config.out.

    Returns 2 if there were bad rows, else 0. Raises InputError if nothing can be drawn.
    """
    started = time.monotonic()
    method = method or Method()
    refuse(config, rows, bad)
    cache = enable_compilation_cache()
    clock = CompileClock()
    with clock:
        pipe = load()
        method.open(pipe)
        rows, too_long = complete(rows, pipe, adapters, method)
        bad = sorted([*bad, *too_long], key=lambda row: row.number)
        refuse(config, rows, bad)
        report(bad)
        cuts = warn_of_cuts(pipe, rows)

        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        common = {"model": config.model, "dtype": config.dtype, **adapters.settings(config.vmix), **method.settings()}
        manifest = Manifest(out, resume=config.resume)
        done = [manifest.holds(row.file_name, {**row.settings(), **common}) for row in rows]
        todo = method.undone(rows, done)
        batches = plan(config, rows, todo, mesh, method, pipe)
        if config.dry_run:
            return 2 if bad else 0
        for failed in bad:
            manifest.add_error(failed.number, failed.where, failed.reason)
        times = Times()
        drawing_from, compiled_before = time.monotonic(), clock.seconds
        with progress(len(todo), "draw", "images") as bar:
            for part in batches:
                images, shape = render(pipe, adapters, method, part, mesh, config.tile, times, clock)
                begun = time.monotonic()
                for row, image in zip(part.rows, images, strict=True):
                    settings = {**row.settings(), **common}
                    height, width = image.shape[:2]
                    chunks = setting_chunks(settings, (width, height))
                    size_bytes = write_png(out / row.file_name, image, chunks)
                    method.write_inputs(row, out)
                    extra = {"width": width, "height": height, "latents": shape, "bytes": size_bytes}
                    manifest.add_image(row.file_name, settings, extra | ({"cut": cuts[row]} if row in cuts else {}))
                times.png += time.monotonic() - begun
                times.images += len(part.rows)
                bar.update(len(part.rows))
    times.drawing = time.monotonic() - drawing_from - (clock.seconds - compiled_before)
    times.compile = clock.seconds
    times.whole = time.monotonic() - started
    write_overview(out, config.model, rows, bad, manifest, times, cuts, method)
    print(f"wrote {out / 'gallery.html'}, contact_sheet.png, manifest.jsonl and {times.images} PNGs")
    print(summary(times, clock, cached=cache is not None))
    return 2 if bad else 0


def complete(rows: Sequence[Row], pipe: Any, adapters: Adapters, method: Method) -> tuple[list[Row], list[BadRow]]:
    """Fill in what the model and the rows' pictures settle, and sort out rows that this model cannot draw."""
    good, bad = [], []
    most, factor = pipe.schedule.num_train_timesteps, pipe.vae.config.factor
    for row in rows:
        try:
            height, width = (side * factor for side in pipe.latent_shape[:2])
            if row.image is not None:
                height, width = picture_size(row.image, factor)
            own = {"steps": pipe.default_steps, "guidance_scale": float(pipe.default_guidance_scale)}
            whole: Any = row.complete(**own, sampler=pipe.sampler, height=height, width=width)
            check_steps("steps", whole.steps, most)
            for key in ("height", "width"):
                if (pixels := getattr(whole, key)) % factor:
                    raise InputError(f"{key}: expected a multiple of {factor} pixels, found {pixels}")
            if row.image is not None:
                image_to_image_start(whole.steps, row.strength)
            open_pictures([whole])
            make_solver(whole.sampler, pipe.schedule, whole.steps)
            whole = method.complete(adapters.complete(whole), pipe)
        except InputError as error:
            bad.append(BadRow(row.number, row.where, str(error)))
            continue
        good.append(whole)
    together = method.check_all(good)
    bad += [BadRow(row.number, row.where, reason) for row, reason in together]
    return [row for row in good if all(row is not other for other, _ in together)], bad


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
    pipe: Any,
    adapters: Adapters,
    method: Method,
    batch: Batch,
    mesh: Any,
    tile: int | None,
    times: Times,
    clock: CompileClock,
) -> tuple[np.ndarray, list[int]]:
    """Draw rows that share their program; return images (b, H, W, 3) uint8 and the shape of the latents of one."""
    filled, first = batch.filled, batch.rows[0]
    arguments = {
        "seeds": [row.seed for row in filled],
        "steps": first.steps,
        "sampler": first.sampler,
        "height": first.height,
        "width": first.width,
        "guidance_rescale": [row.guidance_rescale for row in filled],
        "guidance_scale": [row.guidance_scale for row in filled],
        "negative_prompts": [row.negative_prompt or None for row in filled],
        "mesh": mesh,
        "output": "latent",
        "controls": adapters.bind(pipe, filled),
        **open_pictures(filled),
    }
    latents = method.draw(pipe, filled, arguments)
    begun, compiled_before = time.monotonic(), clock.seconds
    cells = None if tile is None else max(1, tile // pipe.vae.config.factor)
    images = np.asarray(pipe.decode(latents, mesh=mesh, tile=cells))
    times.decode += time.monotonic() - begun - (clock.seconds - compiled_before)
    return images[[filled.index(row) for row in batch.rows]], list(latents.shape[1:])


def open_pictures(rows: Sequence[Any]) -> dict[str, Any]:
    """Return what the pipeline needs of the pictures that rows of one program start from."""
    first = rows[0]
    pictures: dict[str, Any] = {}
    if first.image is not None:
        pictures["images"] = np.stack([open_picture(row.image, row.height, row.width) for row in rows])
        pictures["strength"] = first.strength
    if first.mask is not None:
        pictures["masks"] = np.stack([open_picture(row.mask, row.height, row.width, "L") for row in rows])
    return pictures


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


def plan(config: Config, rows: Sequence[Row], todo: Sequence[Row], mesh: Any, method: Method, pipe: Any) -> list[Batch]:
    """Return the batches, and say what will be drawn in which before the first compile."""
    held = []
    kept = len(rows) - len(todo)
    devices = 1 if mesh is None else mesh.size
    print(
        f"plan: {len(todo)} images with {config.model} into {config.out}/"
        + (f", {kept} kept from before" if kept else "")
        + f", {devices} device{'s' * (devices > 1)}"
    )
    for bucket in buckets(todo, method.program):
        first = bucket[0]
        parts = method.batches(bucket, batch_size(config, bucket, mesh), 1 if mesh is None else mesh.size)
        held += parts
        size, batches = len(parts[0].filled), len(parts)
        start = "" if first.image is None else f", strength {first.strength:g}" + ", masked" * (first.mask is not None)
        print(
            f"  {first.steps} steps of {first.sampler}, {first.width}x{first.height}{start}: {len(bucket)} images in "
            f"{batches} batch{'es' * (batches > 1)} of {size}{method.note(pipe, bucket, size)}",
            flush=True,
        )
    return held


if __name__ == "__main__":
    run(main)
