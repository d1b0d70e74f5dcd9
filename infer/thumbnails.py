"""Small copies of large pictures, for the gallery: `thumbs/NAME.webp` beside the PNGs, made once and kept."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from infer.png import write_whole
from jaxmix.command import progress

FOLDER = "thumbs"
SIDE = 416  # pixels of the longer side: twice the width at which pictures are shown, for dense screens
_OURS = re.compile(r"\d{4,}_seed\d+_[0-9a-f]{8}\w*\.webp")
_QUALITY = 80


def make_thumbnails(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Make the small copies that are missing of `files` in `folder`; return the name of each one's copy.

    A copy that is there is kept, unless its picture is newer; one whose picture is gone is removed. A picture that
    cannot be read has none. Interrupted, what has been made stays, and the next call goes on.
    """
    wanted = {file: Path(thumbnail_of(file)).name for file in dict.fromkeys(files)}
    place = folder / FOLDER
    there = {path.name: path for path in place.iterdir()} if place.is_dir() else {}
    if there:
        pictures = {Path(path.name).stem for path in folder.iterdir()}
        for name in [name for name in there if _OURS.fullmatch(name) and Path(name).stem not in pictures]:
            there.pop(name).unlink(missing_ok=True)  # of a picture that --overwrite has removed
    missing = [file for file, name in wanted.items() if name not in there or _older(there[name], folder / file)]
    made = {file for file in wanted if file not in missing}
    if missing:
        place.mkdir(parents=True, exist_ok=True)
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # Pillow and zlib let other threads run
        try:
            with progress(len(missing), "thumbnails", "pictures") as bar:
                for file, done in pool.map(lambda file: (file, _make(folder / file, place / wanted[file])), missing):
                    made |= {file} if done else set()
                    bar.update(1)
        finally:
            pool.shutdown(cancel_futures=True)
    return {file: thumbnail_of(file) for file in wanted if file in made}


def thumbnail_of(file: str) -> str:
    """Return where the small copy of a picture is, or would be."""
    return f"{FOLDER}/{Path(file).stem}.webp"


def _older(copy: Path, picture: Path) -> bool:
    """Return whether a copy is older than its picture; asked of local files alone, a bucket takes long to answer."""
    if type(copy) is not type(Path()):
        return False
    try:
        return copy.stat().st_mtime_ns < picture.stat().st_mtime_ns
    except OSError:
        return False


def _make(picture: Path, copy: Path) -> bool:
    """Write the small copy of a picture; return whether that could be read."""
    try:
        with picture.open("rb") as file, Image.open(file) as image:
            small = image.convert("RGB")
            small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # damaged since it was written
        return False
    content = io.BytesIO()
    small.save(content, format="WEBP", quality=_QUALITY, method=3)
    write_whole(copy, content.getvalue())
    return True
