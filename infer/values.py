"""What a value is, in words, and the seeds of rows: one, a fresh one, or lists of them."""

from __future__ import annotations

import collections
import json
from typing import Any

from jaxmix.samplers.noise import MAX_SEED
from jaxmix.types import InputError, shown, whole

FRESH = -1
"""The seed that stands for one drawn at random, once for a job."""
MOST_SEEDS = 100_000

Times = int | tuple[int, ...]
"""How often each row is drawn, with seeds that count up, or the seeds with which it is."""


def kind_of(value: Any) -> str:
    """Return what a value of a row is, in words that fit a message."""
    names = {bool: "a truth value", str: "text", list: "a list", dict: "an object", type(None): "null"}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return shown(value)
    name = names.get(type(value), type(value).__name__)
    if isinstance(value, (bool, str)):
        text = json.dumps(value)
        return f"{name} {text if len(text) <= 40 else text[:37] + '...'}"
    return name


def check_seed(key: str, value: Any) -> int:
    """Return `value` if it is a whole number from 0 to 2^64 - 1, or -1 for one drawn at random."""
    try:
        return whole(key, value, FRESH, MAX_SEED)
    except InputError:
        told = f"a whole number from 0 to {MAX_SEED}, or -1 for a fresh one"
        raise InputError(f"{key}: found {kind_of(value)}, expected {told}") from None


def seed_ranges(flag: str, text: str) -> tuple[int, ...]:
    """Return the seeds that text such as "1-8,12" lists, ends included; raises `InputError` for anything else."""
    found: list[int] = []
    for part in text.split(","):
        ends = part.strip().split("-")
        if not (1 <= len(ends) <= 2 and all(end.strip().isascii() and end.strip().isdecimal() for end in ends)):
            raise InputError(f"{flag}: found {shown(part.strip())}, expected a seed or a range, as in 1-8,12")
        first, last = (check_seed(flag, int(end[:40])) for end in (ends[0], ends[-1]))
        if last < first:
            raise InputError(f"{flag}: found the range {first}-{last}, expected its lower end first")
        if last - first + len(found) >= MOST_SEEDS:
            raise InputError(f"{flag}: found more than {MOST_SEEDS:,} seeds, expected fewer for one command")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        twice = collections.Counter(found).most_common(1)[0][0]
        raise InputError(f"{flag}: found {twice} twice, expected each seed once")
    return tuple(found)
