"""CLIP tokenizers: opened at the first prompt, padded and cut as Stable Diffusion does."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


def one_line(tokenizer: Any, what: str) -> contextlib.AbstractContextManager[None]:
    """Turn whatever a tokenizer raises into an `InputError` that names it."""
    return _one_line(f"{name_of(tokenizer)}: {what}")


def name_of(tokenizer: Any) -> str:
    """Return what messages call a tokenizer."""
    return getattr(tokenizer, "name_or_path", "") or "tokenizer"


class Known(NamedTuple):
    """A word with ids of its own: that of a learnt embedding, one id for each of its vectors."""

    token: str
    ids: tuple[int, ...]


def known_pieces(text: str, known: Sequence[Known], syntax: str = "plain") -> Iterator[str | Known]:
    """Yield a text cut at the words that are known, whatever their case; of two that fit the longer one is meant.

    ComfyUI's prompts say ``embedding:`` before them.
    """
    if not known:
        yield text
        return
    longest = sorted(known, key=lambda one: -len(one.token))
    before = "(?:embedding:)?" if syntax == "comfy" else ""
    found = re.compile("|".join(before + _as_word(one.token) for one in longest), re.IGNORECASE)
    by_name = {one.token.lower(): one for one in known}
    start = 0
    for match in found.finditer(text):
        if match.start() > start:
            yield text[start : match.start()]
        said = match[0].lower()
        yield by_name.get(said) or by_name[said.removeprefix("embedding:")]
        start = match.end()
    if start < len(text) or not text:
        yield text[start:]


def _as_word(token: str) -> str:
    """Return the pattern of a token that is no part of a longer word."""
    before = r"(?<!\w)" if re.match(r"\w", token) else ""
    after = r"(?!\w)" if re.search(r"\w$", token) else ""
    return before + re.escape(token) + after
