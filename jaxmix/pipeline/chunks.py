"""Prompts to the chunks of tokens that a text encoder reads, with their weights; for one tokenizer at a time.

A chunk is the start token, ``length - 2`` tokens of the prompt and the end token, padded as the tokenizer pads. How a
long prompt is cut goes with its syntax: "plain" fills each chunk; "a1111" moves what follows the last comma, if that is
within the last 20 tokens, to the next one; "comfy" does not cut pieces of fewer than 8 tokens; "compel" cuts behind the
last full stop, else behind the last comma, colon or semicolon, else between words. A prompt of which one chunk alone is
read is cut at its end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmix.pipeline.prompt_syntax import check_syntax, parse
from jaxmix.pipeline.tokens import Known, known_pieces, name_of, one_line
from jaxmix.types import InputError, shown, whole

_BACKTRACK = 20
_SHORT = 8
_SENTENCE, _PHRASE = (".</w>",), (".</w>", ",</w>", ";</w>", ":</w>")


@dataclasses.dataclass(frozen=True)
class Reading:
    """How prompts are read.

    ``syntax`` is one of `jaxmix.pipeline.prompt_syntax.SYNTAXES`; ``max_chunks`` is how many chunks are read at most,
    None for all; ``clip_skip`` is how many of the text encoder's last layers are left out.
    """

    syntax: str = "plain"
    max_chunks: int | None = 1
    clip_skip: int = 0

    def checked(self) -> Reading:
        """Return the reading if it is one; raises `InputError`."""
        check_syntax("syntax", self.syntax)
        most = None if self.max_chunks is None else whole("max_chunks", self.max_chunks, 1)
        return Reading(self.syntax, most, whole("clip_skip", self.clip_skip, 0))


PLAIN = Reading()


class Lowered(NamedTuple):
    """A piece of a weight below 1, and where it stands, (chunks, length) bool."""

    weight: float
    place: np.ndarray


class Chunks(NamedTuple):
    """A prompt for one tokenizer: ids and weights (chunks, length), and the words that were ``cut`` off.

    ``lowered`` are the pieces that compel blends out; ``sizes`` is how many tokens of the prompt each chunk has.
    """

    ids: np.ndarray
    weights: np.ndarray
    lowered: tuple[Lowered, ...]
    cut: str
    sizes: tuple[int, ...]

    @property
    def places(self) -> np.ndarray:
        """Where the prompt's own tokens stand in all its chunks, one behind the other."""
        length = self.ids.shape[1]
        starts = [i * length + 1 for i in range(len(self.sizes))]
        return np.concatenate([np.arange(s, s + n) for s, n in zip(starts, self.sizes, strict=True)])

    def filled(self, count: int, empty: np.ndarray) -> Chunks:
        """Return ``count`` chunks, the further ones those of an empty prompt."""
        lack = count - len(self.ids)
        if not lack:
            return self
        pad = ((0, lack), (0, 0))
        return Chunks(
            np.concatenate([self.ids, np.repeat(empty[None], lack, 0)]),
            np.pad(self.weights, pad, constant_values=1.0),
            tuple(Lowered(w, np.pad(place, pad)) for w, place in self.lowered),
            self.cut,
            (*self.sizes, *[0] * lack),
        )


class _Token(NamedTuple):
    """A token of a prompt: the number of its piece, that of its words or learnt word, whether it is one, its weight."""

    id: int
    piece: int
    group: int
    learnt: bool
    weight: float


def empty_chunk(tokenizer: Any, length: int) -> np.ndarray:
    """Return the ids (length,) of a prompt without words: start, end, padding."""
    with one_line(tokenizer, "cannot tokenize ''"):
        ids = tokenizer("", padding="max_length", max_length=length, truncation=True)["input_ids"]
        return np.asarray(ids, np.int32).reshape(length)


def chunk(tokenizer: Any, length: int, prompt: str, reading: Reading = PLAIN, known: Sequence[Known] = ()) -> Chunks:
    """Return the chunks of a prompt. ``known`` are words with ids of their own, those of learnt embeddings.

    Raises `InputError`, which names the place, for weights that are none.
    """
    room, empty = length - 2, empty_chunk(tokenizer, length)
    sections = list(_tokens(tokenizer, prompt, reading.syntax, known))
    if reading.max_chunks == 1:
        cutter = _full
    else:
        cutter = {"a1111": _at_commas, "comfy": _in_groups, "compel": _at_sentences}.get(reading.syntax, _full)
    cuts = [part for tokens in sections for part in cutter(tokenizer, tokens, room)]
    if len(cuts) > 1 and not cuts[-1]:  # nothing behind the last BREAK
        cuts.pop()
    kept, lost = (cuts, []) if reading.max_chunks is None else (cuts[: reading.max_chunks], cuts[reading.max_chunks :])
    ids, weights = np.repeat(empty[None], len(kept), 0), np.ones((len(kept), length), np.float32)
    for i, tokens in enumerate(kept):
        n = len(tokens)
        ids[i, 1 : 1 + n] = [token.id for token in tokens]
        ids[i, 1 + n :] = [empty[1], *empty[2 : length - n]]
        weights[i, 1 : 1 + n] = [token.weight for token in tokens]
    cut = _said(tokenizer, [token.id for tokens in lost for token in tokens], known)
    lowered = _lowered(kept, length) if reading.syntax == "compel" else ()
    return Chunks(ids, weights, lowered, cut, tuple(map(len, kept)))


def tokenize(
    tokenizer: Any,
    length: int,
    prompts: Sequence[str],
    vocabulary: int | None = None,
    reading: Reading = PLAIN,
    known: Sequence[Known] = (),
) -> list[Chunks]:
    """Return the chunks of each prompt.

    Raises `InputError` for ids that a text encoder with a ``vocabulary`` of so many tokens does not have.
    """
    made = [chunk(tokenizer, length, prompt, reading, known) for prompt in prompts]
    largest = max((int(one.ids.max()) for one in made), default=0)
    least = min((int(one.ids.min()) for one in made), default=0)
    if vocabulary is not None and not 0 <= least <= largest < vocabulary + sum(len(one.ids) for one in known):
        raise InputError(
            f"{name_of(tokenizer)}: gives the token id {largest}, but the text encoder has {vocabulary} tokens, "
            "expected the tokenizer of this model"
        )
    return made


def piece_ids(tokenizer: Any, text: str, known: Sequence[Known] = (), syntax: str = "plain") -> list[int]:
    """Return the ids of a text, without start and end, however many they are."""
    return [i for ids, _ in _pieces(tokenizer, text, known, syntax) for i in ids]


def _pieces(tokenizer: Any, text: str, known: Sequence[Known], syntax: str) -> Iterator[tuple[list[int], bool]]:
    """Yield the ids of a text: those of words between learnt ones, and those of each learnt one, with whether it is."""
    for part in known_pieces(text, known, syntax):
        if isinstance(part, Known):
            yield list(part.ids), True
        else:
            with one_line(tokenizer, f"cannot tokenize {shown(text)}"):
                yield list(tokenizer(part, verbose=False)["input_ids"][1:-1]), False


def _tokens(tokenizer: Any, prompt: str, syntax: str, known: Sequence[Known]) -> Iterator[list[_Token]]:
    """Yield the tokens of each section of a prompt."""
    number = group = 0
    for pieces in parse(prompt, syntax):
        found = []
        for piece in pieces:
            for ids, learnt in _pieces(tokenizer, piece.text, known, syntax):
                found += [_Token(i, number, group, learnt, piece.weight) for i in ids]
                group += 1
            number += 1
        yield found


def _full(tokenizer: Any, tokens: Sequence[_Token], room: int) -> list[list[_Token]]:
    return [list(tokens[i : i + room]) for i in range(0, max(len(tokens), 1), room)]


def _at_commas(tokenizer: Any, tokens: Sequence[_Token], room: int) -> list[list[_Token]]:
    comma = piece_ids(tokenizer, ",")
    made: list[list[_Token]] = [[]]
    last = -1
    for i, token in enumerate(tokens):
        if [token.id] == comma:
            last = len(made[-1])
        elif len(made[-1]) == room and last != -1 and room - last <= _BACKTRACK:
            moved = made[-1][last + 1 :]
            del made[-1][last + 1 :]
            made.append(moved)
            last = -1
        size = 1
        if i == 0 or tokens[i - 1].group != token.group:  # the vectors of an embedding stay together
            size = sum(1 for _ in _same_group(tokens, i)) if token.learnt else 1
        if len(made[-1]) + min(size, room) > room:
            made.append([])
            last = -1
        made[-1].append(token)
    return made


def _same_group(tokens: Sequence[_Token], start: int) -> Iterator[_Token]:
    for token in tokens[start:]:
        if token.group != tokens[start].group:
            return
        yield token


def _in_groups(tokenizer: Any, tokens: Sequence[_Token], room: int) -> list[list[_Token]]:
    made: list[list[_Token]] = [[]]
    at = 0
    while at < len(tokens):
        group = list(_same_group(tokens, at))
        if len(group) >= _SHORT:
            left = group
            while left:
                fits = room - len(made[-1])
                made[-1] += left[:fits]
                left = left[fits:]
                if left:
                    made.append([])
        else:
            if len(made[-1]) + len(group) > room:
                made.append([])
            made[-1] += group
        at += len(group)
    return made


def _at_sentences(tokenizer: Any, tokens: Sequence[_Token], room: int) -> list[list[_Token]]:
    made: list[list[_Token]] = []
    left = list(tokens)
    while len(left) > room:
        said = ["" if token.learnt else tokenizer.convert_ids_to_tokens(token.id) for token in left[:room]]

        def last(ends: tuple[str, ...], said: list[str] = said) -> int:
            return max((i + 1 for i, text in enumerate(said) if text in ends), default=0)

        words = max((i + 1 for i, text in enumerate(said) if text.endswith("</w>")), default=0)
        at = last(_SENTENCE) or last(_PHRASE) or words or room
        made.append(left[:at])
        left = left[at:]
    return [*made, left]


def _lowered(chunks: Sequence[Sequence[_Token]], length: int) -> tuple[Lowered, ...]:
    """Return the pieces of a weight below 1; what pads the chunks between belongs to a piece that goes on."""
    places: dict[int, list[int]] = {}
    weights: dict[int, float] = {}
    for i, tokens in enumerate(chunks):
        for j, token in enumerate(tokens):
            if token.weight < 1:
                places.setdefault(token.piece, []).append(i * length + 1 + j)
                weights[token.piece] = token.weight
    found = []
    for piece, at in places.items():
        place = np.zeros(len(chunks) * length, bool)
        place[at[0] : at[-1] + 1] = True
        place = place.reshape(-1, length)
        place[:, [0, -1]] = False
        found.append(Lowered(weights[piece], place))
    return tuple(found)


def _said(tokenizer: Any, ids: Sequence[int], known: Sequence[Known]) -> str:
    """Return the words of some tokens."""
    if not ids:
        return ""
    of = {i: one.token if k == 0 else "" for one in known for k, i in enumerate(one.ids)}
    parts: list[str] = []
    run: list[int] = []
    for i in [*ids, -1]:
        if i >= 0 and i not in of:
            run.append(i)
            continue
        if run:
            with one_line(tokenizer, "cannot say what was cut off"):
                parts.append(tokenizer.decode(run).strip())
            run = []
        if i >= 0 and of[i]:
            parts.append(of[i])
    return " ".join(parts)
