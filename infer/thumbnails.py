"""Small copies of large pictures, for the gallery: `thumbs/NAME.webp` beside the PNGs, made once and kept."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from infer.png import write_whole
from jaxmix import paths
from jaxmix.command import progress
from jaxmix.types import InputError

FOLDER = "thumbs"
SIDE = 416  # pixels of the longer side: twice the width at which pictures are shown, for dense screens
_OURS = re.compile(r"\d{4,}_seed\d+_[0-9a-f]{8}\w*\.webp")
_QUALITY = 80


def make_thumbnails(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Make the small copies that are missing of `files` in `folder`; return where each one's copy is.

    A copy that is there is kept, unless its picture is newer; one whose picture is gone is removed. A picture that
    cannot be read has none. Interrupted, what has been made stays, and the next call goes on.
    """
    files = list(dict.fromkeys(files))
    made = there(folder, files)
    missing = [file for file in files if file not in made]
    if missing:
        begin(folder)
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # Pillow and zlib let other threads run
        try:
            with progress(len(missing), "thumbnails", "pictures") as bar:
                for file, done in pool.map(lambda file: (file, _make(folder, file)), missing):
                    made |= {file: thumbnail_of(file)} if done else {}
                    bar.update(1)
        finally:
            pool.shutdown(cancel_futures=True)
    return made


def there(folder: Path, files: Sequence[str]) -> dict[str, str]:
    """Return where the small copies are that `files` have and that are up to date; remove those of no picture."""
    place = folder / FOLDER
    held = paths.names(place) if paths.remote(place) or place.is_dir() else set()
    if not held:
        return {}
    pictures = {Path(name).stem for name in paths.names(folder)}
    for name in [name for name in held if _OURS.fullmatch(name) and Path(name).stem not in pictures]:
        held.remove(name)
        _remove(place / name)  # of a picture that --overwrite has removed
    kept = [file for file in files if Path(thumbnail_of(file)).name in held]
    return {file: thumbnail_of(file) for file in kept if not _older(folder / thumbnail_of(file), folder / file)}


def begin(folder: Path) -> None:
    """Make the folder of small copies; a bucket has none."""
    if not paths.remote(folder):
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)


def _remove(path: Path) -> None:
    if paths.remote(path):
        paths.remove(path)
    else:
        path.unlink(missing_ok=True)


def thumbnail_of(file: str) -> str:
    """Return where the small copy of a picture is, or would be."""
    return f"{FOLDER}/{Path(file).stem}.webp"


def _older(copy: Path, picture: Path) -> bool:
    """Return whether a copy is older than its picture; asked of local files alone, a bucket takes long to answer."""
    if paths.remote(copy):
        return False
    try:
        return copy.stat().st_mtime_ns < picture.stat().st_mtime_ns
    except OSError:
        return False


def _make(folder: Path, file: str) -> bool:
    """Write the small copy of a picture; return whether that could be read."""
    try:
        with paths.opened(folder / file) as held, Image.open(held) as image:
            write_thumbnail(folder, file, image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise  # a full disk, which is worth a word
        return False  # damaged since it was written
    return True


def write_thumbnail(folder: Path, file: str, image: Image.Image) -> None:
    """Write the small copy of a picture that is at hand; its folder must be there."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    content = io.BytesIO()
    small.save(content, format="WEBP", quality=_QUALITY, method=3)
    write_whole(folder / thumbnail_of(file), content.getvalue())


def write_beside(folder: Path, file: str, image: np.ndarray) -> None:
    """Write the small copy of a picture (H, W, 3) uint8 that has just been drawn, if it is large.

    What goes wrong here costs nothing: the end of the job makes what is missing.
    """
    if max(image.shape[:2]) > SIDE:
        with contextlib.suppress(OSError, InputError):
            begin(folder)
            write_thumbnail(folder, file, Image.fromarray(image))
