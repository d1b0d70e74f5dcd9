"""CLIP tokenizers: opened at the first prompt, padded and cut as Stable Diffusion does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmix.types import InputError


def open_tokenizer(tokenizer: Any) -> Any:
    """Return a tokenizer: the object itself, or the transformers CLIPTokenizer of a folder."""
    if not isinstance(tokenizer, (str, Path)):
        return tokenizer
    # Only its tokenizer is used: that it found no torch is no news to anybody.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import CLIPTokenizer

    if not any((Path(tokenizer) / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise InputError(f"{tokenizer}: found no vocab.json or tokenizer.json, expected a CLIP tokenizer")
    return CLIPTokenizer.from_pretrained(str(tokenizer))


def tokenize(tokenizer: Any, length: int, prompts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return token ids (b, length) int32, and for each prompt the words that did not fit ("" if all did)."""
    ids, cut = [], []
    for prompt in prompts:
        whole = tokenizer(prompt, verbose=False)["input_ids"]  # not verbose: the caller words the warning
        cut.append(tokenizer.decode(whole[length - 1 : -1]).strip() if len(whole) > length else "")
        ids.append(tokenizer(prompt, padding="max_length", max_length=length, truncation=True)["input_ids"])
    return np.asarray(ids, np.int32).reshape(-1, length), cut
