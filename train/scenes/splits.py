"""Which combinations a model never sees in training, so that it can be asked about them."""

from __future__ import annotations

SPLITS: tuple[str, ...] = (
    "train",
    "all",  # train and the held-out combinations together: for scorers, never for generators
    "held_out_pairs",
    "held_out_relations",
    "held_out_objects",
    "held_out_style",
)

# The last objects of the atlas are reserved for few-shot personalisation, so a model may know at most 96.
WHOLE_OBJECTS = 4
HELD_OUT_STYLE = "pixel"


def pair_held_out(obj: int, style: int) -> bool:
    """Return whether training never shows this object in this style (indices): 2 of 5 objects lack 1 of 4 styles."""
    return obj % 5 in (1, 3) and style == (obj // 5 + obj % 5 // 2) % 4


def relation_held_out(first: int, second: int, relation: int) -> bool:
    """Return whether training never shows this ordered pair of objects in this relation: about one in ten."""
    return (7 * first + 3 * second + 5 * relation + first * second) % 10 == 0


def held_out_objects(objects: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the objects that training never shows."""
    return objects[-WHOLE_OBJECTS:]
