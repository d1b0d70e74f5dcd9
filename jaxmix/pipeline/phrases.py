"""Phrases of prompts: which tokens are theirs, and what they are encoded to alone.

SDXL's two text encoders may cut one prompt differently. The second one's tokenizer is padded with ``!``, so that every
typed ``!`` is a token of its own, where the first one's has ``!!``, ``?!``, ``!"`` and ``)!`` in one piece: all that
follows stands at other places. So places are found for each encoder by its own tokenizer, and a column of the context,
which holds the state of the first encoder's token and that of the second one's, may be of a phrase in either half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxmix.pipeline.parts import Parts
from jaxmix.pipeline.text import encode_prompts
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Phrase:
    """A phrase of one prompt: for each text encoder its first tokens, of every occurrence, and their number."""

    text: str
    starts: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]

    def tokens(self, encoder: int, occurrences: int | None = None) -> np.ndarray:
        """Return the places of its tokens in an encoder, those of the first few ``occurrences`` or of all."""
        starts = self.starts[encoder][:occurrences]
        return np.concatenate([np.arange(start, start + self.lengths[encoder]) for start in starts])


def find_phrase(parts: Parts, prompt: str, text: str, where: str) -> Phrase:
    """Return where a phrase stands in a prompt; raises `InputError`, which says ``where``, if it does not.

    It must be there for every encoder, within what the encoder reads.
    """
    starts, lengths = [], []
    for ids, phrase in zip(parts.ids_of(prompt), parts.ids_of(text), strict=True):
        ids, n = ids[: parts.text_length - 2], len(phrase)
        found = [i + 1 for i in range(len(ids) - n + 1) if n and ids[i : i + n] == phrase]  # token 0 is the start
        if not found:
            raise InputError(f"{where}: the phrase is not in the prompt {prompt!r}, expected it word for word")
        starts.append(tuple(found))
        lengths.append(n)
    return Phrase(text, tuple(starts), tuple(lengths))


class Piece(NamedTuple):
    """States (tokens, channels) of a phrase encoded alone, and where they go in the context of its image."""

    image: int
    tokens: np.ndarray
    channels: slice
    states: np.ndarray


def encoded_alone(parts: Parts, phrases: Sequence[tuple[int, Phrase]]) -> Iterator[Piece]:
    """Yield the states of (image, phrase) encoded alone, an encoder's half at a time, for its first occurrence."""
    texts = sorted({phrase.text for _, phrase in phrases})
    if not texts:
        return
    alone = dict(zip(texts, np.asarray(encode_prompts(parts, texts).context), strict=True))
    split = parts.text_encoder.config.hidden_size
    halves = (slice(0, split), slice(split, None))
    for image, phrase in phrases:
        for encoder, n in enumerate(phrase.lengths):
            channels = halves[encoder] if len(phrase.lengths) > 1 else slice(None)
            states = alone[phrase.text][1 : 1 + n, channels]
            yield Piece(image, phrase.tokens(encoder, 1), channels, states)
