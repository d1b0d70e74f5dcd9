"""How prompts say weights, as text alone: A1111's brackets, ComfyUI's, and compel's pluses and minuses.

`parse` knows no tokenizer. It returns sections, which begin chunks of their own (``BREAK``), of pieces of one weight.

- "plain": the prompt is its words.
- "a1111": ``(x)`` is 1.1, ``[x]`` 1 / 1.1, ``(x:1.3)`` 1.3; nested ones multiply; a bracket that is never closed counts
  to the end of the prompt, and one that was never opened is text; a backslash makes the bracket after it text. What is
  no number behind a colon is text. ``BREAK`` outside of brackets ends a chunk.
- "comfy": ``(x)`` is 1.1 times the weight around it, ``(x:1.3)`` is 1.3 whatever is around it; unclosed brackets are
  text.
- "compel": ``x+`` is 1.1, ``x--`` 0.9 x 0.9, ``(x y)1.3`` and ``"x y"1.3`` 1.3; nested ones multiply; ``(x)`` alone is
  x. What does not fit that grammar is text. Blends, conjunctions and swaps are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from jaxmix.types import InputError, shown

LARGEST = 1000.0
"""Of a weight: beyond it the states are noise, and half precision overflows."""
_DEEPEST = 100


class Piece(NamedTuple):
    """A part of a prompt, and what its states are weighted by."""

    text: str
    weight: float = 1.0


Sections = list[list[Piece]]


def parse(prompt: str, syntax: str = "plain") -> Sections:
    """Return the sections of a prompt; neighbours of one weight are one piece, and no section is empty.

    Raises `InputError`, which names the place, for an unknown syntax and weights that are no finite numbers.
    """
    return _PARSERS[check_syntax("syntax", syntax)](prompt)


def words_of(prompt: str, syntax: str = "plain") -> str:
    """Return a prompt without what its syntax adds."""
    return " ".join(piece.text for pieces in parse(prompt, syntax) for piece in pieces).strip()


def check_syntax(name: str, value: object) -> str:
    """Return ``value`` if it is a known syntax."""
    if not isinstance(value, str) or value not in _PARSERS:
        raise InputError(f"{name}: found {shown(value)}, expected one of {', '.join(SYNTAXES)}")
    return value


def _checked(weight: float, said: str, prompt: str, at: int) -> float:
    if not abs(weight) <= LARGEST:  # nan is not, either
        raise InputError(
            f"found the weight {shown(said)} at character {at + 1} of {shown(prompt)}, expected a number from "
            f"{-LARGEST:g} to {LARGEST:g}"
        )
    return weight


def _merged(pieces: list[Piece], between: str = "") -> list[Piece]:
    """Join neighbours of one weight."""
    made: list[Piece] = []
    for piece in pieces:
        if made and made[-1].weight == piece.weight:
            made[-1] = Piece(made[-1].text + between + piece.text, piece.weight)
        else:
            made.append(piece)
    return made or [Piece("")]


def _plain(prompt: str) -> Sections:
    return [[Piece(prompt)]]


# A1111 -------------------------------------------------------------------------------------------------------------

_WEIGHT_AND_CLOSE = re.compile(r":\s*([+-]?(?:[.\d]*\d[.\d]*|(?i:nan|inf|infinity)))\s*\)")
_RUN = re.compile(r"[^\\()\[\]:]+")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


def _a1111(prompt: str) -> Sections:
    sections: list[list[list]] = [[]]  # of [text, weight], whose weight may still change
    opened: dict[str, list[tuple[int, int]]] = {"(": [], "[": []}  # how many pieces the section had, and where
    at = 0

    def times(weight: float, since: tuple[int, int], said: str) -> None:
        for piece in sections[-1][since[0] :]:
            piece[1] = _checked(piece[1] * weight, said, prompt, since[1])

    while at < len(prompt):
        letter, start = prompt[at], at
        closing = _WEIGHT_AND_CLOSE.match(prompt, at) if letter == ":" and opened["("] else None
        if letter == "\\":
            escaped = prompt[at + 1 : at + 2]
            escaped = escaped if escaped and escaped in "()[]\\" else ""
            sections[-1].append([escaped, 1.0])
            at += 1 + len(escaped)
        elif letter in opened:
            opened[letter].append((len(sections[-1]), at))
            at += 1
        elif closing:
            weight = _number(closing[1], prompt, closing.start(1))
            times(weight, opened["("].pop(), closing[1])
            at = closing.end()
        elif letter == ")" and opened["("]:
            times(1.1, opened["("].pop(), "()")
            at += 1
        elif letter == "]" and opened["["]:
            times(1 / 1.1, opened["["].pop(), "[]")
            at += 1
        else:
            found = _RUN.match(prompt, at)
            at = found.end() if found else at + 1
            inside = opened["("] or opened["["]
            first, *rest = [prompt[start:at]] if inside else _BREAK.split(prompt[start:at])
            sections[-1].append([first, 1.0])
            sections += [[[text, 1.0]] for text in rest]
    for kind, weight in (("(", 1.1), ("[", 1 / 1.1)):
        for since in opened[kind]:
            times(weight, since, kind)
    return [_merged([Piece(text, weight) for text, weight in section if text]) for section in sections]


def _number(said: str, prompt: str, at: int) -> float:
    """Return the number that is said at a place of a prompt."""
    try:
        return _checked(float(said), said, prompt, at)
    except InputError:
        raise
    except ValueError:  # 1.2.3
        raise InputError(
            f"found the weight {shown(said)} at character {at + 1} of {shown(prompt)}, expected a number"
        ) from None


# ComfyUI -----------------------------------------------------------------------------------------------------------

_HIDDEN = {"\\)": "\ue001", "\\(": "\ue002"}  # private use: what no prompt holds


def _comfy(prompt: str) -> Sections:
    hidden = prompt
    for escaped, letter in _HIDDEN.items():
        hidden = hidden.replace(escaped, letter)
    pieces: list[Piece] = []
    waiting = [(hidden, 1.0, 0)]
    while waiting:
        text, weight, depth = waiting.pop()
        if depth > _DEEPEST:
            raise InputError(f"found brackets nested more than {_DEEPEST} deep in {shown(prompt)}, expected fewer")
        inner = []
        for item in _bracketed(text):
            if len(item) < 2 or item[0] != "(" or item[-1] != ")":
                inner.append((item, weight, -1))
                continue
            item, now = item[1:-1], weight * 1.1
            said = item.rpartition(":")
            if said[0]:
                try:
                    number = float(said[2])
                except ValueError:
                    pass
                else:
                    at = max(prompt.find(":" + said[2]), 0) + 1
                    item, now = said[0], _checked(number, said[2], prompt, at)
            inner.append((item, _checked(now, "()", prompt, 0), depth + 1))
        if len(inner) == 1 and inner[0][2] < 0:
            pieces.append(Piece(inner[0][0], weight))
        else:
            waiting += [(item, w, depth if d < 0 else d) for item, w, d in reversed(inner)]
    for escaped, letter in _HIDDEN.items():
        pieces = [piece._replace(text=piece.text.replace(letter, escaped[1])) for piece in pieces]
    return [_merged([piece for piece in pieces if piece.text])]


def _bracketed(text: str) -> list[str]:
    """Cut a text before and after each outermost pair of brackets; what is not closed is one item with the rest."""
    items, start, level = [], 0, 0
    for i, letter in enumerate(text):
        if letter == "(":
            if level == 0:
                items.append(text[start:i])
                start = i
            level += 1
        elif letter == ")":
            level -= 1
            if level == 0:
                items.append(text[start : i + 1])
                start = i + 1
    return [item for item in (*items, text[start:]) if item]


# compel ------------------------------------------------------------------------------------------------------------

_SYMBOLS = r"()\",.+\-="
_WORD = re.compile(rf"(?:\\[{_SYMBOLS}]|[-+](?![\s{_SYMBOLS}]|$)|[^\s{_SYMBOLS}])+")
_SIGNS = re.compile(r"\++|-+")
_BY = re.compile(r"\++|-+|\d+\.\d*|\.\d+|\d+")
_ATTEND = re.compile(r"\.attend\(\s*(\++|-+|-?(?:\d+\.\d*|\.\d+|\d+))\s*\)")
_QUOTED = re.compile(r'"((?:\\"|[^"])*)"')
_REFUSED = re.compile(r"(?<=[\w)\"])\.(?:swap|blend|and|add)\(|\b(?:with|use)Lora\(")
_ESCAPED = re.compile(r'\\([()"])')


def _compel(prompt: str) -> Sections:
    if found := _REFUSED.search(prompt):
        raise InputError(
            f"found {found[0].lstrip('.')}...) at character {found.start() + 1} of {shown(prompt)}, expected weights "
            "alone: word+, (some words)1.3"
        )
    text = re.sub(r",(\S)", r", \1", prompt)
    return [_merged([p for p in _Compel(text, prompt).whole() if p.text], " ")]


class _Compel:
    """A reading of one text from left to right; a bracket is tried once at each place."""

    def __init__(self, text: str, prompt: str, depth: int = 0) -> None:
        self.text, self.prompt, self.depth = text, prompt, depth
        self.tried: dict[int, tuple[list[Piece], int] | None] = {}

    def whole(self) -> list[Piece]:
        """Read everything; what is no syntax is words."""
        pieces: list[Piece] = []
        at = 0
        while at < len(self.text):
            if self.text[at].isspace():
                at += 1
            elif found := self.weighted(at) or self.group(at):
                pieces += found[0]
                at = found[1]
            else:
                word = re.compile(r"\S+").match(self.text, at)
                assert word is not None, "not a space"
                pieces.append(_fragment(word[0]))
                at = word.end()
        return pieces

    def within(self, at: int, end: str) -> tuple[list[Piece], int] | None:
        """Read up to the bracket that closes (or the end), None if something else comes before."""
        pieces: list[Piece] = []
        while True:
            while at < len(self.text) and self.text[at].isspace():
                at += 1
            if at >= len(self.text):
                return None if end else (pieces, at)
            if end and self.text[at] == end:
                return pieces, at + 1
            found = self.weighted(at) or self.group(at)
            if found is None and (word := _WORD.match(self.text, at)):
                found = [_fragment(word[0])], word.end()
            if found is None and self.text[at] in ",.":
                found = [Piece(self.text[at])], at + 1
            if found is None:
                return None
            pieces += found[0]
            at = found[1]

    def group(self, at: int) -> tuple[list[Piece], int] | None:
        """Read what is in brackets or quotes."""
        if self.text[at] not in '("':
            return None
        if at in self.tried:
            return self.tried[at]
        self.depth += 1
        if self.depth > _DEEPEST:
            raise InputError(f"found brackets nested more than {_DEEPEST} deep in {shown(self.prompt)}, expected fewer")
        found = None
        if self.text[at] == "(":
            found = self.within(at + 1, ")")
        elif quoted := _QUOTED.match(self.text, at):
            inside = _Compel(quoted[1].replace('\\"', '"'), self.prompt, self.depth).within(0, "")
            found = None if inside is None else (inside[0], quoted.end())
        self.depth -= 1
        self.tried[at] = found
        return found

    def weighted(self, at: int) -> tuple[list[Piece], int] | None:
        """Read a word, or what is in brackets or quotes, with the weight behind it."""
        group = self.group(at)
        word = None if group else _WORD.match(self.text, at)
        if group:
            pieces, end = group
        elif word:
            pieces, end = [_fragment(word[0])], word.end()
        else:
            return None
        said = _ATTEND.match(self.text, end)
        sign = said[1] if said else None
        if said is None and (by := (_BY if group else _SIGNS).match(self.text, end)):
            said, sign = by, by[0]
        if said is None or sign is None:
            return None
        signs = sign.strip("+-") == ""
        where = self.prompt, min(end, max(len(self.prompt) - 1, 0))
        try:
            weight = (1.1 if sign[0] == "+" else 0.9) ** len(sign) if signs else float(sign)
        except OverflowError:
            weight = float("inf")
        return [
            Piece(p.text, _checked(p.weight * _checked(weight, sign, *where), sign, *where)) for p in pieces
        ], said.end()


def _fragment(text: str) -> Piece:
    return Piece(_ESCAPED.sub(r"\1", text))


_PARSERS: dict[str, Callable[[str], Sections]] = {
    "plain": _plain,
    "a1111": _a1111,
    "compel": _compel,
    "comfy": _comfy,
}
SYNTAXES = tuple(_PARSERS)
