"""CLIP tokenizers: opened at the first prompt, padded and cut as Stable Diffusion does."""

from __future__ import annotations

import codecs
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmix.types import InputError, shown
from jaxmix.weights.files import read_json, refuse_stand_in

_VOCABULARIES = ("vocab.json", "tokenizer.json")
_PROBE = "a photo of a cat"


def open_tokenizer(tokenizer: Any) -> Any:
    """Return a tokenizer: the object itself, or the transformers CLIPTokenizer of a folder.

    Raises InputError naming the folder, and the file if it is one that is damaged, for one that does not tokenize.
    """
    if not isinstance(tokenizer, (str, Path)):
        return tokenizer
    folder = Path(tokenizer)
    # Only its tokenizer is used: that it found no torch is no news to anybody.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import CLIPTokenizer

    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise InputError(f"{tokenizer}: found no vocab.json or tokenizer.json, expected a CLIP tokenizer")
    marked = False
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json" and path.is_file():
            found = read_json(path)
            if not isinstance(found, dict):
                raise InputError(f"{path}: found a JSON {type(found).__name__}, expected an object")
        if path.suffix in (".json", ".txt") and path.is_file():
            with path.open("rb") as file:
                head = file.read(200)
            refuse_stand_in(path, head)
            marked = marked or head.startswith(codecs.BOM_UTF8)
    with _one_line(f"{tokenizer}: cannot be opened as a CLIP tokenizer"):
        if not marked:
            made = CLIPTokenizer.from_pretrained(str(folder))
        else:
            with tempfile.TemporaryDirectory() as copy:
                made = CLIPTokenizer.from_pretrained(_without_marks(folder, Path(copy)))
        ids = made(_PROBE, padding="max_length", max_length=16, truncation=True)["input_ids"]
        fits = len(ids) == 16 and all(isinstance(i, int) and i >= 0 for i in ids) and isinstance(made.decode(ids), str)
    if not fits:
        raise InputError(f"{tokenizer}: gives {shown(ids)} for {_PROBE!r}, expected 16 token ids of a CLIP tokenizer")
    return made


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn whatever a tokenizer raises into an InputError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, InputError):
        raise
    except BaseException as error:  # of all kinds; panics of Rust code are no Exceptions
        raise InputError(f"{what} ({type(error).__name__}: {shown(str(error), 200)[1:-1]})") from None


def _without_marks(folder: Path, copy: Path) -> str:
    """Copy a tokenizer's files without byte order marks, which transformers does not take."""
    for path in folder.iterdir():
        if path.is_file():
            shutil.copyfile(path, copy / path.name)
            content = (copy / path.name).read_bytes()
            (copy / path.name).write_bytes(content.removeprefix(codecs.BOM_UTF8))
    return str(copy)


def tokenize(
    tokenizer: Any, length: int, prompts: Sequence[str], vocabulary: int | None = None
) -> tuple[np.ndarray, list[str]]:
    """Return token ids (b, length) int32, and for each prompt the words that did not fit ("" if all did).

    Raises InputError for ids that a text encoder with a `vocabulary` of so many tokens does not have.
    """
    ids, cut = [], []
    where = getattr(tokenizer, "name_or_path", "") or "tokenizer"
    for prompt in prompts:
        with _one_line(f"{where}: cannot tokenize {shown(prompt)}"):
            whole = tokenizer(prompt, verbose=False)["input_ids"]  # not verbose: the caller words the warning
            cut.append(tokenizer.decode(whole[length - 1 : -1]).strip() if len(whole) > length else "")
            padded = tokenizer(prompt, padding="max_length", max_length=length, truncation=True)["input_ids"]
            ids.append(np.asarray(padded, np.int64).reshape(length))
    made = np.asarray(ids, np.int64).reshape(-1, length)
    if vocabulary is not None and made.size and not 0 <= made.min() <= made.max() < vocabulary:
        raise InputError(
            f"{where}: gives the token id {made.max()}, but the text encoder has {vocabulary} tokens, expected the "
            "tokenizer of this model"
        )
    return made.astype(np.int32), cut
