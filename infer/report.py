"""The report at the end of a job: the gallery, the contact sheet and the line of figures."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path

from infer.again import command_of, row_lines
from infer.gallery import Item, Picture, write_contact_sheet, write_gallery
from infer.grid import read_axes, told
from infer.manifest import Manifest
from infer.measure import CompileClock
from infer.methods.registry import Methods
from infer.rows import BadRow, Row
from infer.sheets import write_sheets
from jaxmix import paths


@dataclasses.dataclass
class Times:
    """Images drawn in one run, and the seconds it took; `drawing` excludes compilation.

    `png` is the time of the threads that write, beside the device, and `waited` the share of its time in which the
    device had nothing to do.
    """

    images: int = 0
    whole: float = 0.0
    drawing: float = 0.0
    compile: float = 0.0
    waited: float = 0.0
    png: float = 0.0
    devices: int = 1

    @property
    def rate(self) -> float:
        """Images per second once everything is compiled."""
        return self.images / max(self.drawing, 1e-9)

    @property
    def speed(self) -> str:
        """The rate as it is shown, and that of each device if there are several."""
        each = f" ({self.rate / self.devices:.3g} a device)" if self.devices > 1 else ""
        return f"{self.rate:.3g} images/s{each}"


def write_overview(
    out: Path,
    model: str,
    rows: Sequence[Row],
    bad: Sequence[BadRow],
    manifest: Manifest,
    times: Times,
    methods: Methods,
) -> None:
    """Write gallery.html, contact_sheet.png and the sheets of a grid, of all rows of the job, drawn now or earlier."""
    items: list[Item] = []
    failed = {row.number for row in bad}
    there = paths.names(out)
    lines = row_lines(rows, methods)
    pictures: dict[str, Picture] = {}
    for row in rows:
        record = manifest.record(row.file_name)
        if record is None or row.file_name not in there:  # not drawn, or not yet
            continue
        shown = {"seed": str(row.seed), "steps": f"{row.steps} {row.solver}", "guidance": f"{row.guidance_scale:g}"}
        if row.negative_prompt:
            shown["negative"] = row.negative_prompt
        if row.id is not None:
            shown["id"] = row.id
        if row.image is not None:
            shown["from"] = f"{Path(row.image).name}, strength {row.strength:g}"
        here = methods.of(row)
        inputs = [picture for method in here for picture in method.inputs(row, out)]
        inputs = [picture for picture in inputs if picture.file in there]
        for method in here:
            shown |= method.shown(row)
        label = "result" if inputs else ""
        picture = Picture(row.file_name, record["width"], record["height"], label)
        pictures[row.file_name] = picture
        if row.cell:
            shown["cell"] = told(row.cell)
        caption = row.prompt or next(filter(None, (method.caption(row) for method in here)), "")
        method = "+".join(method.name for method in here if not method.part_of_model) or "plain"
        items.append(Item(caption, [*inputs, picture], shown, method=method, rows=lines[row.number]))
    drawn = len(items)
    items += [Item("", error=str(row), rows=lines.get(row.number, "")) for row in bad]
    facts = {"model": model, "images": str(drawn)}
    if sheets := write_sheets(out, read_axes(methods.flags.set), rows, lambda row: pictures.get(row.file_name)):  # type: ignore[attr-defined]
        facts["sheets"] = ", ".join(sheets)
    if missing := sum(row.number not in failed for row in rows) - drawn:
        facts["not drawn yet"] = str(missing)
    if bad:
        facts["rows not drawn"] = str(len(bad))
    facts["date"] = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    if times.images:
        facts["speed"] = times.speed
        facts["compile"] = f"{times.compile:.1f} s"
    write_gallery(out, items, f"Drawn by {Path(model).name}", facts, command_of(methods))
    write_contact_sheet(out, items, f"{Path(model).name}: {drawn} images")


def summary(times: Times, clock: CompileClock, cached: bool) -> str:
    """Return the last line; its images/s are for drawing alone, without loading and compiling."""
    if not times.images:
        return f"0 images drawn in {times.whole:.1f} s"
    compiled = clock.programs - clock.hits
    hits = f" ({compiled} programs, {clock.hits} more from the cache)" if cached else ""
    return (
        f"{times.images} images in {times.whole:.1f} s: {times.speed}; compile {times.compile:.1f} s{hits}, "
        f"PNG {times.png:.2f} s in threads, the device waited {100 * times.waited:.1f} % of its time"
    )
