"""Pictures of any source as rows for training: one size per batch, bad rows replaced, SDXL's sizes included."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxmix import command
from jaxmix.types import InputError
from train.data.buckets import PictureConfig, Size, bucket_sizes, choose_bucket, crop_to_bucket
from train.data.hints import Hint
from train.data.order import Stream
from train.data.rows import BadRow, PictureSource

MIDDLE = (0.5, 0.5)
_THREADS = 16  # picture headers read at a time


class BadRows:
    """The rows that proved unusable: each is reported once on stderr, and more than `limit` of them are an error."""

    def __init__(self, where: str, limit: int) -> None:
        self.where, self.limit = where, limit
        self.reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Note a row. Raises InputError naming it if there are now too many."""
        with self._lock:
            if name not in self.reasons:
                self.reasons[name] = reason
                print(f"bad row {name}: {reason}", file=sys.stderr, flush=True)
            count = len(self.reasons)
        if count > self.limit:
            raise InputError(
                f"{self.where}: found {count} bad rows, expected at most {self.limit} (max_bad_rows); "
                f"the last is {name}: {reason}"
            )


class Pictures:
    """Rows {"image" uint8 (H, W, 3), "text", "labels", "id", "time_ids" float32 (6,)}, a `BatchSource`.

    Every batch comes from one bucket; without `enable_bucket` there is only one, a square. With buckets the headers of
    all pictures are read on creation. An unusable row is reported once and replaced by another row of its bucket, which
    depends on the seed and the place alone; too many of them raise InputError. ``whole`` adds entries to a row, made
    from its picture before it is cropped, and ``hint`` a hint uint8 (H, W, 3).
    """

    def __init__(
        self,
        source: PictureSource,
        cfg: PictureConfig,
        whole: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None,
        hint: Hint | None = None,
    ) -> None:
        self.source, self.cfg, self.whole, self.hint = source, cfg, whole, hint
        limit = max(10, len(source) // 100) if cfg.max_bad_rows is None else cfg.max_bad_rows
        self.bad = BadRows(source.where, limit)
        sizes = bucket_sizes(cfg)
        chosen = self._choose(sizes) if cfg.enable_bucket else self._take_all(sizes[0])
        self.buckets: list[Size] = sorted({bucket for bucket in chosen if bucket is not None})
        if not self.buckets:
            raise InputError(f"{source.where}: found no usable row among {len(source)}")
        places = {bucket: i for i, bucket in enumerate(self.buckets)}
        self._group_of = np.asarray([-1 if bucket is None else places[bucket] for bucket in chosen])
        self.once = [np.flatnonzero(self._group_of == i) for i in range(len(self.buckets))]
        repeats = np.asarray([entry.repeats for entry in source.entries])
        self.groups = [np.repeat(group, repeats[group]) for group in self.once]
        if source.known and not any(entry.labels for entry in source.entries):
            print(f"{source.where}: no row has a label; known: {', '.join(source.known)}", file=sys.stderr)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row cropped from the centre of its picture. Raises BadRow if it cannot be used."""
        if self._group_of[index] < 0:
            raise BadRow(self.bad.reasons[self.source.entries[index].id])
        return self.read(index, self.buckets[self._group_of[index]])

    def read(self, index: int, bucket: Size, at: tuple[float, float] = MIDDLE, flip: bool = False) -> dict[str, Any]:
        """Return a row as `crop_to_bucket` crops it for a bucket. Raises BadRow if it cannot be used."""
        row = self.source[index]
        image, time_ids = crop_to_bucket(row["image"], bucket, at, flip)
        more = {} if self.whole is None else self.whole(row["image"])
        if self.hint is not None:
            more = {**more, "hint": self.hint(row, image, bucket, at, flip)}
        return {**row, "image": image, "time_ids": time_ids, **more}

    def in_batches(self, batch_size: int, seed: int) -> Stream:
        """Return the endless rows, every `batch_size` of them a batch; see `jaxmix.tuning.data.BatchSource`."""
        return Stream(self.groups, batch_size, seed, self._draw)

    def describe(self) -> str:
        """Return one line that says how many rows there are, and of which sizes."""
        counts = [
            f"{height}x{width}: {len(group)}" for (height, width), group in zip(self.buckets, self.once, strict=True)
        ]
        once, shown = (sum(map(len, groups)) for groups in (self.once, self.groups))
        said = f", {shown} with their repeats" if shown != once else ""
        return f"{self.source.where}: {len(self.source)} rows{said}, height x width {', '.join(counts)}"

    def _draw(self, index: int, group: int, rng: np.random.Generator) -> dict[str, Any]:
        flip = self.cfg.random_flip and bool(rng.random() < 0.5)
        at = MIDDLE if self.cfg.center_crop else tuple(rng.random(2).tolist())
        try:
            return self.read(index, self.buckets[group], at, flip)
        except BadRow as fault:
            self.bad.add(self.source.entries[index].id, str(fault))
        for other in rng.permutation(self.groups[group]):
            try:
                return self.read(int(other), self.buckets[group], at, flip)
            except BadRow as fault:
                self.bad.add(self.source.entries[other].id, str(fault))
        height, width = self.buckets[group]
        raise InputError(
            f"{self.source.where}: none of the {len(self.groups[group])} rows of {height}x{width} is usable"
        )

    def _take_all(self, size: Size) -> list[Size | None]:
        chosen: list[Size | None] = []
        for entry in self.source.entries:
            if entry.fault:
                self.bad.add(entry.id, entry.fault)
            chosen.append(None if entry.fault else size)
        return chosen

    def _choose(self, sizes: list[Size]) -> list[Size | None]:
        def measure(index: int) -> Size | BadRow:
            try:
                return choose_bucket(self.source.size(index), sizes, self.cfg)
            except BadRow as fault:
                return fault

        chosen: list[Size | None] = []
        count = len(self.source)
        with ThreadPoolExecutor(_THREADS) as pool, command.progress(count, "reading sizes", "pictures") as bar:
            for entry, found in zip(self.source.entries, pool.map(measure, range(count)), strict=True):
                if isinstance(found, BadRow):
                    self.bad.add(entry.id, str(found))
                chosen.append(None if isinstance(found, BadRow) else found)
                bar.update()
        return chosen
