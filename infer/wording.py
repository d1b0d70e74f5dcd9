"""How the prompts of a job are read: their weights, their length in chunks, learnt embeddings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmix.pipeline.chunks import Reading
from jaxmix.pipeline.given import check_prompt
from jaxmix.pipeline.prompt_syntax import Piece, check_syntax, parse
from jaxmix.pipeline.text import check_skip, chunk_counts
from jaxmix.types import InputError, shown, whole
from jaxmix.weights.files import exists, user_path

__all__ = ["check_embeddings", "check_layers_skipped", "check_syntax", "chunks_of", "unused", "with_embeddings"]

MARKED = ("prompt_syntax", "clip_skip", "prompt_2", "negative_prompt_2", "chunks")
"""Settings of a row that are told only where its picture depends on them."""


def check_layers_skipped(key: str, value: Any) -> int:
    """Return `value` if it is a number of layers; how many there are is checked once the model is known."""
    return whole(key, value, 0)


def chunks_of(row: Any, pipe: Any, most: int | None, further: Sequence[str] = ()) -> int:
    """Return how many chunks of tokens the longest text of a row takes, `further` ones that methods add included.

    Raises InputError, which names the field, for weights that cannot be read, more layers to skip than there are, and
    a text of more than `most` chunks (None: any number).
    """
    check_skip(pipe, row.clip_skip)
    if pipe.text_encoder_2 is None:
        for key, text in (("prompt_2", row.prompt_2), ("negative_prompt_2", row.negative_prompt_2)):
            if text is not None:
                raise InputError(f"{key}: found {shown(text)}, but the model has one text encoder, expected none")
    first, *others = row.texts
    read: list[tuple[str, str, str | None]] = [("prompt", first, row.prompt_2)]
    read += [("negative_prompt", row.negative_prompt or "", row.negative_prompt_2)]
    read += [("prompt", text, None) for text in (*others, *further)]
    count = 1
    for key, text, second in read:
        for name, words in ((key, text), (f"{key}_2", second or "")):
            check_prompt(words, row.prompt_syntax, name)
        found = int(chunk_counts(pipe, [text], [second], Reading(row.prompt_syntax, None))[0])
        if most is not None and found > most:
            raise InputError(f"{key}: found {found} chunks of tokens, expected at most {most}, the flag --max-chunks")
        count = max(count, found)
    return count


def unused(row: Any) -> list[str]:
    """Return which of the settings `MARKED` the picture of a row does not depend on."""
    found = [key for key in ("prompt_2", "negative_prompt_2") if getattr(row, key) is None]
    found += ["clip_skip"] * (not row.clip_skip) + ["chunks"] * (row.chunks == 1)
    texts = [*row.texts, row.negative_prompt, row.prompt_2, row.negative_prompt_2]
    if row.chunks == 1 and all(_is_plain(text or "", row.prompt_syntax) for text in texts):
        found.append("prompt_syntax")
    return found


def _is_plain(text: str, syntax: str) -> bool:
    try:
        return parse(text, syntax) == [[Piece(text)]]
    except InputError:
        return False


def check_embeddings(key: str, value: Any) -> list[tuple[str, str | None]]:
    """Read "FILE[:TOKEN]", or a list of such texts, which may be JSON."""
    if isinstance(value, (list, tuple)):
        return [one for item in value for one in check_embeddings(key, item)]
    if not isinstance(value, str):
        raise InputError(f'{key}: found {shown(value)}, expected text such as "style.pt:<style>", or a list')
    text = value.strip()
    if text.startswith("[") and text.endswith("]"):
        try:
            return check_embeddings(key, json.loads(text))
        except (ValueError, RecursionError):
            pass  # a file with such a name
    path, colon, token = text.rpartition(":")
    if token.startswith("//") or exists(Path(text)) or not colon or not path:
        path, token = text, ""
    if not exists(user_path(path)):
        raise InputError(f"{key}: no such file: {path}")
    return [(path, token or None)]


def with_embeddings(pipe: Any, value: Any) -> Any:
    """Return the pipeline with the embeddings of the flag."""
    for path, token in check_embeddings("--embedding", value or []):
        pipe = pipe.with_embedding(path, token)
    return pipe
