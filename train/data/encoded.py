"""Captioned pictures of a generator, encoded once into a folder: later passes over them cost no encoding."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxmix import command
from jaxmix.tuning.data import Source
from jaxmix.types import InputError

PLAN = "plan.json"
MOMENTS = "moments.float16"
TEXTS = "texts.jsonl"


@dataclasses.dataclass(frozen=True)
class EncodedPictures:
    """Rows {"latents_mean", "latents_std" (h, w, c) float16, "text"} in the order of a source's indices.

    `moments` (n, h, w, 2 c) is mapped from a file, so it takes no memory of its own.
    """

    moments: np.ndarray
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        mean, std = np.split(np.asarray(self.moments[index]), 2, -1)
        return {"latents_mean": mean, "latents_std": std, "text": self.texts[index]}


def encode_once(
    source: Source,
    count: int,
    folder: Path,
    plan: Mapping[str, Any],
    encode: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
) -> EncodedPictures:
    """Return the first `count` rows {"image", "text"} of `source`, encoding those that `folder` lacks.

    `encode` maps images (batch_size, H, W, 3) uint8 to moments (batch_size, h, w, 2 c) float16, and `plan` says what
    they depend on. A run that was stopped goes on where it was, and a larger `count` adds to what is there. Raises
    InputError for a folder that was filled under another plan, and for moments that are not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_plan(folder, plan)
    shape = encode(np.stack([source[0]["image"]] * batch_size)).shape[1:]
    row = 2 * int(np.prod(shape))
    with open(folder / MOMENTS, "ab") as moments, open(folder / TEXTS, "ab") as lines:
        # Moments are written before their texts, so what both files hold is whole.
        kept = (folder / TEXTS).read_bytes().splitlines(keepends=True)[: moments.tell() // row]
        kept = [line for line in kept if line.endswith(b"\n")]
        moments.truncate(len(kept) * row)
        lines.truncate(sum(map(len, kept)))
        texts = [json.loads(line) for line in kept]
        with command.progress(count, "encoding", "pictures") as bar:
            bar.update(min(len(texts), count))
            for images, captions in _read(source, range(len(texts), count), batch_size):
                made = encode(images)[: len(captions)].astype(np.float16)
                if not np.isfinite(made).all():
                    raise InputError(f"{folder}: found latents that are not finite in float16; is the model damaged?")
                for file, content in ((moments, made.tobytes()), (lines, b"".join(map(_line, captions)))):
                    file.write(content)
                    file.flush()
                texts += captions
                bar.update(len(captions))
    mapped = np.memmap(folder / MOMENTS, np.float16, "r", shape=(len(texts), *shape))
    return EncodedPictures(mapped[:count], texts[:count])


def _read(source: Source, indices: range, size: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yield (size, H, W, 3) pictures, the last one repeated, with their captions; a batch is read ahead."""

    def batch(start: int) -> tuple[np.ndarray, list[str]]:
        rows = [source[i] for i in indices[start : start + size]]
        images = [row["image"] for row in rows]
        return np.stack(images + images[-1:] * (size - len(rows))), [row["text"] for row in rows]

    starts = range(0, len(indices), size)
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(batch, start) for start in starts[:1]]
        for start in starts:
            ready = ahead.pop().result()
            ahead += [pool.submit(batch, start + size)] if start + size < len(indices) else []
            yield ready


def _line(text: str) -> bytes:
    return json.dumps(text).encode() + b"\n"


def _check_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    file = folder / PLAN
    wanted = json.loads(json.dumps(plan))
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        for key in sorted({*wanted, *found}):
            if found.get(key) != wanted.get(key):
                raise InputError(
                    f"{folder}: filled with another {key}: found {found.get(key)}, expected {wanted.get(key)}; "
                    "delete the folder, or give another output_dir"
                )
    elif any(folder.iterdir()):
        raise InputError(f"{folder}: found files but no {PLAN}, expected an empty folder")
    else:
        file.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
