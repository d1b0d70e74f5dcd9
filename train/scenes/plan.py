"""What a scene shows before any pixel is painted, and drawing what its caption says about places."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import layout
from .captions import MIRRORED, RELATIONS
from .photometric import DIMENSIONS

RELATED = 0.7  # the share of relations among captions that say where two objects are
IN_A_ROW = 0.5  # the same for three objects


@dataclass(frozen=True)
class Plan:
    """What a scene shows, before any pixel is painted.

    `objects` are indices into the atlas, in the order of the caption; `relation` and `places` (one per object) are what
    the caption says about where they are. `sizes` and `boxes`, one per object, are their longer sides and their actual
    places in pixels; () leaves that to the painter, who follows the words.
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
    """Draw the words for size, places and relation of a plan without any; with `related` always name a relation.

    One object gets one of three size words (none twice as often) and one of the five places; two get a relation or
    opposite sides; three a row or places from side to side. Counted objects are at most said to be in a row.
    """
    count, how, axis, backwards = len(plan.objects), rng.random(), int(rng.integers(2)), bool(rng.integers(2))
    if count == 1:
        size_word = ("", "", "small", "big")[rng.integers(4)]
        place = layout.PLACES[rng.integers(len(layout.PLACES))]
        if plan.labels["composition"] < 0 or (said and size_word == "big" and place != "in the middle"):
            size_word = ""  # a big object has no room at the side
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
