"""The values of fields and flags: each check returns the value that is meant, or says in one line what was expected."""

from __future__ import annotations

import collections
import json
from typing import Any

import numpy as np

from jaxmix.samplers import SPACINGS, known_sampler
from jaxmix.samplers.noise import MAX_SEED
from jaxmix.types import InputError, shown, whole
from jaxmix.weights.files import user_path

FRESH = -1
"""The seed that stands for one drawn at random, once for a job."""
LARGEST = float(np.finfo(np.float32).max)
MOST_SEEDS = 100_000

Times = int | tuple[int, ...]
"""How often each row is drawn, with seeds that count up, or the seeds with which it is."""


def check_text(key: str, value: Any) -> str:
    """Return `value` if it is text that a PNG and a manifest can hold."""
    if not isinstance(value, str):
        raise InputError(f"{key}: found {kind_of(value)}, expected text")
    if "\x00" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{key}: holds a character that is not text (NUL or half a surrogate pair)")
    return value


def check_seed(key: str, value: Any) -> int:
    """Return `value` if it is a whole number from 0 to 2^64 - 1, or -1 for one drawn at random."""
    return _whole(key, value, FRESH, MAX_SEED, f"a whole number from 0 to {MAX_SEED}, or -1 for a fresh one")


def check_steps(key: str, value: Any, most: int | None = None) -> int:
    """Return `value` if it is a whole number of denoising steps, at least 1 and at most `most`."""
    return _whole(key, value, 1, most, f"a whole number {'of at least 1' if most is None else f'from 1 to {most}'}")


def check_number(key: str, value: Any) -> float:
    """Return `value` as a float if it is a number that float32 can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= LARGEST:
        finite = "" if not isinstance(value, (int, float)) or isinstance(value, bool) else " that float32 can hold"
        raise InputError(f"{key}: found {kind_of(value)}, expected a number{finite}")
    return float(value)


def check_share(key: str, value: Any) -> float:
    """Return `value` as a float if it is a number from 0 to 1."""
    if not 0 <= check_number(key, value) <= 1:
        raise InputError(f"{key}: found {kind_of(value)}, expected a number from 0 to 1")
    return float(value)


def check_pixels(key: str, value: Any) -> int:
    """Return `value` if it is a whole number of pixels; the model's own limits are checked once it is known."""
    return _whole(key, value, 1, None, "a whole number of pixels")


def check_sampler(key: str, value: Any) -> str:
    """Return the sampler that is meant: by its name, or by that of diffusers' class."""
    try:
        return known_sampler(value)
    except InputError as error:
        raise InputError(f"{key}: found {kind_of(value)}, expected{str(error).partition(', expected')[2]}") from None


def check_spacing(key: str, value: Any) -> str:
    """Return `value` if it is the name of a spacing."""
    if not isinstance(value, str) or value not in SPACINGS:
        raise InputError(f"{key}: found {kind_of(value)}, expected one of {', '.join(SPACINGS)}")
    return value


def check_file(key: str, value: Any) -> str:
    """Return `value` if it is the path of an existing file, or its address in a bucket."""
    try:
        found = user_path(check_text(key, value)).is_file()
    except OSError:  # a name that no file can have
        found = False
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    if not found:
        raise InputError(f"{key}: no such file: {value}")
    return value


def check_id(key: str, value: Any) -> str:
    """Return `value` as text if it is a name (text or a whole number)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise InputError(f"{key}: found {kind_of(value)}, expected a name")
    return check_text(key, value)


def _whole(key: str, value: Any, least: int, most: int | None, expected: str) -> int:
    try:
        return whole(key, value, least, most)
    except InputError:
        raise InputError(f"{key}: found {kind_of(value)}, expected {expected}") from None


def kind_of(value: Any) -> str:
    names = {bool: "a truth value", str: "text", list: "a list", dict: "an object", type(None): "null"}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return shown(value)
    name = names.get(type(value), type(value).__name__)
    if isinstance(value, (bool, str)):
        text = json.dumps(value)
        return f"{name} {text if len(text) <= 40 else text[:37] + '...'}"
    return name


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
