"""What is asked of every file before its own format: where it is, whether it is one, and JSON as people write it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from jaxmix.clients import url_of
from jaxmix.paths import local
from jaxmix.types import InputError

ASSETS = Path(__file__).parents[1] / "assets"
"""What comes with the package: the embedded models, and a tokenizer for single files."""

STEMS = ("diffusion_pytorch_model", "model")
FLAX_FILES = ("diffusion_flax_model.msgpack", "flax_model.msgpack")
WEIGHTS = f"{' or '.join(STEMS)}[.VARIANT].safetensors, its .index.json, {' or '.join(FLAX_FILES)}"
"""The files in which a model's folder may hold its weights, for error messages."""

_WHOLE = re.compile(rf"({'|'.join(STEMS)})(?:\.([\w-]+))?\.safetensors", re.IGNORECASE)
_INDEX = re.compile(rf"({'|'.join(STEMS)})\.safetensors\.index(?:\.([\w-]+))?\.json", re.IGNORECASE)
_SMALL = (".json", ".txt", ".model")  # of a model's folder: configs and tokenizers
_SHARD = re.compile(r"-\d+-of-\d+")
_VARIANTS = ("", "fp16", "bf16", "ema")  # in this order; then all others; non_ema, meant for training on, last


def preferred(names: Iterable[str]) -> str | None:
    """Return the file with the weights among those of a model's folder, None if there is none.

    safetensors without a variant come first, whole before sharded, then the variants fp16, bf16, ema and any other,
    then Flax.
    """

    def rank(name: str) -> tuple[int, int, int, str] | None:
        for kind, pattern in enumerate((_WHOLE, _INDEX)):
            if (found := pattern.fullmatch(name)) and not _SHARD.search(name):
                variant = (found[2] or "").lower()
                place = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS) + (variant == "non_ema")
                return place, kind, STEMS.index(found[1].lower()), name
        return (len(_VARIANTS) + 2, 0, FLAX_FILES.index(name), name) if name in FLAX_FILES else None

    ranks = [found for name in names if (found := rank(name)) is not None]
    return min(ranks)[-1] if ranks else None


def user_path(name: str | os.PathLike[str]) -> Path:
    """Return the path that a user names: as it stands if there is such a file, else with "~" for a home.

    What lies in a bucket is fetched, of a model's folder what is read of it, and its path here is returned. Raises
    InputError for a name that no file can have, and for what cannot be fetched.
    """
    if url_of(name) is not None:
        return local(name, read_of)
    return path_here(name)


def path_here(name: str | os.PathLike[str]) -> Path:
    """Return the path on this machine that a user names; raises InputError for one in a bucket."""
    if url_of(name) is not None:
        raise InputError(f"{name}: found the address of a bucket, expected a path here, from which to copy it there")
    path = Path(name)
    try:
        return path if not str(name).startswith("~") or path.exists() else path.expanduser()
    except (RuntimeError, ValueError) as error:  # an unknown user; a zero byte
        raise InputError(f"{str(name)!r}: not a path: {error}") from None


def read_of(files: Sequence[str], read: Callable[[str], bytes]) -> list[str]:
    """Return which files of a folder in a bucket are read: of weights in several forms one, by `preferred`, no pickles.

    Of a folder without such weights all safetensors are.
    """
    wanted = [name for name in files if PurePosixPath(name).suffix.lower() in _SMALL]
    for folder in dict.fromkeys(PurePosixPath(name).parent for name in files):
        inside = [PurePosixPath(name).name for name in files if PurePosixPath(name).parent == folder]
        found = preferred(inside)
        if found is None:
            names = [name for name in inside if name.lower().endswith(".safetensors")]
        else:
            names = [found]
            if found.endswith(".json"):
                try:
                    held = json.loads(read(str(folder / found)))["weight_map"].values()
                    names += [name for name in inside if name in set(held)]
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    pass  # what is wrong with it is said when it is opened
        wanted += [str(folder / name) for name in names]
    return sorted(set(wanted))


def exists(path: Path) -> bool:
    """Return whether there is a file or folder; what no file can be called is not there."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def refuse_stand_in(path: Path, head: bytes) -> None:
    """Raise InputError if a file, by its first bytes, is what git-lfs or a failed download leaves in its place."""
    start = head[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: an LFS pointer, not the file itself, expected its contents: run `git lfs pull`")
    if start.startswith((b"<!doctype html", b"<html")):
        raise InputError(f"{path}: a web page, not the file itself, expected its contents: download it again")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file, with or without a byte order mark. Raises InputError naming the file for anything else."""
    path = Path(path)
    try:
        content = path.read_bytes()
        refuse_stand_in(path, content)
        return json.loads(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a UTF-8 text file") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON: {error.msg} at line {error.lineno}") from None
    except RecursionError:
        raise InputError(f"{path}: not JSON that can be read: nested too deeply") from None
    except InputError:
        raise
    except ValueError as error:  # a number of more than 4300 digits
        raise InputError(f"{path}: not JSON that can be read: {error}") from None
