"""Encode captioned pictures once, in ArrayRecord shards, for trainers with frozen encoders.

A record has latents and text states, and with an image encoder what CLIP sees in the picture.

    python -m train.cache_latents --pretrained_model_name_or_path MODEL --train_data_dir DIR --out CACHE \
        --resolution 1024 --enable_bucket --labels '[color, lighting]'
    python -m train.cache_latents ... --image_encoder CLIP              # for train.ip_adapter

Shards appear whole or not at all. A run that was stopped resumes with the missing shards, and several runs may share
the work (`--worker 0 --workers 4`, ...): the one that finds all of them finished writes the index.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import jaxmix
from jaxmix import command
from jaxmix.sharding import DATA
from jaxmix.types import InputError
from train.data import (
    BadRow,
    LatentCache,
    PictureConfig,
    Pictures,
    Regular,
    check_sizes,
    hint_name,
    make_hint,
    make_look,
    open_source,
)
from train.data.buckets import crop_to_bucket
from train.data.cache import EMPTY, INDEX, SEEN, CacheIndex, encode_record, identify
from train.data.pictures import MIDDLE

PLAN = "plan.json"


@dataclasses.dataclass
class Config(PictureConfig):
    """What to encode, after how to crop pictures.

    A random crop (center_crop false) is drawn once per picture; random_flip also stores the mirrored pictures.

    Attributes:
        pretrained_model_name_or_path: "mini", a diffusers folder, a single .safetensors file, or a hub id.
        train_data_dir: pictures with a metadata.jsonl, or WebDataset tars (folder, glob or braces), local or gs://.
        out: folder for the cache, local.
        image_encoder: folder or file of a CLIP image encoder, for image prompts: rows also get its projection of the
            whole picture; none if empty.
        image_states: also keep the encoder's states before its last layer, which "plus" and "full" adapters read.
        conditioning_image_column: the metadata's column with a second picture's file, for train.controlnet (of tars,
            KEY.COLUMN.png); none if empty.
        preprocess: what makes a hint for train.controlnet of that picture, or of the row's own: see infer.preprocess.
        labels: names of the dimensions that labels may name; null does not read labels.
        text_column: the metadata's column with the caption.
        image_column: the metadata's column with the picture's file.
        trigger_word: given to pictures without a caption, and to captions without it.
        reg_data_dir: regularisation pictures, as for train.lora.
        class_prompt: the caption of those without one.
        batch_size: pictures encoded at a time, split over the devices.
        rows_per_shard: rows per file, and the most that a stopped run must redo.
        dtype: dtype of the model while encoding.
        devices: number of devices that encode.
        worker: which of the `workers` this run is; it makes every workers-th shard.
        workers: number of runs that share the work.
        threads: number of threads that read and crop pictures.
        seed: seed of the random crops.
    """

    pretrained_model_name_or_path: str = "mini"
    train_data_dir: str = ""
    out: str = ""
    image_encoder: str = ""
    image_states: bool = False
    conditioning_image_column: str = ""
    preprocess: str = ""
    labels: list[str] | None = None
    text_column: str = "text"
    image_column: str = "file_name"
    trigger_word: str = ""
    reg_data_dir: str = ""
    class_prompt: str = ""
    batch_size: int = 8
    rows_per_shard: int = 1024
    dtype: Literal["float32", "bfloat16"] = "float32"
    devices: int = 1
    worker: int = 0
    workers: int = 1
    threads: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        super().__post_init__()
        if not self.out:
            raise InputError("out: not given, expected a folder for the cache")
        for name in ("batch_size", "rows_per_shard", "devices", "workers", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: found {getattr(self, name)}, expected 1 or more")
        if not 0 <= self.worker < self.workers:
            raise InputError(f"worker: found {self.worker}, expected 0 to {self.workers - 1}")
        if self.image_states and not self.image_encoder:
            raise InputError("image_states: found it without an image_encoder, expected the encoder of the states")
        if self.batch_size % self.devices:
            raise InputError(f"batch_size: found {self.batch_size}, expected a multiple of devices, {self.devices}")


@dataclasses.dataclass(frozen=True)
class Cropped:
    """A picture, cropped and ready: `images` (variants, H, W, 3) uint8, the second mirrored; `time_ids` likewise.

    `pixels` (S, S, 3) float32 is the whole picture as an image encoder reads it, if there is one, and `hints` are like
    `images`.
    """

    id: str
    text: str
    labels: tuple[str, ...]
    group: int
    images: np.ndarray
    time_ids: np.ndarray
    pixels: np.ndarray | None = None
    hints: np.ndarray | None = None
    repeats: int = 1
    regular: bool = False


def read_cropped(pictures: Pictures, index: int, group: int, seed: int) -> Cropped:
    """Read and crop one picture. Raises BadRow if it cannot be used."""
    cfg, row = pictures.cfg, pictures.source[index]
    at = MIDDLE if cfg.center_crop else tuple(np.random.default_rng((seed, index)).random(2).tolist())
    bucket, flips = pictures.buckets[group], (False, True)[: 1 + cfg.random_flip]
    cuts = [crop_to_bucket(row["image"], bucket, at, flip) for flip in flips]
    images, time_ids = (np.stack(part) for part in zip(*cuts, strict=True))
    hints = None
    if pictures.hint is not None:
        hints = np.stack([pictures.hint(row, x, bucket, at, flip) for x, flip in zip(images, flips, strict=True)])
    pixels = None if pictures.whole is None else pictures.whole(row["image"])["pixels"]
    entry = pictures.source.entries[index]
    told = row["id"], row["text"], row["labels"], group
    return Cropped(*told, images, time_ids, pixels, hints, entry.repeats, entry.regular)


def make_moments(pipe: jaxmix.Pipeline, devices: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return images (n, H, W, 3) uint8 -> mean and standard deviation of their latents, (n, h, w, 2 c) float16."""

    def encode(params: Any, images: jax.Array) -> jax.Array:
        mean, logvar = pipe.vae.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1.0, method="encode")
        return jnp.concatenate([mean, jnp.exp(0.5 * logvar)], -1).astype(jnp.float16)

    if devices > 1:
        rows = PartitionSpec(DATA)
        mesh = jaxmix.data_mesh(devices)
        encode = jax.shard_map(encode, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)
    compiled = jax.jit(encode)
    return lambda images: np.asarray(compiled(pipe.params["vae"], images))


def encode_texts(pipe: jaxmix.Pipeline, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Return {"context" (n, s, d)[, "pooled" (n, p)]} float16."""
    found = pipe.encode_prompt(texts)
    states = {"context": found.context, "pooled": found.pooled}
    return {name: np.asarray(x.astype(jnp.float16)) for name, x in states.items() if x is not None}


def padded(items: Sequence[Any], size: int) -> list[Any]:
    """Return `size` items, the last one repeated, so that a program compiles once."""
    return [*items, *[items[-1]] * (size - len(items))]


class Encoder:
    """Rows to records."""

    def __init__(self, pipe: jaxmix.Pipeline, cfg: Config, image_encoder: jaxmix.ImageEncoder | None = None) -> None:
        self.pipe, self.size = pipe, cfg.batch_size
        self.image_encoder, self.image_states = image_encoder, cfg.image_states
        self._moments = make_moments(pipe, cfg.devices)

    def __call__(self, rows: Sequence[Cropped]) -> Iterator[bytes]:
        """Yield the record of each row; all have pictures of one size."""
        images = np.stack(padded([row.images for row in rows], self.size))
        moments = np.stack([self._moments(images[:, i]) for i in range(images.shape[1])], 1)
        states = encode_texts(self.pipe, padded([row.text for row in rows], self.size))
        if self.image_encoder is not None:
            states |= self.look([row.pixels for row in rows])
        for i, row in enumerate(rows):
            arrays = {"moments": moments[i], "time_ids": row.time_ids, **{key: x[i] for key, x in states.items()}}
            if row.hints is not None:
                arrays["hint"] = row.hints
            for name, array in arrays.items():
                if not np.isfinite(array).all():
                    raise InputError(f"{row.id}: found {name} that are not finite in float16; is the model damaged?")
            yield encode_record(arrays, row.id, row.labels, row.regular)

    def look(self, pixels: Sequence[Any]) -> dict[str, np.ndarray]:
        """Return what the image encoder sees, {"clip_projected" (n, p)[, "clip_penultimate" (n, s, d)]} float16."""
        assert self.image_encoder is not None
        states = self.image_encoder.at_once(np.stack(padded(pixels, self.size)))
        found = dict(zip(SEEN, (states.projected, states.penultimate if self.image_states else None), strict=True))
        return {name: np.asarray(x, np.float16) for name, x in found.items() if x is not None}


def size_batches(rows: np.ndarray, groups: np.ndarray, size: int) -> Iterator[list[tuple[int, int]]]:
    """Yield up to `size` (row, group) at a time, of one group each; `groups` ascends."""
    for group in np.unique(groups):
        mine = rows[groups == group]
        for start in range(0, len(mine), size):
            yield [(int(row), int(group)) for row in mine[start : start + size]]


def write_shard(
    path: Path, work: list[list[tuple[int, int]]], pictures: Pictures, encode: Encoder, cfg: Config, bar: Any
) -> dict[str, Any]:
    """Encode a shard's rows, reading a batch ahead; return what the index needs to know about it."""
    from array_record.python.array_record_module import ArrayRecordWriter

    def attempt(item: tuple[int, int]) -> Cropped | BadRow:
        try:
            return read_cropped(pictures, *item, cfg.seed)
        except BadRow as fault:
            return fault

    found: dict[str, Any] = {"bucket": [], "repeats": [], "bad": {}}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")  # so that a record is read without its neighbours
        with ThreadPoolExecutor(cfg.threads) as pool:
            ahead: list[Future[Cropped | BadRow]] = [pool.submit(attempt, item) for item in work[0]]
            for place, items in enumerate(work):
                ready = [future.result() for future in ahead]
                ahead = [pool.submit(attempt, item) for item in work[place + 1]] if place + 1 < len(work) else []
                for (index, _), row in zip(items, ready, strict=True):
                    if isinstance(row, BadRow):
                        name = pictures.source.entries[index].id
                        found["bad"][name] = str(row)
                        pictures.bad.add(name, str(row))
                good = [row for row in ready if isinstance(row, Cropped)]
                for record in encode(good) if good else ():
                    writer.write(record)
                found["bucket"] += [row.group for row in good]
                found["repeats"] += [row.repeats for row in good]
                bar.update(len(items))
        writer.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return found


def write_text(path: Path, text: str) -> None:
    """Write a small file; it appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def make_plan(cfg: Config, pictures: Pictures, identity: dict[str, str], order: np.ndarray) -> dict[str, Any]:
    """Return everything that the shards depend on: two runs may share a folder only if they agree on it."""
    digest = hashlib.sha256()
    for row in order:
        entry = pictures.source.entries[row]
        more = [entry.repeats, entry.regular] if (entry.repeats, entry.regular) != (1, False) else []
        digest.update(json.dumps([entry.id, entry.text, entry.labels, *more]).encode())
    keys = ("labels", "dtype", "rows_per_shard", "seed", *(f.name for f in dataclasses.fields(PictureConfig)))
    settings = {key: getattr(cfg, key) for key in keys if key != "max_bad_rows"}
    if cfg.image_states:
        settings["image_states"] = True
    if told := hint_name(cfg.conditioning_image_column, cfg.preprocess):
        settings["hint"] = told
    return {**identity, **settings, "rows": f"{len(order)} {digest.hexdigest()[:16]}"}


def check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or raise InputError if the folder has another one."""
    file = folder / PLAN
    if not file.is_file():
        write_text(file, json.dumps(plan, indent=1) + "\n")
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    for key in sorted({*plan, *found}):
        if found.get(key) != plan.get(key):
            raise InputError(
                f"{folder}: started with another {key}: found {found.get(key)}, expected {plan.get(key)}; "
                "give another --out, or delete the folder"
            )


def main(cfg: Config) -> int:
    """Encode what is missing, then write the index."""
    command.enable_compilation_cache()
    pipe = jaxmix.load(cfg.pretrained_model_name_or_path, cfg.dtype)
    hint = make_hint(cfg.conditioning_image_column, cfg.preprocess)
    column, regular = cfg.conditioning_image_column, Regular(cfg.reg_data_dir, cfg.class_prompt)
    source = open_source(
        cfg.train_data_dir, cfg.labels, cfg.text_column, cfg.image_column, column, cfg.trigger_word, regular
    )
    if isinstance(source, LatentCache):
        raise InputError(f"train_data_dir: found a cache, {cfg.train_data_dir}, expected pictures")
    check_sizes(cfg, pipe)
    seen = None if not cfg.image_encoder else jaxmix.ImageEncoder.load(cfg.image_encoder, cfg.dtype)
    if seen is not None and not (seen.model.config.projection or cfg.image_states):
        raise InputError(f"image_encoder: {cfg.image_encoder} has no projection, expected --image_states true with it")
    pictures = Pictures(source, cfg, None if seen is None else make_look(seen), hint)
    print(pictures.describe(), flush=True)

    folder = Path(cfg.out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    order = np.concatenate(pictures.once)  # one size after another, so that most batches are full
    groups = np.repeat(np.arange(len(pictures.once)), [len(group) for group in pictures.once])
    identity = identify(pipe, seen)
    check_plan(folder, make_plan(cfg, pictures, identity, order))

    count = -(-len(order) // cfg.rows_per_shard)
    shards = [folder / f"data-{i:05d}-of-{count:05d}.array_record" for i in range(count)]
    notes = [path.with_suffix(".json") for path in shards]  # written last: a shard without one is redone
    for note in notes:
        if note.is_file():
            pictures.bad.reasons.update(json.loads(note.read_text(encoding="utf-8"))["bad"])
    mine = [i for i in range(count) if i % cfg.workers == cfg.worker and not notes[i].is_file()]
    spans = [slice(i * cfg.rows_per_shard, (i + 1) * cfg.rows_per_shard) for i in range(count)]
    encode = Encoder(pipe, cfg, seen)
    if mine:
        with command.progress(sum(len(order[spans[i]]) for i in mine), "encoding", "pictures") as bar:
            for i in mine:
                work = list(size_batches(order[spans[i]], groups[spans[i]], cfg.batch_size))
                write_text(notes[i], json.dumps(write_shard(shards[i], work, pictures, encode, cfg, bar)) + "\n")
    missing = sum(not note.is_file() for note in notes)
    if missing:
        print(f"{missing} of {count} shards are still missing: the other workers make them", file=sys.stderr)
        return 0
    finish(folder, cfg, encode, pictures, identity, shards)
    return 0


def finish(
    folder: Path,
    cfg: Config,
    encode: Encoder,
    pictures: Pictures,
    identity: dict[str, str],
    shards: Sequence[Path],
) -> None:
    """Write what stands for no caption and no picture, and the index, and say what the cache holds."""
    from safetensors.numpy import save

    empty = {key: np.ascontiguousarray(x[0]) for key, x in encode_texts(encode.pipe, [""]).items()}
    if encode.image_states and encode.image_encoder is not None:
        empty[SEEN[1]] = np.asarray(encode.image_encoder.none.penultimate[0], np.float16)
    temporary = folder / f".{EMPTY}.{os.getpid()}.tmp"
    temporary.write_bytes(save(empty))
    os.replace(temporary, folder / EMPTY)
    notes = [json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) for path in shards]
    held = [note["bucket"] for note in notes]
    repeats = [n for note in notes for n in note.get("repeats") or [1] * len(note["bucket"])]
    index = CacheIndex(
        model=cfg.pretrained_model_name_or_path,
        identity=identity,
        resolution=cfg.resolution,
        enable_bucket=cfg.enable_bucket,
        flipped=cfg.random_flip,
        known=cfg.labels,
        shards=[(path.name, len(rows)) for path, rows in zip(shards, held, strict=True) if rows],
        buckets=pictures.buckets,
        bucket=[group for rows in held for group in rows],
        hint=hint_name(cfg.conditioning_image_column, cfg.preprocess),
        repeats=[] if set(repeats) <= {1} else repeats,
    )
    if not index.bucket:
        raise InputError(f"{pictures.source.where}: found no usable row")
    write_text(folder / INDEX, index.to_json())
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"wrote {folder}: {len(index.bucket)} rows, {len(pictures.bad.reasons)} bad rows left out, {size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    command.run(main)
