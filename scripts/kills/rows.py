"""Rows of many kinds for the embedded model: six methods, three sizes, and ten rows that are bad."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

STYLES = ("a 3d render", "a flat illustration", "an ink drawing", "a glossy cartoon")
THINGS = ("an apple", "a cat", "a sailboat", "a penguin", "a house", "a rose", "a car", "a dog")
PLACES = ("by the sea", "in the snow", "at night", "in a green meadow")
SIZES = ((64, 64), (64, 96), (96, 64))
BAD = (
    "[]",
    "not JSON",
    '{"prompt": "x", "steps": 0}',
    '{"prompt": "x", "height": 3}',
    '{"prompt": "x", "width": -64}',
    '{"prompt": "x", "colour": "red"}',
    '{"prompt": "x", "seed": 1.5}',
    '{"prompt": "x", "image": "nowhere.png"}',
    '{"prompt": "x", "segments": "y @ 0,0,1,1"}',
    '{"prompt": 7}',
)


def mixed_rows(count: int, seed: int) -> list[str]:
    """Return `count` lines, ten of them bad and none of them the same."""
    numbers = random.Random(seed)
    bad = set(numbers.sample(range(count), min(len(BAD), count)))
    wrong = iter(BAD)
    return [next(wrong) if i in bad else json.dumps(_row(i, numbers)) for i in range(count)]


def _row(number: int, numbers: random.Random) -> dict[str, Any]:
    style, thing, other = numbers.choice(STYLES), *numbers.sample(THINGS, 2)
    place = numbers.choice(PLACES)
    kinds: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {"prompt": f"{style} of {thing} {place}"},
        lambda: {"prompt": f"{style} of {thing} {place}", "vmix": "mini-vmix", "labels": "color"},
        lambda: {"prompt": f"{style} of {thing} and {other}", "segments": f"{thing} @ 0,0,0.5,1; {other} @ 0.5,0,1,1"},
        lambda: {"prompt": f"{style} of {thing} and {other}", "phrases": f"{thing}; {other}"},
        lambda: {"prompt": f"{style} of {thing} AND {place} :0.5"},
        lambda: {"prompt": f"{style} of {thing}", "group": f"group {number // 48}"},  # eight rows of one size
    )
    kind = number % len(kinds)
    height, width = SIZES[numbers.randrange(3) if kind == 0 else kind % 3]  # eight programs
    return {**kinds[kind](), "height": height, "width": width}
