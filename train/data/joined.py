"""Several sources of pictures as one: kohya's folders `10_name` with their repeats, and regularisation pictures."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import BinaryIO

from etils import epath

from jaxmix.types import InputError
from train.data.rows import Entry, PictureSource

_REPEATED = re.compile(r"(\d+)_(.*)")


class Joined(PictureSource):
    """The rows of several sources, one after another, under the ids and with the entries given for each."""

    def __init__(self, where: str, parts: Sequence[tuple[PictureSource, Sequence[Entry]]]) -> None:
        known = parts[0][0].known
        super().__init__(where, known, [entry for _, entries in parts for entry in entries])
        self._places = [(source, i) for source, entries in parts for i in range(len(entries))]

    def open(self, index: int) -> BinaryIO:
        source, place = self._places[index]
        return source.open(place)


def repeated_folders(folder: epath.Path) -> dict[str, tuple[int, str]]:
    """Return {name: (repeats, words)} of the folders in a folder that are named like `10_sks dog`, in order.

    As kohya's scripts read them: the number is how often a pass shows each picture, the words are the caption of those
    without one. Raises `InputError` for a number of 0.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        named = _REPEATED.fullmatch(path.name)
        if named is None or not path.is_dir():
            continue
        if int(named[1]) < 1:
            raise InputError(f"{path}: found {named[1]} repeats in its name, expected 1 or more")
        found[path.name] = int(named[1]), named[2].strip()
    return found


def open_repeated(
    folder: epath.Path, found: dict[str, tuple[int, str]], opened: Callable[[str], PictureSource]
) -> Joined:
    """Return the pictures of the folders of `repeated_folders`, with their repeats; `opened(path)` opens one."""
    parts = []
    for name, (repeats, words) in found.items():
        source = opened(str(folder / name))
        entries = [
            dataclasses.replace(told(entry, words), id=f"{name}/{entry.id}", repeats=repeats)
            for entry in source.entries
        ]
        parts.append((source, entries))
    return Joined(str(folder), parts)


def with_regular(source: PictureSource, regular: PictureSource, caption: str = "") -> Joined:
    """Return the rows of a source and regularisation pictures, which a pass shows as often together as those.

    Like kohya's scripts: regularisation pictures begin with their own repeats, and get more in turn until they are as
    many; of more than that, the last are left out. ``caption`` is that of those without one.
    """
    wanted, total = sum(e.repeats for e in source.entries if not e.fault), 0
    usable = [i for i, e in enumerate(regular.entries) if not told(e, caption).fault]
    repeats = dict.fromkeys(range(len(regular.entries)), 1)
    if not usable:
        raise InputError(f"{regular.where}: found no usable row among {len(regular)}, expected pictures with captions")
    kept = set(range(len(regular.entries))) - set(usable)
    for i in usable:
        if total >= wanted:
            break
        repeats[i] = regular.entries[i].repeats
        total += repeats[i]
        kept.add(i)
    turn = 0
    while total < wanted:
        repeats[usable[turn % len(usable)]] += 1
        total, turn = total + 1, turn + 1
    if len(kept) < len(regular.entries):
        left = len(regular.entries) - len(kept)
        print(
            f"{regular.where}: {left} of {len(regular)} regularisation pictures are left out: a pass has {wanted} rows"
        )
    entries = [
        dataclasses.replace(told(e, caption), id=f"reg/{e.id}", repeats=repeats[i] if i in kept else 0, regular=True)
        for i, e in enumerate(regular.entries)
    ]
    return Joined(source.where, [(source, source.entries), (regular, entries)])


def told(entry: Entry, caption: str) -> Entry:
    """Return the entry with a caption if that is all it lacks."""
    return dataclasses.replace(entry, text=caption, fault="", untold=False) if entry.untold and caption else entry


def with_word(source: PictureSource, word: str) -> None:
    """Give a trigger word to the captions that do not have it, before them, and to rows without any."""
    if word:
        source.entries = [_worded(told(entry, word), word) for entry in source.entries]


def _worded(entry: Entry, word: str) -> Entry:
    if entry.regular or entry.fault or word.lower() in entry.text.lower():
        return entry
    return dataclasses.replace(entry, text=f"{word}, {entry.text}")
