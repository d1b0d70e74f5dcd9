"""Write the gallery and the contact sheet of a folder anew, from its manifests and pictures: no model is loaded.

For a folder whose job was killed, or whose pictures were copied from several machines. Lines of a manifest that cannot
be read, and pictures that are gone, are named, one line each, on stderr and in the gallery; the rest is shown.

Examples: python -m infer.overview --folder gallery
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from infer.again import without_rows
from infer.flags import Config as Job
from infer.gallery import Item, Picture, write_contact_sheet, write_gallery
from infer.manifest import manifest_files
from infer.methods.registry import Methods
from infer.png import read_settings
from infer.rows import FIELDS
from jaxmix import paths
from jaxmix.command import run
from jaxmix.types import InputError

_OF_THE_PICTURE = ("file", "status", "row", "where", "latents", "bytes", "group_mark", "chunks", "model", "dtype")
_OF_THE_PICTURE += ("prompt", "method", "seed", "steps", "sampler", "spacing", "eta", "guidance_scale")
_OF_THE_PICTURE += ("height", "width", "seconds", "devices")
_WORDS = {"negative_prompt": "negative", "image": "from"}
_LONGEST = 120  # letters of a setting


@dataclasses.dataclass(frozen=True)
class Config:
    """Which folder.

    Attributes:
        folder: what a job wrote, its --out, here or in a bucket
    """

    folder: str = "gallery"


def lines_of(folder: Path) -> Iterator[tuple[str, dict[str, Any] | None, str]]:
    """Yield (where, record, fault) for each line of a folder's manifests; a damaged one has no record, but a fault."""
    for path in manifest_files(folder):
        with paths.opened(path) as file:
            lines = file.read().split(b"\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                record, fault = _read(line)
                yield f"{path.name}:{number}", record, fault


def _read(line: bytes) -> tuple[dict[str, Any] | None, str]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 text (byte {error.start})"
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError):
        return None, "not JSON that can be read: nested too deeply, or a number of thousands of digits"
    if not isinstance(record, dict) or record.get("status") not in ("ok", "error"):
        return None, 'found no "status", expected "ok" or "error"'
    if record["status"] == "error":
        good = isinstance(record.get("row"), int) and all(isinstance(record.get(k), str) for k in ("where", "error"))
        return (record, "") if good else (None, 'found no "row", "where" and "error" of a row that was not drawn')
    file = record.get("file")
    if not isinstance(file, str) or not file.endswith(".png") or Path(file).name != file or file.startswith("."):
        return None, 'found no "file", expected the name of a PNG beside it'
    if not all(type(record.get(key)) is int and 0 < record[key] < 1 << 20 for key in ("width", "height")):
        return None, 'found no "width" and "height", expected pixels'
    return record, ""


def main(config: Config) -> int:
    """Read what there is, write the gallery; return 2 if anything was damaged or gone, else 0."""
    folder = paths.place(config.folder)
    if not paths.remote(folder) and not folder.is_dir():
        raise InputError(f"--folder {config.folder}: no such folder")
    images: dict[str, dict[str, Any]] = {}
    errors: dict[tuple[int, str], str] = {}
    damaged: list[str] = []
    for where, record, fault in lines_of(folder):
        if record is None:
            damaged.append(f"{where}: {fault}")
        elif record["status"] == "ok":
            images[record["file"]] = record
        else:
            errors[record["row"], record["error"]] = f"{record['where']}: {record['error']}"
    names = paths.names(folder)
    for name in sorted(names - set(images)):
        if name.endswith(".png") and (settings := read_settings(folder / name)) is not None:
            with paths.opened(folder / name) as file, Image.open(file) as image:
                images[name] = {**settings, "file": name, "width": image.width, "height": image.height}
    damaged += [f"{name}: found it in a manifest, but no such picture" for name in sorted(set(images) - names)]
    kept = sorted((record for name, record in images.items() if name in names), key=_place)
    if not kept and not errors and not damaged:
        raise InputError(f"--folder {folder}: found no manifest and no picture of a job")
    drawn = {record.get("row") for record in kept}
    failed = [text for (row, _), text in errors.items() if row not in drawn]
    beside = _beside(names, {Path(record["file"]).stem for record in kept})
    known = {*FIELDS, *Methods(Job()).fields}
    items = [_item(record, folder, beside.get(Path(record["file"]).stem, []), known) for record in kept]
    items += [Item("", error=text) for text in (*damaged, *failed)]
    told = _job(folder)
    models = sorted({str(record["model"]) for record in kept if "model" in record})
    facts = {"model": ", ".join(models), "images": str(len(kept))}
    facts |= {"rows not drawn": str(len(failed))} if failed else {}
    facts |= {"damaged or gone": str(len(damaged))} if damaged else {}
    facts |= {"command": told["command"]} if told.get("command") else {}
    title = f"Drawn by {', '.join(Path(model).name for model in models) or 'nobody knows whom'}"
    page = write_gallery(folder, items, title, facts, _again(told.get("command", ""), models))
    write_contact_sheet(folder, items, f"{title}: {len(kept)} images")
    for line in damaged:
        print(f"damaged: {line}", file=sys.stderr)
    print(f"wrote {page} with {len(kept)} pictures" + (f"; {len(damaged)} damaged or gone" if damaged else ""))
    return 2 if damaged else 0


def _place(record: Mapping[str, Any]) -> tuple[int, str]:
    row = record.get("row")
    return row if type(row) is int else 1 << 62, record["file"]


def _beside(names: set[str], stems: set[str]) -> dict[str, list[str]]:
    """Return the pictures of inputs that lie beside each result: those whose name begins with its own."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        stem, _, kind = name.removesuffix(".png").rpartition("_")
        if name.endswith(".png") and kind and stem in stems:
            found.setdefault(stem, []).append(name)
    return found


def _item(record: dict[str, Any], folder: Path, inputs: list[str], known: set[str]) -> Item:
    pictures = []
    for name in inputs:
        try:
            with paths.opened(folder / name) as file, Image.open(file) as image:
                label = name.removesuffix(".png").rpartition("_")[2]
                pictures.append(Picture(name, image.width, image.height, label))
        except (OSError, SyntaxError, ValueError):  # damaged: the result is shown all the same
            continue
    pictures.append(Picture(record["file"], record["width"], record["height"], "result" if pictures else ""))
    solver = [record.get("sampler"), record.get("spacing"), f"eta {record['eta']}" if record.get("eta") else None]
    shown = {
        "seed": record.get("seed"),
        "steps": " ".join(str(x) for x in (record.get("steps"), ", ".join(filter(None, map(_text, solver)))) if x),
        "guidance": record.get("guidance_scale"),
        "method": record.get("method"),
    }
    shown |= {_WORDS.get(key, key): value for key, value in record.items() if key not in _OF_THE_PICTURE}
    settings = {key: _text(value) for key, value in shown.items() if value not in (None, "", [])}
    row = {key: value for key, value in record.items() if key in known and value is not None}
    if not row.get("prompt"):
        row.pop("prompt", None)
    # A picture that depends on others of its group is not drawn again by its row alone.
    rows = "" if record.get("group_mark") else json.dumps(row, ensure_ascii=False)
    return Item(str(record.get("prompt", "")), pictures, settings, method=str(record.get("method", "plain")), rows=rows)


def _text(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _job(folder: Path) -> dict[str, Any]:
    """Return what job.json holds, nothing if it is missing or damaged."""
    try:
        with paths.opened(folder / "job.json") as file:
            held = json.loads(file.read().decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return held if isinstance(held, dict) and isinstance(held.get("command", ""), str) else {}


def _again(command: str, models: list[str]) -> str:
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    if words:
        return without_rows(words, Job.aliases, Methods(Job()).fields)
    return f"python -m infer.generate --model {shlex.quote(models[0])}" if models else ""


if __name__ == "__main__":
    run(main)
