"""What a scene shows before any pixel, and drawing what its caption says of places."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import layout
from .captions import MIRRORED, RELATIONS
from .photometric import DIMENSIONS

RELATED = 0.7  # of two objects whose places are said, the share that is said as a relation
IN_A_ROW = 0.5  # the same of three


@dataclass(frozen=True)
class Plan:
    """What a scene shows, before any pixel.

    `objects` are indices into the atlas, in the order of the caption; `relation` and `places` (one an object) are what
    the caption says of how and where they stand. `sizes` and `boxes`, one an object, are their longer sides and where
    they do stand in pixels; () leaves that to the painter, who keeps to the words.
    """

    style: str
    objects: tuple[int, ...]
    background: str
    relation: str = ""
    size_word: str = ""
    labels: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DIMENSIONS, 0))
    places: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    boxes: tuple[layout.Box, ...] = ()

    @property
    def neutral(self) -> Plan:
        """The same scene without aesthetic labels."""
        moved: dict[str, Any] = {"sizes": (), "boxes": ()} if self.labels["composition"] else {}
        return replace(self, labels=dict.fromkeys(DIMENSIONS, 0), **moved)


def worded(plan: Plan, said: bool, rng: np.random.Generator, *, related: bool = False) -> Plan:
    """Draw the words for size, places and relation of a plan that has none; `related` has a relation said in any case.

    One object of three kinds (no size word twice as often), at one of the five places; two in a relation or at opposite
    sides; three in a row or from side to side. Objects that are counted are at most said to be in a row.
    """
    count, how, axis, backwards = len(plan.objects), rng.random(), int(rng.integers(2)), bool(rng.integers(2))
    if count == 1:
        size_word = ("", "", "small", "big")[rng.integers(4)]
        place = layout.PLACES[rng.integers(len(layout.PLACES))]
        if plan.labels["composition"] < 0 or (said and size_word == "big" and place != "in the middle"):
            size_word = ""  # a big object has no room to stand aside
        told = said and not plan.labels["composition"]
        return replace(plan, size_word=size_word, places=(place,) if told else ())
    if len(set(plan.objects)) == 1:
        return replace(plan, relation="in a row" if count == 3 and how < IN_A_ROW else "")
    if not said:
        return plan
    if count == 2 and (related or how < RELATED):
        relation = RELATIONS[1 - axis]
        return replace(plan, relation=MIRRORED[relation] if backwards else relation)
    if count == 3 and how < IN_A_ROW:
        return replace(plan, relation="in a row")
    first, last = [side for side in layout.PLACES if layout.SIDES.get(side, (None,))[0] == axis][
        :: -1 if backwards else 1
    ]
    return replace(plan, places=(first, *("in the middle",) * (count - 2), last))
