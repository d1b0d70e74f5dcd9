"""A cache of latents and text states in ArrayRecord shards: what its records hold, and the source that reads it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.vision import ImageEncoder
from jaxmix.types import InputError
from jaxmix.weights.identity import config_digest, weights_digest
from train.data.buckets import PictureConfig, Size
from train.data.order import Stream

INDEX = "index.json"
EMPTY = "empty.safetensors"
FORMAT = "jaxmix latents"
VERSION = 1
IMAGE_ENCODER = "image_encoder"
SEEN = ("clip_projected", "clip_penultimate")
"""What a row has of its whole picture if the cache was made with an image encoder: see `VisionStates`."""

_META = "meta"  # the entry of a record that holds its id and labels, as JSON in bytes


def identify(pipe: Pipeline, image_encoder: ImageEncoder | None = None) -> dict[str, str]:
    """Return digests of what cached rows depend on: configs and weights of autoencoder, text and image encoders.

    The decoder is left out: latents do not depend on it. Digests of weights cover the first values of every tensor in
    bfloat16, so they are the same for a model loaded in float32 or in bfloat16.
    """
    found = {}
    names = [name for name in ("vae", "text_encoder", "text_encoder_2") if getattr(pipe, name) is not None]
    parts = {name: (getattr(pipe, name), pipe.params[name]) for name in names}
    if image_encoder is not None:
        parts[IMAGE_ENCODER] = (image_encoder.model, image_encoder.params)
    for part, (module, params) in parts.items():
        found[f"{part}.config"] = config_digest(module.config.to_dict())
        found[f"{part}.weights"] = weights_digest(params, "decoder" if part == "vae" else None)
    return found


def encode_record(arrays: Mapping[str, np.ndarray], name: str, labels: Sequence[str], regular: bool = False) -> bytes:
    """Return a record: arrays in safetensors' format, with the row's id, labels and whether it is a regularisation."""
    from safetensors.numpy import save

    told = {"id": name, "labels": list(labels), **({"regular": True} if regular else {})}
    meta = np.frombuffer(json.dumps(told).encode(), np.uint8)
    return save({**{key: np.ascontiguousarray(array) for key, array in arrays.items()}, _META: meta})


def decode_record(record: bytes) -> dict[str, Any]:
    """Return what `encode_record` was given, as one row."""
    from safetensors.numpy import load

    row: dict[str, Any] = load(record)
    meta = json.loads(row.pop(_META).tobytes())
    more = {"regular": True} if meta.get("regular") else {}
    return {**row, "id": meta["id"], "labels": tuple(meta["labels"]), **more}


@dataclasses.dataclass(frozen=True)
class CacheIndex:
    """The `index.json` of a cache.

    `model` is what it was made with, `identity` the result of `identify`, `known` the dimensions that labels were read
    for (None: not read), `flipped` whether it also holds the mirrored pictures, `shards` the files with their numbers
    of records, `buckets` the sizes that occur, and `bucket` the index of every record's size among them. `hint` says
    of what rows have hints: the preprocessor, after the column of a second picture; empty without hints. `repeats` says
    how often a pass shows each record; empty for once.
    """

    model: str
    identity: dict[str, str]
    resolution: int
    enable_bucket: bool
    flipped: bool
    known: list[str] | None
    shards: list[tuple[str, int]]
    buckets: list[Size]
    bucket: list[int]
    hint: str = ""
    repeats: list[int] = dataclasses.field(default_factory=list)

    def to_json(self) -> str:
        """Return the text of the file."""
        fields = dataclasses.asdict(self)
        return json.dumps({"format": FORMAT, "version": VERSION, "count": len(self.bucket), **fields}) + "\n"

    @classmethod
    def read(cls, path: Path) -> CacheIndex:
        """Read the file. Raises InputError for any other file."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not readable as JSON: {error}") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise InputError(f"{path}: not the index of a cache of latents, expected one by train.cache_latents")
        if found.get("version") != VERSION:
            raise InputError(f"{path}: version: found {found.get('version')}, expected {VERSION}; make the cache again")
        found = {"hint": "", "repeats": [], **found}  # as caches were before they could have any
        fields = {field.name: found[field.name] for field in dataclasses.fields(cls)}
        fields["shards"] = [(name, count) for name, count in fields["shards"]]
        fields["buckets"] = [(height, width) for height, width in fields["buckets"]]
        return cls(**fields)


class LatentCache:
    """The rows of a folder written by `train.cache_latents`, a `BatchSource` with one picture size per batch.

    A row has "latents_mean" and "latents_std" (h, w, c) float16, the moments of the autoencoder's posterior, not
    scaled; "context" (s, d) and, for SDXL, "pooled" (p,) float16; "labels", "id", and "time_ids" float32 (6,) as by
    `train.data.buckets.crop_to_bucket`; with an image encoder some of `SEEN`, float16, of the picture before it was
    cropped or mirrored; with hints "hint" uint8 (H, W, 3). `empty` has "context" and "pooled" of the empty caption, for
    caption dropout, and "clip_penultimate" of a grey picture if rows have it.
    The folder is local (or mounted): ArrayRecord cannot read gs://.

    `labels`, if given, must be among the dimensions with which the cache was made; other labels are left out.
    """

    def __init__(self, folder: str | Path, labels: Sequence[str] | None = None, random_flip: bool = False) -> None:
        self.folder = Path(folder).expanduser()
        if not (self.folder / INDEX).is_file():
            unfinished = any(self.folder.glob("*.array_record"))
            hint = "; it is not finished: run train.cache_latents again" if unfinished else ""
            raise InputError(f"{folder}: found no {INDEX}, expected a cache by train.cache_latents{hint}")
        self.index = CacheIndex.read(self.folder / INDEX)
        self._labels = None if labels is None else frozenset(labels)
        for label in labels or ():
            if label not in (self.index.known or ()):
                raise InputError(
                    f"{folder}: found a cache without the label {label!r}, expected one with it; it has "
                    f"{', '.join(self.index.known or ()) or 'none'}"
                )
        if random_flip and not self.index.flipped:
            raise InputError(f"{folder}: found no mirrored pictures, expected a cache made with --random_flip true")
        self.random_flip = random_flip
        for name, _ in self.index.shards:
            if not (self.folder / name).is_file():
                raise InputError(f"{self.folder / name}: found no such file, expected it as {INDEX} lists it")
        bucket = np.asarray(self.index.bucket)
        self.buckets = self.index.buckets
        repeats = np.asarray(self.index.repeats or np.ones(len(bucket)), int)
        if len(repeats) != len(bucket):
            raise InputError(f"{self.folder / INDEX}: found {len(repeats)} repeats, expected {len(bucket)}")
        groups = (np.flatnonzero(bucket == i) for i in range(len(self.buckets)))
        self.groups = [np.repeat(group, repeats[group]) for group in groups]

    @functools.cached_property
    def empty(self) -> dict[str, np.ndarray]:
        """What stands for no caption and no picture: "context", for SDXL "pooled", and "clip_penultimate", float16."""
        from safetensors.numpy import load_file

        return load_file(str(self.folder / EMPTY))

    @functools.cached_property
    def _records(self) -> Any:
        import grain

        records = grain.sources.ArrayRecordDataSource([str(self.folder / name) for name, _ in self.index.shards])
        if len(records) != len(self.index.bucket):
            raise InputError(f"{self.folder}: found {len(records)} records, expected the {len(self)} of {INDEX}")
        return records

    def __len__(self) -> int:
        return len(self.index.bucket)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row, not mirrored."""
        return self.read(index, False)

    def read(self, index: int, flip: bool) -> dict[str, Any]:
        """Return a row of the picture as it is, or mirrored."""
        row = decode_record(self._records[index])
        moments = row.pop("moments")[int(flip)]
        mean, std = np.split(moments, 2, -1)
        labels = tuple(label for label in row["labels"] if self._labels is None or label in self._labels)
        return {
            **row,
            "latents_mean": mean,
            "latents_std": std,
            "time_ids": row["time_ids"][int(flip)],
            **({"hint": row["hint"][int(flip)]} if "hint" in row else {}),
            "labels": labels,
        }

    def in_batches(self, batch_size: int, seed: int) -> Stream:
        """Return the endless rows, every `batch_size` of them a batch; see `jaxmix.tuning.data.BatchSource`."""

        def draw(index: int, group: int, rng: np.random.Generator) -> dict[str, Any]:
            return self.read(index, self.random_flip and bool(rng.random() < 0.5))

        return Stream(self.groups, batch_size, seed, draw)

    def describe(self) -> str:
        """Return one line that says how many rows there are, and of which sizes."""
        sizes = [f"{height}x{width}: {len(g)}" for (height, width), g in zip(self.buckets, self.groups, strict=True)]
        return f"{self.folder}: {len(self)} cached rows, height x width {', '.join(sizes)}"

    def check(
        self, pipe: Pipeline, cfg: PictureConfig | None = None, image_encoder: ImageEncoder | None = None
    ) -> None:
        """Raise InputError naming the difference if the cache was made with another model, or for other sizes.

        Without an image encoder it does not matter whether the cache was made with one.
        """
        expected = identify(pipe, image_encoder)
        held = {k for k in self.index.identity if image_encoder is not None or not k.startswith(IMAGE_ENCODER)}
        for key in sorted(set(expected) | held):
            found, wanted = self.index.identity.get(key, "none"), expected.get(key, "none")
            if found != wanted:
                raise InputError(
                    f"{self.folder}: made with another model ({self.index.model}): {key}: found {found}, "
                    f"expected {wanted}"
                )
        for key in ("resolution", "enable_bucket") if cfg is not None else ():
            if getattr(self.index, key) != getattr(cfg, key):
                raise InputError(
                    f"{self.folder}: made with another {key}: found {getattr(self.index, key)}, "
                    f"expected {getattr(cfg, key)}"
                )
