"""InstantStyle-Plus (arXiv 2407.00788) in a job: a content picture drawn again in the style of another."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infer.checks import check_file, check_number, check_text
from infer.gallery import Picture
from infer.methods.image_prompt import check_there
from infer.methods.method import BatchRows, Method, size_of
from infer.methods.method import Flags as Base
from infer.pictures import open_cropped, write_picture
from infer.rows import Field, Row
from jaxmix.preprocessors import parse, preprocess
from jaxmix.types import InputError
from jaxmix.weights.files import exists, user_path

NAME = "instantstyle_plus"
_PARTS = ("content_ip", "style_ip", "tile_net", "guide")
_NUMBERS = ("content_ip_scale", "style_ip_scale", "tile_scale", "style_guidance", "content_guidance")


@dataclasses.dataclass(frozen=True)
class Flags(Base):
    """The parts of InstantStyle-Plus, each of which may be left out; the pictures are --content and --style.

    Attributes:
        content_ip: InstantStyle-Plus: an IP-Adapter that shows the content to all blocks, weakly
        style_ip: InstantStyle-Plus: an IP-Adapter that shows the style to --style-blocks, may be the same; both read
            with --image-encoder
        tile_net: InstantStyle-Plus: a tile ControlNet that follows the content
        tile_map: InstantStyle-Plus: what makes the net's map of the content, none (itself, as the authors do) or tile:8
        style_blocks: InstantStyle-Plus: the blocks of style, style or a regular expression
        content_ip_scale: InstantStyle-Plus: how strongly all blocks see the content (no unit)
        style_ip_scale: InstantStyle-Plus: how strongly the blocks of style see the style (no unit)
        tile_scale: InstantStyle-Plus: how strongly the net follows the content (no unit)
        renoise: InstantStyle-Plus: iterations that refine a step of the inversion (ReNoise); 0 for none
        renoise_regularise: InstantStyle-Plus: whether ReNoise keeps predictions like noise
        guide: InstantStyle-Plus: what guidance looks with: the checkpoint of CSD as .safetensors, or the folder or file
            of a CLIP, or mini-clip
        style_guidance: InstantStyle-Plus: weight of guidance by the style, 0 for none (no unit)
        content_guidance: InstantStyle-Plus: weight of guidance by the content, 0 for none (no unit)
    """

    content_ip: str | None = None
    style_ip: str | None = None
    tile_net: str | None = None
    tile_map: str = "none"
    style_blocks: str = "style"
    content_ip_scale: float = 0.2
    style_ip_scale: float = 1.2
    tile_scale: float = 0.4
    renoise: int = 1
    renoise_regularise: bool = True
    guide: str | None = None
    style_guidance: float = 0.0
    content_guidance: float = 0.0

    def __post_init__(self) -> None:
        """Refuse numbers that are none, and an unknown preprocessor."""
        super().__post_init__()
        for name in _NUMBERS:
            check_number(_flag(name), getattr(self, name))
        if self.renoise < 0:
            raise InputError(f"--renoise: found {self.renoise}, expected a number of iterations from 0")
        try:
            parse(self.tile_map)
        except InputError as error:
            raise InputError(f"--tile-map: {error}") from None

    def method(self) -> Method:
        """Return the method under these flags."""
        return InstantStylePlus(self)


class InstantStylePlus(Method):
    """Rows of a content and a style picture whose transfer is this one."""

    name = NAME
    switches = ("content", "style")
    choice = ("transfer", NAME)
    stands_for = "style_transfer"

    def __init__(self, flags: Any) -> None:
        self.flags = flags
        self.fields = {
            "content": Field(check_file, flags.content, enough=True),
            "style": Field(check_file, flags.style, enough=True),
            "transfer": Field(check_text, flags.transfer),
            **{name: Field(check_number, getattr(flags, name)) for name in _NUMBERS},
        }
        self._parts: dict[str, Any] = {}

    def prepare(self) -> None:
        """Look for the parts: a mistake there is one of the whole job."""
        flags = self.flags
        for flag, kind, what in (
            ("content_ip", "--ip-adapter", "an IP-Adapter"),
            ("style_ip", "--ip-adapter", "an IP-Adapter"),
            ("tile_net", "--controlnet", "a ControlNet"),
        ):
            if (path := getattr(flags, flag)) is not None:
                check_there(_flag(flag), path, what, kind)
        asked = flags.transfer == NAME  # rows may ask for it, too, but for the parts there are flags alone
        if asked and flags.style_ip is None and flags.guide is None:
            raise InputError("--style-ip, --guide: found neither, expected what follows the style")
        if flags.guide is not None:
            from jaxmix.pipeline.vision import EMBEDDED

            if flags.guide not in EMBEDDED and not exists(user_path(flags.guide)):
                raise InputError(f"--guide: {flags.guide}: no such file or folder, expected a CSD, a CLIP or mini-clip")
        if flags.tile_net is not None:
            try:
                preprocess(np.zeros((8, 8, 3), np.uint8), flags.tile_map)  # is what it needs installed?
            except InputError as error:
                raise InputError(f"--tile-map: {error}") from None

    def open(self, pipe: Any) -> None:
        """Read the parts for the model, an adapter that is both once."""
        import jaxmix

        flags = self.flags
        kept: dict[str, Any] = {}
        for name in ("content_ip", "style_ip"):
            path = getattr(flags, name)
            if path is not None and path not in kept:
                encoder = flags.image_encoder
                if encoder and kept:
                    encoder = next(iter(kept.values())).image_encoder
                kept[path] = jaxmix.IPAdapter.load(path, pipe, encoder)
                kept[path].needs_encoder()
        self._parts = {
            "content_adapter": kept.get(flags.content_ip),
            "style_adapter": kept.get(flags.style_ip),
            "tile": None if flags.tile_net is None else jaxmix.ControlNet.load(flags.tile_net, pipe),
            "guide": None if flags.guide is None else _open_guide(flags.guide),
        }

    def arrange(self, rows: Sequence[Row], alone: Mapping[str, None]) -> list[Row]:
        """Return the rows with the captions beside their contents, content.txt, and the authors' negative prompt.

        Both only where the row has none.
        """
        given = [name for name in _PARTS if getattr(self.flags, name) is not None]
        if given and rows and not any(row["transfer"] == NAME for row in rows):
            found = getattr(self.flags, given[0])
            raise InputError(f"{_flag(given[0])}: found {found} and no row whose transfer is {NAME}, expected one")
        return [self._captioned(row) for row in rows]

    def _captioned(self, row: Row) -> Row:
        from jaxmix.methods.instantstyle_plus import NEGATIVE_PROMPT

        if row["content"] is None or row["transfer"] != NAME:
            return row
        if row.negative_prompt is None:
            row = dataclasses.replace(row, negative_prompt=NEGATIVE_PROMPT)
        if row.prompt.strip():
            return row
        with contextlib.suppress(OSError, UnicodeDecodeError, InputError):  # then it has none, and is refused for it
            text = user_path(_beside(row["content"])).read_text(encoding="utf-8-sig")
            return dataclasses.replace(row, prompt=check_text("caption", " ".join(text.split())))
        return row

    def defaults(self, row: Row) -> Mapping[str, Any]:
        """Return the authors' settings."""
        return {"sampler": "ddim", "steps": 50, "guidance_scale": 5.0}

    def complete(self, row: Row, pipe: Any) -> Row:
        """Refuse a row without two pictures or without a caption, or with a sampler other than DDIM."""
        for key in ("content", "style"):
            if row[key] is None:
                raise InputError(f"no field '{key}', expected a picture")
            open_cropped(row[key], *size_of(row))
        if not row.prompt.strip():
            beside = _beside(row["content"])
            raise InputError(f"prompt: found none, expected a caption of {row['content']}, or its text in {beside}")
        if row.sampler != "ddim":
            raise InputError(f"sampler: found {row.sampler}, expected ddim, which the method inverts")
        if row.image is not None:
            raise InputError("image: found it with 'content' and 'style', expected these alone")
        if self._parts["style_adapter"] is None and self._parts["guide"] is None:
            raise InputError(f"transfer: found {NAME} without --style-ip or --guide, expected what follows the style")
        if self._parts["guide"] is None and (row["style_guidance"] or row["content_guidance"]):
            raise InputError("style_guidance, content_guidance: found one without --guide, expected what looks")
        return row

    def settings(self, row: Row) -> dict[str, Any]:
        """Return the flags that no row can change."""
        names = ("content_ip", "style_ip", "tile_net", "tile_map", "style_blocks", "renoise", "renoise_regularise")
        held = {name: getattr(self.flags, name) for name in (*names, "guide")}
        return {**held, "encoder": self.flags.image_encoder}

    def program_key(self, rows: Sequence[Row]) -> Hashable:
        """Compile rows that are guided as programs of their own."""
        return any(row["style_guidance"] or row["content_guidance"] for row in rows)

    def build(self, pipe: Any, batch: BatchRows) -> Sequence[Any]:
        """Return the method for rows."""
        import jaxmix

        rows = batch.rows
        if not all(self.on(row) for row in rows):
            raise InputError("content and style: found them in some rows of the group, expected them in all or none")
        iterations = self.flags.renoise
        renoise = jaxmix.ReNoise(iterations, regularise=self.flags.renoise_regularise and iterations > 0)
        given = {name: [row[name] for row in rows] for name in _NUMBERS}
        return [
            jaxmix.InstantStylePlus(
                content=[open_cropped(row["content"], *size_of(row)) for row in rows],
                style=[row["style"] for row in rows],
                **self._parts,
                renoise=renoise,
                content_scale=given["content_ip_scale"],
                style_scale=given["style_ip_scale"],
                style_blocks=self.flags.style_blocks,
                tile_scale=given["tile_scale"],
                tile_map=None if self.flags.tile_map == "none" else self.flags.tile_map,
                style_guidance=given["style_guidance"],
                content_guidance=given["content_guidance"],
            )
        ]

    def write_inputs(self, row: Row, out: Path) -> None:
        """Write both pictures as they were used."""
        for key in ("content", "style"):
            write_picture(open_cropped(row[key], *size_of(row)), out / _input_name(row, key))

    def inputs(self, row: Row, out: Path) -> list[Picture]:
        """Show both pictures."""
        height, width = size_of(row)
        return [Picture(_input_name(row, key), width, height, key) for key in ("content", "style")]

    def shown(self, row: Row) -> dict[str, str]:
        """Show the scales."""
        flags = self.flags
        scales = {"content": flags.content_ip, "style": flags.style_ip, "tile": flags.tile_net}
        names = {"content": "content_ip_scale", "style": "style_ip_scale", "tile": "tile_scale"}
        told = [f"{key} {row[names[key]]:g}" for key, path in scales.items() if path is not None]
        guided = [f"{key} {row[key + '_guidance']:g}" for key in ("style", "content") if row[key + "_guidance"]]
        return {"parts": ", ".join(told) or "none"} | ({"guided by": ", ".join(guided)} if guided else {})


def _beside(picture: str) -> str:
    """Return the name of the text beside a picture."""
    folder, slash, name = picture.rpartition("/")
    return f"{folder}{slash}{Path(name).with_suffix('.txt')}"


def _open_guide(path: str) -> Any:
    """Return the CSD or the image encoder of a file or folder."""
    import jaxmix
    from jaxmix.pipeline.vision import EMBEDDED

    where = user_path(path)
    if path in EMBEDDED or where.is_dir():
        return jaxmix.ImageEncoder.load(path)
    try:
        return jaxmix.CSD.load(path)
    except InputError as error:
        if where.suffix.lower() != ".safetensors":
            raise InputError(f"--guide: {error}") from None
    return jaxmix.ImageEncoder.load(path)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _input_name(row: Row, key: str) -> str:
    return row.file_name.replace(".png", f"_{key}.png")
