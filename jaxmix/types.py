"""Shared names of the library: array aliases, parameter trees, and the one error for a user's mistake."""

from __future__ import annotations

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

    Commands print it after ``error:`` and exit with status 2; library users get it as a ``ValueError``.
    """
