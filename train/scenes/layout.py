"""Where objects are: words for places and relations, what they mean in pixels, and drawing boxes that fit them.

A place is read from the centre of an object's bounding box: near the picture's centre, or toward the side to which it
is furthest off. The relation of two objects is read from their centres as well: every pair has exactly one of the
relations "left of" and "above" in one order, along the axis on which they are further apart. Boxes never overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

PLACES: tuple[str, ...] = ("at the left", "at the right", "at the top", "at the bottom", "in the middle")
SIDES: dict[str, tuple[int, int]] = dict(zip(PLACES, ((1, -1), (1, 1), (0, -1), (0, 1)), strict=False))
"""The axis (0 down, 1 right) and the direction on it of each side."""

UNIT = 32  # sizes are multiples of 1 / UNIT, so that scaled sprites can be cached and shared between kinds of scenes
# Longer side of an object, smallest and largest, by the size word of a single one; in these units.
ONE = {"small": (13, 16), "": (15, 21), "big": (22, 24)}
ASIDE = (14, 19)  # of one that is said to be at a side
TOWARD_A_SIDE = (13, 17)  # of one whose composition is off-centre
TWO, TWO_TOGETHER = (10, 18), 28  # an outline adds up to a twelfth, and a gap must remain between them
THREE = (8, 12)
ROW_OF_THREE = (8, 10)

NEAR = 0.095  # an object whose centre is off the picture's by less than this on both axes is in the middle,
SAID_NEAR = 0.06  # and by no more than this if the caption says so;
SAID_FAR = 0.13  # it is off by no less than this if the caption names a side,
SAID_ASPECT = 0.6  # and then on the other axis by no more than this share of it
ANY_ASPECT = 0.85  # the same for two objects whose relation is not named

TRIES = 50  # arrangements drawn for places that a caption names for several objects, before sizes are redrawn

Box = tuple[int, int, int, int]
"""Top, left, bottom, right of an object in pixels."""

Extent = tuple[int, int]
"""Height and width of an object in pixels."""

Fact = tuple[int, int, str]
"""The indices of two objects in a list, and the relation of the first to the second: "left of" or "above"."""


def place_of(down: float, right: float) -> str:
    """Name the place of an object whose centre is off the picture's by these shares of its width."""
    if max(abs(down), abs(right)) < NEAR:
        return "in the middle"
    if abs(right) >= abs(down):
        return "at the left" if right < 0 else "at the right"
    return "at the top" if down < 0 else "at the bottom"


def fits(place: str, down: float, right: float) -> bool:
    """Return whether an object with these offsets is at a place so clearly that a caption may say so."""
    if place == "in the middle":
        return max(abs(down), abs(right)) <= SAID_NEAR
    axis, direction = SIDES[place]
    along, across = ((down, right), (right, down))[axis]
    return direction * along >= SAID_FAR and abs(across) <= SAID_ASPECT * abs(along)


def relation_of(down: float, right: float) -> tuple[str, bool]:
    """Name the relation of an object to another that is this much further down and right, and whether it comes first.

    ("left of", True): it is left of the other; ("left of", False): the other is left of it.
    """
    if abs(right) >= abs(down):
        return "left of", right >= 0
    return "above", down >= 0


def middle_of(box: Box) -> tuple[float, float]:
    """Return the middle (down, right) of a box."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def fit_all(places: Sequence[str], boxes: Sequence[Box], size: int) -> bool:
    """Return whether every box is clearly at its place in a picture of `size` pixels."""
    middles = (middle_of(box) for box in boxes)
    return all(fits(p, y / size - 0.5, x / size - 0.5) for p, (y, x) in zip(places, middles, strict=True))


def facts(boxes: Sequence[Box]) -> list[Fact]:
    """Name the relation of every two boxes."""
    middles = [middle_of(box) for box in boxes]
    found = []
    for a, b in combinations(range(len(boxes)), 2):
        relation, first = relation_of(middles[b][0] - middles[a][0], middles[b][1] - middles[a][1])
        found.append((a, b, relation) if first else (b, a, relation))
    return found


def told(relation: str, places: Sequence[str], count: int) -> list[Fact]:
    """Name the relation of every two of `count` objects as far as the words of their caption tell it."""
    if count < 2 or not (relation or places):
        return []
    axis, backwards = _direction(relation, places)
    word = ("above", "left of")[axis]
    return [(b, a, word) if backwards else (a, b, word) for a, b in combinations(range(count), 2)]


def draw_sizes(count: int, bounds: tuple[int, int], rng: np.random.Generator) -> list[int]:
    """Draw the longer sides of objects in units, from low to high; two of them fit beside each other."""
    low, high = bounds
    if count == 2:
        first = int(rng.integers(low, high + 1))
        second = int(rng.integers(low, min(high, TWO_TOGETHER - first) + 1))
        return [first, second] if rng.random() < 0.5 else [second, first]
    return [int(n) for n in rng.integers(low, high + 1, count)]


def one(extent: Extent, size: int, rng: np.random.Generator) -> list[Box]:
    """Put one object anywhere."""
    return [_box(extent, rng.random() * (size - extent[0]), rng.random() * (size - extent[1]))]


def one_at(place: str, extent: Extent, size: int, rng: np.random.Generator) -> list[Box]:
    """Put one object at a place, clearly."""
    shift = [0.0, 0.0]
    room = [(size - side) / 2 for side in extent]
    if place == "in the middle":
        shift = [(2 * rng.random() - 1) * min(SAID_NEAR * size - 1, r) for r in room]
    else:
        axis, direction = SIDES[place]
        far = SAID_FAR * size + 1
        along = min(far + rng.random() * max(room[axis] - far, 0), room[axis])
        shift[axis] = direction * along
        shift[1 - axis] = (2 * rng.random() - 1) * min(SAID_ASPECT * along, room[1 - axis])
    return [_box(extent, room[0] + shift[0], room[1] + shift[1])]


def composed(composition: int, extent: Extent, size: int, rng: np.random.Generator) -> list[Box]:
    """Put one object in the exact centre (+1), or toward a side or corner, nearly all the way (-1)."""
    room, shift = [(size - side) / 2 for side in extent], [0.0, 0.0]
    if composition < 0:
        share = 0.8 + 0.2 * rng.random()
        shift = [(-share, share)[int(b)] * r for b, r in zip(rng.integers(2, size=2), room, strict=True)]
        # The axis with more room is always used.
        shift[int(room[0] > room[1])] *= float(rng.integers(2))
    return [_box(extent, room[0] + shift[0], room[1] + shift[1])]


def two(extents: Sequence[Extent], size: int, axis: int, aspect: float, rng: np.random.Generator) -> list[Box]:
    """Put two objects one after the other along an axis (0 down, 1 right), near or apart, near a common line.

    Their centres are apart on the other axis by at most `aspect` times their distance on this one.
    """
    along = _in_turn([e[axis] for e in extents], size, rng)
    across = 1 - axis
    middles = [start + e[axis] / 2 for start, e in zip(along, extents, strict=True)]
    reach = aspect * (middles[1] - middles[0]) - 1  # a pixel for what rounding may add
    halves = [e[across] / 2 for e in extents]
    first = halves[0] + rng.random() * (size - 2 * halves[0])
    low, high = max(halves[1], first - reach), min(size - halves[1], first + reach)
    # The first may be where the second cannot come near enough: it is then moved inwards.
    second = min(max(low + rng.random() * max(high - low, 0.0), halves[1]), size - halves[1])
    first = min(max(first, second - reach), second + reach)
    return [_placed(e, axis, a, m - h) for e, a, m, h in zip(extents, along, (first, second), halves, strict=True)]


def row(extents: Sequence[Extent], size: int, axis: int, rng: np.random.Generator) -> list[Box]:
    """Put objects in a row along an axis, near a common line at any position."""
    along = _in_turn([e[axis] for e in extents], size, rng)
    across = 1 - axis
    most = max(e[across] for e in extents)
    line = most / 2 + rng.random() * (size - most)
    jitter = (2 * rng.random(len(extents)) - 1) * 0.04 * size
    starts = [min(max(line + j - e[across] / 2, 0), size - e[across]) for j, e in zip(jitter, extents, strict=True)]
    return [_placed(e, axis, a, s) for e, a, s in zip(extents, along, starts, strict=True)]


def spread(extents: Sequence[Extent], size: int, axis: int, rng: np.random.Generator) -> list[Box]:
    """Put three objects anywhere: one on one side of a line, two on the other side, beside each other."""
    across = 1 - axis
    alone = int(rng.integers(3))
    pair = [k for k in range(3) if k != alone]
    if rng.random() < 0.5:
        pair.reverse()
    deep = max(extents[k][axis] for k in pair)
    bands = [extents[alone][axis], deep]
    last = rng.random() < 0.5
    starts = _in_turn(bands[::-1] if last else bands, size, rng)
    single, double = (starts[1], starts[0]) if last else (starts[0], starts[1])
    boxes: dict[int, Box] = {
        alone: _placed(extents[alone], axis, single, rng.random() * (size - extents[alone][across]))
    }
    for k, side in zip(pair, _in_turn([extents[k][across] for k in pair], size, rng), strict=True):
        boxes[k] = _placed(extents[k], axis, double + rng.random() * (deep - extents[k][axis]), side)
    return [boxes[k] for k in range(3)]


def arrange(
    extents: Sequence[Extent], size: int, relation: str, places: Sequence[str], rng: np.random.Generator
) -> list[Box] | None:
    """Put one to three objects where the words say, or anywhere; return None if that failed this time."""
    if len(extents) == 1:
        return one_at(places[0], extents[0], size, rng) if places else one(extents[0], size, rng)
    if not places and relation != "in a row" and len(extents) == 3:
        return spread(extents, size, int(rng.integers(2)), rng)
    axis, backwards, aspect = int(rng.integers(2)), bool(rng.integers(2)), ANY_ASPECT
    if relation or places:
        (axis, backwards), aspect = _direction(relation, places), SAID_ASPECT
    order = extents[::-1] if backwards else extents
    for _ in range(TRIES if places else 1):
        boxes = two(order, size, axis, aspect, rng) if len(order) == 2 else row(order, size, axis, rng)
        boxes = boxes[::-1] if backwards else boxes
        if not places or fit_all(places, boxes, size):
            return boxes
    return None


def _direction(relation: str, places: Sequence[str]) -> tuple[int, bool]:
    """Return the axis along which words order objects, and whether in reverse: from right to left or upward."""
    if not places:
        return int(relation not in ("above", "below")), relation in ("right of", "below")
    axis, direction = SIDES.get(places[0]) or SIDES.get(places[-1]) or (1, 1)
    return axis, (direction > 0) == (places[0] in SIDES)


def _in_turn(lengths: Sequence[int], size: int, rng: np.random.Generator) -> list[float]:
    """Return where intervals of these lengths start on a line, in this order, with all arrangements equally likely."""
    free = size - sum(lengths)
    cuts = np.sort(rng.random(len(lengths))) * free
    return [float(cut) + sum(lengths[:k]) for k, cut in enumerate(cuts)]


def _placed(extent: Extent, axis: int, along: float, across: float) -> Box:
    """Return the box of an object from its start on an axis and on the other one."""
    return _box(extent, along, across) if axis == 0 else _box(extent, across, along)


def _box(extent: Extent, top: float, left: float) -> Box:
    """Return a box from a corner; rounding down keeps separate boxes separate."""
    y, x = int(top), int(left)
    return y, x, y + extent[0], x + extent[1]
