"""Shared names of the library: array aliases, parameter trees, and the one error for a user's mistake."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array
AnyArray: TypeAlias = jax.Array | np.ndarray
"""What the public entry points of the models take: JAX or NumPy arrays."""

Params: TypeAlias = Mapping[str, Any]
"""A nested mapping of arrays: ``params["down_blocks.0"]["resnets.0"]["conv1"]["kernel"]``."""

ModelFn: TypeAlias = Callable[[Array, Array, Array], Array]
"""``(x, t, step) -> prediction``: latents (n, h, w, c), timestep () int32 in 0-999, step index () int32.

The prediction (n, h, w, c) is in the schedule's own ``prediction_type``. It is deliberately not always eps: with a
cosine or zero-terminal-SNR schedule, recovering x0 from eps at the last timesteps divides by almost zero, so whoever
needs eps or x0 asks ``NoiseSchedule.to_eps`` / ``to_x0`` for it.
"""


class InputError(ValueError):
    """A user's mistake, in one line: which file, row or key, what was found there, and what was expected.

    Commands print it after ``error:`` and exit with status 2; library users get it as a ``ValueError``. What a file
    calls its keys may hold line breaks: they become spaces here.
    """

    def __init__(self, message: object = "") -> None:
        """Keep the message to one line."""
        super().__init__(in_one_line(message))


def in_one_line(message: object) -> str:
    """Return a message with spaces for what would begin another line."""
    return _BREAKS.sub(" ", str(message))


_BREAKS = re.compile("[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+")


class TruncatedPromptWarning(UserWarning):
    """A prompt is longer than the text encoder reads; what follows is not drawn."""


class NotFiniteWarning(RuntimeWarning):
    """A picture holds numbers that are not finite, where it would be black."""


class CheckpointWarning(UserWarning):
    """Something in a checkpoint that is left out or replaced; the message names the file."""


def note(text: str, notes: list[str] | None, where: str) -> None:
    """Add a line about a checkpoint to ``notes``, or warn of it if that is None, after the name of what it is about."""
    if notes is None:
        warnings.warn(in_one_line(f"{where}: {text}"), CheckpointWarning, stacklevel=3)
    else:
        notes.append(in_one_line(text))


NOT_FINITE = (
    "holds numbers that are not finite: a guidance scale, a strength or weights are too large, or the dtype is too "
    "small (float16 decoders of SDXL overflow: try bfloat16)"
)


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return a whole number as an int; 7.0 is one, and so is an array without axes that holds one.

    Raises `InputError`, which calls it ``name``, for anything else and outside of ``least`` to ``most``.
    """
    held = value.item() if isinstance(value, (np.ndarray, np.generic, jax.Array)) and np.ndim(value) == 0 else value
    number = isinstance(held, (int, float)) and not isinstance(held, bool) and math.isfinite(_float(held))
    if (
        number
        and held == int(held)
        and not ((least is not None and held < least) or (most is not None and held > most))
    ):
        return int(held)
    ends = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
    raise InputError(f"{name}: found {shown(value)}, expected a whole number{ends}")


def shown(value: Any, most: int = 60) -> str:
    """Return a value as it is shown in messages, in one line of at most ``most`` characters."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more than 4300 digits
        text = type(value).__name__
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _float(value: float) -> float:
    return 0.0 if isinstance(value, int) else value  # an int of any size is finite, though it may be no float
