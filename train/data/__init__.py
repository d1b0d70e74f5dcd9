"""Captioned pictures for training: folders, WebDataset tars and caches of latents, in batches of one size."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.vision import ImageEncoder
from jaxmix.types import InputError

from .buckets import PictureConfig
from .cache import INDEX, LatentCache
from .folder import METADATA, ImageFolder
from .hints import Hint, hint_name, make_hint
from .joined import Joined, open_repeated, repeated_folders, with_regular, with_word
from .pictures import Pictures
from .rows import PICTURES, BadRow, PictureSource
from .webdataset import WebDataset

__all__ = [
    "BadRow",
    "Hint",
    "ImageFolder",
    "Joined",
    "LatentCache",
    "PictureConfig",
    "PictureSource",
    "Pictures",
    "Regular",
    "WebDataset",
    "check_sizes",
    "hint_name",
    "make_hint",
    "make_look",
    "open_batches",
    "open_source",
]


@dataclasses.dataclass(frozen=True)
class Regular:
    """Where regularisation pictures are ("" for none), and the caption of those without one."""

    folder: str = ""
    caption: str = ""


def open_source(
    path: str | epath.PathLike,
    labels: Sequence[str] | None = None,
    text_column: str = "text",
    image_column: str = "file_name",
    hint_column: str = "",
    trigger_word: str = "",
    regular: Regular | None = None,
) -> PictureSource | LatentCache:
    """Open captioned pictures of any kind: a folder of pictures, WebDataset tars, or a cache of latents.

    `labels` are the dimensions that labels may name; None does not read them. `hint_column` is that of a second
    picture, which a cache has or has not. A folder of folders `10_name` is read as by kohya's scripts, see
    `train.data.joined`. `trigger_word` is given to captions that do not have it, and `regular` pictures are added; a
    cache has both already. Raises InputError for anything else.
    """

    def opened(path: str | epath.PathLike) -> PictureSource | LatentCache:
        return _open_one(path, labels, text_column, image_column, hint_column)

    source = opened(path)
    if isinstance(source, LatentCache):
        given = {"trigger_word": trigger_word, "reg_data_dir": regular and regular.folder}
        if key := next((key for key, value in given.items() if value), None):
            raise InputError(f"{key}: found it with a cache, {path}, expected it for train.cache_latents instead")
        return source
    with_word(source, trigger_word)
    if regular is None or not regular.folder:
        return source
    second = opened(regular.folder)
    if isinstance(second, LatentCache):
        raise InputError(f"reg_data_dir: found a cache, {regular.folder}, expected pictures")
    return with_regular(source, second, regular.caption)


def _open_one(
    path: str | epath.PathLike, labels: Sequence[str] | None, text_column: str, image_column: str, hint_column: str
) -> PictureSource | LatentCache:
    name = str(path)
    kinds = f"pictures with a {METADATA}, tars, or a cache with an {INDEX}"
    if not name:
        raise InputError(f"train_data_dir: not given, expected a folder of {kinds}")
    if name.endswith(".tar") or any(sign in name for sign in "{*?["):
        return WebDataset(path, text_column, labels, hint_column)
    folder = epath.Path(path).expanduser()
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such folder"
        raise InputError(f"{name}: found {what}, expected a folder of {kinds}")
    if (folder / METADATA).exists():
        return ImageFolder(path, text_column, image_column, labels, hint_column)
    names = {entry.name for entry in folder.iterdir()}
    if INDEX in names or any(entry.endswith(".array_record") for entry in names):
        return LatentCache(name, labels)
    if any(entry.endswith(".tar") for entry in names):
        return WebDataset(path, text_column, labels, hint_column)
    if any(entry.lower().endswith(PICTURES) for entry in names) and not repeated_folders(folder):
        return ImageFolder(path, text_column, image_column, labels, hint_column)
    if repeated := repeated_folders(folder):

        def opened(path: str) -> PictureSource:
            return ImageFolder(path, text_column, image_column, labels, hint_column)

        left = sorted(names - set(repeated))
        if left:
            print(f"{name}: left out what is not in a folder named like 10_name: {_some(set(left))}", file=sys.stderr)
        return open_repeated(folder, repeated, opened)
    raise InputError(f"{name}: found {_some(names)}, expected {kinds}")


def open_batches(
    path: str | epath.PathLike,
    cfg: PictureConfig,
    pipe: Pipeline,
    labels: Sequence[str] | None = None,
    text_column: str = "text",
    image_column: str = "file_name",
    whole: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None,
    hint_column: str = "",
    hint: Hint | None = None,
    trigger_word: str = "",
    regular: Regular | None = None,
) -> Pictures | LatentCache:
    """Open captioned pictures for `make_dataset`: rows with "image", or with latents if `path` is a cache.

    ``whole`` adds entries to a row, made from its picture before it is cropped, and ``hint`` its hint, of the second
    picture in ``hint_column`` or of the row's own; a cache has its own. The last two are those of `open_source`. Raises
    InputError for a cache of another model or other sizes, and for sizes that the model cannot encode.
    """
    source = open_source(path, labels, text_column, image_column, hint_column, trigger_word, regular)
    if isinstance(source, LatentCache):
        source.check(pipe, cfg)
        return LatentCache(source.folder, labels, cfg.random_flip)
    check_sizes(cfg, pipe)
    return Pictures(source, cfg, whole, hint)


def make_look(encoder: ImageEncoder) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Return a picture uint8 (H, W, 3) -> {"pixels" (S, S, 3) float32}, as CLIP reads the whole of it."""
    return lambda image: {"pixels": encoder.pixels([image])[0]}


def check_sizes(cfg: PictureConfig, pipe: Pipeline) -> None:
    """Raise InputError for picture sizes that do not give whole latent cells."""
    factor = pipe.vae.config.factor
    key = "bucket_reso_steps" if cfg.enable_bucket else "resolution"
    if getattr(cfg, key) % factor:
        raise InputError(f"{key}: found {getattr(cfg, key)}, expected a multiple of {factor} for this autoencoder")


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return f"{', '.join(shown)}{', ...' if len(names) > 3 else ''}" if shown else "an empty folder"
