"""IP-Adapter (arXiv 2308.06721) in a job: rows that are told pictures beside words, or instead of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infer.checks import check_file, check_number, check_text, kind_of
from infer.gallery import Picture
from infer.methods.lora import check_loras as check_files
from infer.methods.method import BatchRows, Method, size_of
from infer.methods.method import Flags as Base
from infer.pictures import open_picture, picture_size, write_picture
from infer.rows import Field, Row
from jaxmix.command import progress
from jaxmix.control import rounded
from jaxmix.pipeline.embedded import EmbeddingFolder, Embeddings, Takes
from jaxmix.types import InputError, shown
from jaxmix.weights.files import exists, user_path

_AT_ONCE = 8  # pictures encoded between two signs of progress
_SHOWN = 192  # pixels of the longer side of a reference in the gallery


@dataclasses.dataclass(frozen=True)
class Flags(Base):
    """Adapters for image prompts, and pictures for rows that name none.

    Attributes:
        ip_adapter: IP-Adapter: mini-ip or mini-ip-plus (embedded), or a .safetensors file, PATH[:SCALE], where the
            scale (no unit) is 1 by default; the flag may be repeated, or given a JSON list: every adapter sees the
            pictures
        image_encoder: IP-Adapter, StyleAdapter: the CLIP image encoder that the adapter was trained with: mini-clip
            (embedded), a folder or a file
        image_embeds: IP-Adapter: a folder that keeps what the image encoder sees in each picture, for other rows, jobs
            and workers; one that holds all of them needs no image encoder
        ip_image: IP-Adapter: a picture to follow; the flag may be repeated, or given a JSON list
        ip_scale: IP-Adapter: how strongly, 0 for not at all (no unit); multiplied by the scale of each adapter
        ip_blocks: IP-Adapter: which blocks listen, style, layout or style+layout (InstantStyle), or a regular
            expression over the names of cross-attentions; default: all
        ip_mask: IP-Adapter: where each picture is seen, white in a picture of the result's shape; one for each picture
        ip_window: IP-Adapter: when pictures are seen, START,END in shares of the steps, 0 to 1; 0,0.5 is the first half
        ip_subtract: IP-Adapter, base: a phrase for what is to be taken out of the pictures (InstantStyle), where the
            image encoder is the folder of a whole CLIP, or the model has its text encoder
        ip_subtract_scale: IP-Adapter: how often it is taken out (no unit)
    """

    ip_adapter: list[str] | str | None = None
    image_encoder: str | None = None
    image_embeds: str | None = None
    ip_image: list[str] | str | None = None
    ip_scale: float = 1.0
    ip_blocks: str | None = None
    ip_mask: list[str] | str | None = None
    ip_window: str | None = None
    ip_subtract: str | None = None
    ip_subtract_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse scales that are not numbers, and files that are not there."""
        super().__post_init__()
        check_files("--ip-adapter", self.ip_adapter or [])
        check_number("--ip-scale", self.ip_scale)
        check_number("--ip-subtract-scale", self.ip_subtract_scale)
        for flag, value in (("--ip-image", self.ip_image), ("--ip-mask", self.ip_mask)):
            if value is not None:
                check_pictures(flag, value)
        if self.ip_window is not None:
            check_window("--ip-window", self.ip_window)

    def method(self) -> Method:
        """Return the method under these flags."""
        return ImagePrompt(self)


class ImagePrompt(Method):
    """Rows with pictures to follow."""

    name = "ip_adapter"
    switches = ("ip_image",)

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        self.files = check_files("--ip-adapter", flags.ip_adapter or [])
        pictures = None if flags.ip_image is None else check_pictures("--ip-image", flags.ip_image)
        masks = None if flags.ip_mask is None else check_pictures("--ip-mask", flags.ip_mask)
        window = None if flags.ip_window is None else check_window("--ip-window", flags.ip_window)
        self.fields = {
            "ip_image": Field(check_pictures, pictures, list, enough=True),
            "ip_scale": Field(check_number, flags.ip_scale),
            "ip_blocks": Field(check_text, flags.ip_blocks),
            "ip_mask": Field(check_pictures, masks, list),
            "ip_window": Field(check_window, window, list),
            "ip_subtract": Field(check_text, flags.ip_subtract),
            "ip_subtract_scale": Field(check_number, flags.ip_subtract_scale),
        }
        self._adapters: list[Any] = []
        self._kept: EmbeddingFolder | None = None

    def prepare(self) -> None:
        """Look for the adapters, the encoder and the folder: a mistake there is one of the whole job."""
        from jaxmix.pipeline.vision import EMBEDDED as ENCODERS

        for path, _ in self.files:
            check_there("--ip-adapter", path, "an IP-Adapter")
        encoder = self.flags.image_encoder
        if encoder is not None and encoder not in ENCODERS and not exists(user_path(encoder)):
            raise InputError(f"--image-encoder: {encoder}: no such file or folder, nor one of {', '.join(ENCODERS)}")
        readers = ("style_adapter", "content_ip", "style_ip")  # which read with the same encoder
        styled = any(getattr(self.flags, name, None) for name in readers)
        for flag, value in (("--image-encoder", encoder and not styled), ("--image-embeds", self.flags.image_embeds)):
            if value and not self.files:
                raise InputError(f"{flag}: found it without an --ip-adapter, expected the adapter that it is for")
        if (kept := self.flags.image_embeds) is not None:
            if "://" in kept:
                raise InputError(f"--image-embeds: found {kept!r}, expected a local folder")
            if self.flags.image_encoder is None and not exists(user_path(kept)):
                raise InputError(
                    f"--image-embeds: {kept}: no such folder, expected it, or an --image-encoder to fill it"
                )

    def open(self, pipe: Any) -> None:
        """Read the adapters for the model, and the encoder once for all of them."""
        import jaxmix

        encoder = self.flags.image_encoder
        for path, _ in self.files:
            read = jaxmix.ImageEncoder.load(encoder, pipe.unet.dtype) if encoder and not self._adapters else None
            shared = read or (self._adapters[0].image_encoder if self._adapters else None)
            self._adapters.append(jaxmix.IPAdapter.load(path, pipe, shared))
        if self.flags.image_embeds is not None:
            try:
                self._kept = jaxmix.EmbeddingFolder(self.flags.image_embeds, self._adapters[0].image_encoder)
            except InputError as error:
                raise InputError(f"--image-embeds: {error}") from None

    def complete(self, row: Row, pipe: Any) -> Row:
        """Refuse pictures without an adapter, masks of another number, windows of no step, and what cannot be read."""
        if not self._adapters:
            raise InputError(f"ip_image: found {_names(row)} without an --ip-adapter, expected one to read it")
        for path in row["ip_image"]:
            picture_size(path, 1)
        for adapter in self._adapters:
            if self._kept is None:
                adapter.needs_encoder()
            else:
                for path in row["ip_image"]:
                    self._kept.check(path, adapter.takes)
        if row["ip_mask"] is not None and len(row["ip_mask"]) != len(row["ip_image"]):
            raise InputError(
                f"ip_mask: found {len(row['ip_mask'])}, expected one for each of {len(row['ip_image'])} pictures"
            )
        assert row.steps is not None, "complete() the row first"
        first, last = rounded(_window(row), row.steps)
        if first == last:
            raise InputError(f"ip_window: found {_shares(row)}, none of {row.steps} steps, expected at least one")
        return row

    def settings(self, row: Row) -> dict[str, Any]:
        """Return what no row can change."""
        encoder = self.flags.image_encoder or self.flags.image_embeds  # alone, it stands for the one that filled it
        return {"ip_adapter": [f"{path}:{scale:g}" for path, scale in self.files], "encoder": encoder}

    def program_key(self, rows: Sequence[Row]) -> Hashable:
        """Return what rows of a batch share: how many pictures, whether with masks, and the blocks and steps."""
        keys = {
            (len(row["ip_image"]), row["ip_mask"] is None, row["ip_blocks"], _window(row))
            for row in rows
            if self.on(row)
        }
        if len(keys) > 1:
            raise InputError(
                "ip_image: found several numbers of pictures, blocks or windows in one group, expected the same"
            )
        return next(iter(keys), None)

    def plan(self, row: Row) -> str:
        """Name the adapters, the blocks and the steps."""
        told = " + ".join(f"{Path(path).name}:{scale:g}" for path, scale in self.files)
        told += f" in {row['ip_blocks']}" if row["ip_blocks"] else ""
        return f"ip-adapter {told}" + (f" from {_shares(row)} of the steps" if row["ip_window"] else "")

    def begin(self, pipe: Any, rows: Sequence[Row]) -> None:
        """Encode the pictures of which the folder lacks something."""
        if self._kept is None:
            return
        takes = [adapter.takes for adapter in self._adapters]
        if todo := self._kept.missing([path for row in rows for path in row["ip_image"]], takes):
            with progress(len(todo), "encode", "pictures") as bar:
                for start in range(0, len(todo), _AT_ONCE):
                    self._kept.add(todo[start : start + _AT_ONCE], takes)
                    bar.update(len(todo[start : start + _AT_ONCE]))

    def build(self, pipe: Any, batch: BatchRows) -> Sequence[Any]:
        """Return each adapter with the pictures of the rows; rows of a group without any do not see the others'."""
        first = next(row for row in batch.rows if self.on(row))
        rows = [row if self.on(row) else first for row in batch.rows]
        scales = np.asarray([row["ip_scale"] if self.on(row) else 0.0 for row in batch.rows], np.float32)
        told = [row["ip_subtract"] or None for row in rows]
        masks = None
        if first["ip_mask"] is not None:
            masks = [[open_picture(path, *size_of(row), mask=True) for path in row["ip_mask"]] for row in rows]
        return [
            adapter.on(
                self._seen([row["ip_image"] for row in rows], adapter.takes, batch.draft),
                list(scale * scales),
                blocks=first["ip_blocks"],
                masks=masks,
                subtract=told if any(told) else None,
                subtract_scale=[row["ip_subtract_scale"] for row in rows],
                window=_window(first),
            )
            for adapter, (_, scale) in zip(self._adapters, self.files, strict=True)
        ]

    def _seen(self, paths: Sequence[tuple[str, ...]], takes: Takes, draft: bool) -> list[Any]:
        """Return the pictures of each row, or what the folder holds of them: of a draft, nothing of the right shape."""
        if self._kept is None:
            return [list(some) for some in paths]
        if draft:
            shape = (takes.width,) if takes.output == "projected" else (1, takes.width)
            nothing = np.broadcast_to(np.float32(0), shape)
            return [Embeddings(np.broadcast_to(nothing, (len(some), *shape)), nothing) for some in paths]
        read = {some: self._kept.read(some, takes) for some in dict.fromkeys(paths)}
        return [read[some] for some in paths]

    def write_inputs(self, row: Row, out: Path) -> None:
        """Write the pictures, small, beside the result."""
        for i, path in enumerate(row["ip_image"]):
            write_picture(open_picture(path, *shown_size(path)), out / _input_name(row, i))

    def inputs(self, row: Row, out: Path) -> list[Picture]:
        """Show the pictures."""
        found = []
        for i, path in enumerate(row["ip_image"]):
            height, width = shown_size(path)
            found.append(Picture(_input_name(row, i), width, height, "follows"))
        return found

    def caption(self, row: Row) -> str:
        """Name the pictures."""
        return _names(row)

    def shown(self, row: Row) -> dict[str, str]:
        """Show the pictures, their scale, the blocks and the steps."""
        more = {"blocks": row["ip_blocks"]} if row["ip_blocks"] else {}
        more |= {"seen": f"from {_shares(row)} of the steps"} if row["ip_window"] else {}
        more |= {"without": f"{row['ip_subtract']} x {row['ip_subtract_scale']:g}"} if row["ip_subtract"] else {}
        return {"follows": f"{_names(row)} x {row['ip_scale']:g}", **more}


def check_there(flag: str, path: str, what: str, kind: str | None = None) -> None:
    """Raise `InputError` if a file, a folder or an adapter of the package is not there, or is for another flag.

    ``kind`` is the flag whose adapters this one takes, if another.
    """
    from jaxmix.methods import controlnet, ip_adapter, style_adapter, vmix

    embedded = {
        "--ip-adapter": ip_adapter.EMBEDDED,
        "--style-adapter": style_adapter.EMBEDDED,
        "--controlnet": controlnet.EMBEDDED,
        "--vmix": vmix.EMBEDDED,
    }
    names = embedded[kind or flag]
    try:
        if path in names or exists(user_path(path)):
            return
    except InputError as error:
        raise InputError(f"{flag}: {error}") from None
    expected = " or ".join([what, *names])
    found = next((f"it is for {other}" for other, held in embedded.items() if path in held), "no such file or folder")
    raise InputError(f"{flag}: {path}: {found}, expected {expected}")


def check_pictures(key: str, value: Any) -> tuple[str, ...]:
    """Return the paths of pictures, from one, a list of them, or a JSON list."""
    if isinstance(value, str) and value.strip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):  # a file with such a name
            value = json.loads(value)
    paths = value if isinstance(value, (list, tuple)) else [value]
    if not paths or not all(isinstance(path, str) for path in paths):
        raise InputError(f"{key}: found {kind_of(value)}, expected a picture or a list of pictures")
    return tuple(check_file(key, path) for path in paths)


def check_window(key: str, value: Any) -> tuple[float, float]:
    """Return the shares of the steps between which pictures are seen, from "START,END" or a list of both."""
    shares: Any = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):  # no numbers
            shares = json.loads(f"[{value.strip().removeprefix('[').removesuffix(']')}]")
    if isinstance(shares, (list, tuple)) and len(shares) == 2:
        numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in shares)
        if numbers and 0 <= shares[0] < shares[1] <= 1:
            return float(shares[0]), float(shares[1])
    raise InputError(f"{key}: found {shown(value)}, expected two numbers START,END with 0 <= START < END <= 1")


def _window(row: Row) -> tuple[float, float]:
    """Return the shares of the steps in which a row's pictures are seen."""
    return row["ip_window"] or (0.0, 1.0)


def _shares(row: Row) -> str:
    return "{:g} to {:g}".format(*_window(row))


def _names(row: Row) -> str:
    return " + ".join(Path(path).name for path in row["ip_image"])


def shown_size(path: str) -> tuple[int, int]:
    height, width = picture_size(path, 1)
    shrink = min(1.0, _SHOWN / max(height, width))
    return max(1, round(height * shrink)), max(1, round(width * shrink))


def _input_name(row: Row, i: int) -> str:
    return row.file_name.replace(".png", f"_follows{i}.png")
