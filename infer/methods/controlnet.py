"""ControlNets (arXiv 2302.05543) in a job: rows whose pictures follow the edges, tiles or other maps of pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infer.checks import check_number
from infer.gallery import Picture
from infer.methods.image_prompt import check_pictures, check_there, check_window
from infer.methods.lora import check_loras as check_files
from infer.methods.method import BatchRows, Method, size_of
from infer.methods.method import Flags as Base
from infer.pictures import open_picture, picture_size, write_picture
from infer.rows import Field, Row
from jaxmix.control import whole_steps
from jaxmix.preprocessors import parse, preprocess
from jaxmix.types import InputError, shown

_ROUNDING = 2  # pixels by which the shape of a picture may differ from that of a small result
_FACTOR = 8  # and of a large one: sides of results are rounded down to multiples of this, unless a row says otherwise


@dataclasses.dataclass(frozen=True)
class Flags(Base):
    """ControlNets, and pictures for rows that name none. Fields of rows have one value for all nets, or one for each.

    Attributes:
        controlnet: ControlNet: mini-edges, mini-tile or mini-masks (embedded), diffusers' folder or a .safetensors
            file, PATH[:SCALE], where the scale (no unit) is 1 by default; the flag may be repeated, or given a JSON
            list: what the nets say adds up
        control_image: ControlNet: a picture to follow; the flag may be repeated, one for each net, in order
        preprocess: ControlNet: what makes the net's map of the picture, canny[:LOW,HIGH], tile[:PIXELS], blur[:SIGMA],
            gray, recolor[:GAMMA], scribble[:THRESHOLD], or none for pictures that are maps; the flag may be repeated
        control_scale: ControlNet: how strongly, 0 for not at all (no unit); multiplied by the scale of each net
        control_window: ControlNet: when, START,END in shares of the steps, 0 to 1; 0,0.5 is the first half
        guess_mode: ControlNet: whether to follow without a prompt, weakly in fine grids and not in the unconditional
            branch; a guidance scale of 3 to 5 goes with it
    """

    controlnet: list[str] | str | None = None
    control_image: list[str] | str | None = None
    preprocess: list[str] | str = "none"
    control_scale: list[float] | float = 1.0
    control_window: list[str] | str | None = None
    guess_mode: list[bool] | bool = False

    def __post_init__(self) -> None:
        """Refuse scales that are not numbers, unknown preprocessors, and files that are not there."""
        super().__post_init__()
        check_files("--controlnet", self.controlnet or [])
        check_numbers("--control-scale", self.control_scale)
        check_windows("--control-window", self.control_window or "0,1")
        check_switches("--guess-mode", self.guess_mode)
        for how in _several(self.preprocess):
            try:
                parse(how)
            except InputError as error:
                raise InputError(f"--preprocess: {error}") from None
        if self.control_image is not None:
            check_pictures("--control-image", self.control_image)

    def method(self) -> Method:
        """Return the method under these flags."""
        return ControlNet(self)


class ControlNet(Method):
    """Rows with pictures whose maps to follow."""

    name = "controlnet"
    switches = ("control_image",)

    def __init__(self, flags: Any) -> None:
        self.flags = flags
        self.files = check_files("--controlnet", flags.controlnet or [])
        self.how = _several(flags.preprocess)
        pictures = None if flags.control_image is None else check_pictures("--control-image", flags.control_image)
        windows = None if flags.control_window is None else check_windows("--control-window", flags.control_window)
        self.fields = {
            "control_image": Field(check_pictures, pictures, list),
            "control_scale": Field(check_numbers, check_numbers("--control-scale", flags.control_scale), list),
            "control_window": Field(check_windows, windows, lambda x: [list(w) for w in x]),
            "guess_mode": Field(check_switches, check_switches("--guess-mode", flags.guess_mode), list),
        }
        self._nets: list[Any] = []

    def prepare(self) -> None:
        """Look for the nets: a mistake there is one of the whole job."""
        for path, _ in self.files:
            check_there("--controlnet", path, "a ControlNet")
        given = {"--control-image": self.flags.control_image, "--guess-mode": any(_several(self.flags.guess_mode))}
        for flag, value in given.items():
            if value and not self.files:
                raise InputError(f"{flag}: found it without a --controlnet, expected the net that it is for")
        if self.files and len(self.how) not in (1, len(self.files)):
            raise InputError(
                f"--preprocess: found {len(self.how)}, expected 1 or one for each of {len(self.files)} nets"
            )
        for how in self.how:
            try:
                preprocess(np.zeros((_FACTOR, _FACTOR, 3), np.uint8), how)  # is what it needs installed?
            except InputError as error:
                raise InputError(f"--preprocess: {error}") from None

    def open(self, pipe: Any) -> None:
        """Read the nets for the model."""
        import jaxmix

        self._nets = [jaxmix.ControlNet.load(path, pipe) for path, _ in self.files]

    def defaults(self, row: Row) -> Mapping[str, Any]:
        """Return the size of the row's first picture, as diffusers does; one that starts from a picture has its own."""
        if row.image is not None:
            return {}
        height, width = picture_size(row["control_image"][0], _FACTOR)
        return {"height": height, "width": width}

    def complete(self, row: Row, pipe: Any) -> Row:
        """Refuse pictures without a net, of another shape or number, and windows of no step."""
        if not self._nets:
            names = " + ".join(Path(path).name for path in row["control_image"])
            raise InputError(f"control_image: found {names} without a --controlnet, expected a net to follow it")
        for key in self.fields:
            if row[key] is not None:
                self._each(row, key)
        high, wide = size_of(row)
        close = min(_FACTOR, max(_ROUNDING, min(high, wide) // 16))
        for path in row["control_image"]:
            h, w = picture_size(path, 1)
            if min(abs(w * high / h - wide), abs(h * wide / w - high)) > close:
                raise InputError(
                    f"control_image: {path}: found {h} x {w} pixels, expected the shape of the result, {high} x {wide}"
                )
        assert row.steps is not None, "complete() the row first"
        for window in self._windows(row):
            first, last = whole_steps(window, row.steps)
            if first == last:
                told = "{:g} to {:g}".format(*window)
                raise InputError(f"control_window: found {told}, no whole one of {row.steps} steps, expected one")
        return row

    def settings(self, row: Row) -> dict[str, Any]:
        """Return what no row can change."""
        return {"controlnet": [f"{path}:{scale:g}" for path, scale in self.files], "preprocess": list(self.how)}

    def program_key(self, rows: Sequence[Row]) -> Hashable:
        """Return what rows of a batch share: the windows."""
        keys = {self._windows(row) for row in rows if self.on(row)}
        if len(keys) > 1:
            raise InputError("control_window: found several in one group, expected the same")
        return next(iter(keys), None)

    def plan(self, row: Row) -> str:
        """Name the nets."""
        return "controlnet " + " + ".join(f"{Path(path).name}:{scale:g}" for path, scale in self.files)

    def build(self, pipe: Any, batch: BatchRows) -> Sequence[Any]:
        """Return each net with the maps of the rows; rows of a group without any are left alone."""
        made = []
        first = next(row for row in batch.rows if self.on(row))
        for i, (net, (_, scale)) in enumerate(zip(self._nets, self.files, strict=True)):
            maps, scales, guess = [], [], []
            for row in batch.rows:
                on = self.on(row)
                drawn = on and not batch.draft
                maps.append(self._map(row, i) if drawn else np.zeros((*size_of(row), 3), np.uint8))
                scales.append(scale * self._each(row, "control_scale")[i] if on else 0.0)
                guess.append(bool(on and self._each(row, "guess_mode")[i]))
            made.append(net.on(maps, scales, self._windows(first)[i], guess))
        return made

    def write_inputs(self, row: Row, out: Path) -> None:
        """Write the maps beside the result."""
        for i, _ in enumerate(self.files):
            write_picture(self._map(row, i), out / _input_name(row, i))

    def inputs(self, row: Row, out: Path) -> list[Picture]:
        """Show the maps."""
        height, width = size_of(row)
        return [Picture(_input_name(row, i), width, height, "map") for i, _ in enumerate(self.files)]

    def shown(self, row: Row) -> dict[str, str]:
        """Show the pictures with what was made of them, the scales, and what is not as usual."""
        pictures, scales = self._each(row, "control_image"), self._each(row, "control_scale")
        hows = self.how * (len(self.files) // len(self.how))
        told = [f"{how} of {Path(p).name} x {s:g}" for how, p, s in zip(hows, pictures, scales, strict=True)]
        more = (
            {"when": ", ".join("{:g} to {:g}".format(*w) for w in self._windows(row))} if row["control_window"] else {}
        )
        more |= {"guess mode": "on"} if any(row["guess_mode"]) else {}
        return {"map": " + ".join(told), **more}

    def _map(self, row: Row, i: int) -> np.ndarray:
        """Return a net's map at the size of the result, made of the picture at that size."""
        picture = open_picture(self._each(row, "control_image")[i], *size_of(row))
        return preprocess(picture, self.how[i if len(self.how) > 1 else 0])

    def _windows(self, row: Row) -> tuple[tuple[float, float], ...]:
        if row["control_window"] is None:
            return ((0.0, 1.0),) * len(self.files)
        return tuple(self._each(row, "control_window"))

    def _each(self, row: Row, key: str) -> Sequence[Any]:
        """Return a field's value for each net."""
        held = row[key]
        if len(held) not in (1, len(self.files)):
            raise InputError(f"{key}: found {len(held)}, expected 1 or one for each of {len(self.files)} nets")
        return held if len(held) == len(self.files) else held * len(self.files)


def check_numbers(key: str, value: Any) -> tuple[float, ...]:
    """Return numbers, from one or a list of them."""
    return tuple(check_number(key, x) for x in _listed(key, value))


def check_switches(key: str, value: Any) -> tuple[bool, ...]:
    """Return switches, from one or a list of them."""
    found = _listed(key, value)
    if not all(isinstance(x, bool) for x in found):
        raise InputError(f"{key}: found {shown(value)}, expected true or false, or a list of them")
    return tuple(found)


def check_windows(key: str, value: Any) -> tuple[tuple[float, float], ...]:
    """Return windows, from one, "START,END" or two numbers, or a list of them."""
    if isinstance(value, str) and value.strip().startswith("[["):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    several = isinstance(value, (list, tuple)) and value and all(isinstance(x, (str, list, tuple)) for x in value)
    return tuple(check_window(key, x) for x in (value if several else [value]))


def _listed(key: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    found = list(value) if isinstance(value, (list, tuple)) else [value]
    if not found:
        raise InputError(f"{key}: found an empty list, expected one value, or one for each net")
    return found


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _input_name(row: Row, i: int) -> str:
    return row.file_name.replace(".png", f"_map{i}.png")
