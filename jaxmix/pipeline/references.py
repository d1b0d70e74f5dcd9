"""Pictures that a method is given: one for all images, or one or several for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmix.types import AnyArray
from jaxmix.weights.files import user_path

MOST_KEPT = 256


@dataclasses.dataclass(frozen=True, eq=False)
class One:
    """A picture as an array, for all images."""

    picture: AnyArray


def per_image(given: Any, n: int) -> list[Any]:
    """Return what each image is shown."""
    if isinstance(given, (list, tuple)):
        return list(given)
    return [given] * n


def several(given: Any) -> Sequence[Any]:
    """Return the pictures of one image."""
    if isinstance(given, One):
        return [given.picture]
    return given if isinstance(given, (list, tuple)) else [given]


def remember(kept: dict[Any, Any], key: Any, value: Any) -> Any:
    """Keep what was made of pictures for the next batch, the oldest of too many left out; return it.

    CLIP's states of a picture are a megabyte or more, and a job may have any number of pictures.
    """
    while len(kept) >= MOST_KEPT:
        del kept[next(iter(kept))]
    kept[key] = value
    return value


def name_of(given: Any) -> Any:
    """Return what tells a picture from others, None if nothing does: a path, with the time it was changed."""
    if given is None:
        return ""
    if isinstance(given, (str, Path)):
        path = user_path(given)
        return (str(path), path.stat().st_mtime_ns) if path.exists() else None
    return None
