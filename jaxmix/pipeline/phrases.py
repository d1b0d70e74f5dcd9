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

from jaxmix.pipeline.chunks import PLAIN, Reading
from jaxmix.pipeline.parts import Parts
from jaxmix.pipeline.prompt_syntax import words_of
from jaxmix.pipeline.text import encode_chunks
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Phrase:
    """A phrase of one prompt: for each text encoder the places of its tokens, of every occurrence, and their weights.

    Places count from the start of the first chunk; those of a phrase that is cut in two are not consecutive. A second
    encoder with a prompt of its own may not have the phrase. ``weights`` are those of the first occurrence.
    """

    text: str
    places: tuple[tuple[tuple[int, ...], ...], ...]
    weights: tuple[tuple[float, ...], ...]

    @property
    def starts(self) -> tuple[tuple[int, ...], ...]:
        """The place of the first token of every occurrence, for each encoder."""
        return tuple(tuple(place[0] for place in occurrences) for occurrences in self.places)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of its tokens, for each encoder."""
        return tuple(len(weights) for weights in self.weights)

    def tokens(self, encoder: int, occurrences: int | None = None) -> np.ndarray:
        """Return the places of its tokens in an encoder, those of the first few ``occurrences`` or of all."""
        return np.asarray([at for place in self.places[encoder][:occurrences] for at in place], int)


def find_phrase(
    parts: Parts, prompt: str, text: str, where: str, reading: Reading = PLAIN, prompt_2: str | None = None
) -> Phrase:
    """Return where a phrase stands in a prompt; raises `InputError`, which says ``where``, if it does not.

    Its words count, however they are weighted. It must be there for every encoder, within what the encoder reads; for
    a second one that reads another prompt it need not.
    """
    places, weights = [], []
    phrase = words_of(text, reading.syntax)
    for encoder, ids in enumerate(parts.ids_of(phrase)):
        n, other = len(ids), encoder > 0 and prompt_2 not in (None, prompt)
        (read,) = parts.chunks(encoder, [prompt_2 if other and prompt_2 is not None else prompt], reading)
        there, flat = read.places, read.ids.reshape(-1)
        own = flat[there].tolist()
        found = [there[i : i + n].tolist() for i in range(len(own) - n + 1) if n and own[i : i + n] == ids]
        if not found and not other:
            raise InputError(f"{where}: the phrase is not in the prompt {prompt!r}, expected it word for word")
        if n > parts.text_length - 2:
            raise InputError(f"{where}: found {n} tokens, expected at most {parts.text_length - 2}, those of a chunk")
        places.append(tuple(map(tuple, found)))
        weights.append(tuple(read.weights.reshape(-1)[found[0]].tolist()) if found else ())
    return Phrase(phrase, tuple(places), tuple(weights))


class Piece(NamedTuple):
    """States (tokens, channels) of a phrase encoded alone, and where they go in the context of its image."""

    image: int
    tokens: np.ndarray
    channels: slice
    states: np.ndarray


def encoded_alone(parts: Parts, phrases: Sequence[tuple[int, Phrase]], reading: Reading = PLAIN) -> Iterator[Piece]:
    """Yield the states of (image, phrase) encoded alone, an encoder's half at a time, for its first occurrence.

    A phrase alone is weighted as it is in its prompt.
    """
    distinct = sorted({(phrase.text, phrase.weights) for _, phrase in phrases})
    if not distinct:
        return
    texts = [text for text, _ in distinct]
    how = Reading("plain", 1, reading.clip_skip)
    read = []
    for encoder in range(len(parts.encoders)):
        found = []
        for chunks, (_, weights) in zip(parts.chunks(encoder, texts, how), distinct, strict=True):
            told = chunks.weights.copy()
            told[0, 1 : 1 + len(weights[encoder])] = weights[encoder]
            found.append(chunks._replace(weights=told))
        read.append(found)
    states = encode_chunks(parts, read, reading, np.ones(len(texts), int)).context
    alone = dict(zip(distinct, np.asarray(states), strict=True))
    split = parts.text_encoder.config.hidden_size
    halves = (slice(0, split), slice(split, None))
    for image, phrase in phrases:
        for encoder, n in enumerate(phrase.lengths):
            channels = halves[encoder] if len(phrase.lengths) > 1 else slice(None)
            if n:
                made = alone[phrase.text, phrase.weights][1 : 1 + n, channels]
                yield Piece(image, phrase.tokens(encoder, 1), channels, made)
