"""What an inversion found, and how images are held to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxmix.control import QKV
from jaxmix.programs import Pinned
from jaxmix.types import Array, InputError


@dataclasses.dataclass(frozen=True)
class Inverted:
    """The DDIM inversion of n images over S steps, as `Pipeline.invert` found it.

    ``states`` (n, S + 1, h, w, c) go from the image to the noise. ``features`` maps each recorded site to its q, k and
    v (n, S, tokens, heads, d), before controls. ``label`` is that of the inversion.
    """

    states: Array
    features: dict[str, QKV]
    label: str

    @property
    def noise(self) -> Array:
        """The noise (n, h, w, c) that would draw the images."""
        return self.states[:, -1]

    def course(self, offset: int = 0) -> Array:
        """Return the states (n, S + 1, h, w, c) before each step of a sampling run, and at its end.

        An ``offset`` starts the course so many steps ahead of the run, which then waits for it: StyleAligned's
        references are cleaner than their timestep says.
        """
        steps = self.states.shape[1] - 1
        if not 0 <= offset < steps:
            raise InputError(f"offset: found {offset}, expected 0 to {steps - 1}")
        ahead = np.maximum(np.arange(steps + 1), offset + 1)
        ahead[0] = offset
        return self.states[:, ::-1][:, ahead]

    def seen(self) -> Array:
        """Return the states on which each step of a sampling run finds the features of its timestep; last the image."""
        return jnp.concatenate([self.states[:, :-1][:, ::-1], self.states[:, :1]], 1)


def hold(courses: Array, rows: Sequence[int], n: int) -> Pinned:
    """Hold the images ``rows`` of a batch of ``n`` to their courses (len(rows), S + 1, h, w, c)."""
    states = jnp.zeros((n, *courses.shape[1:]), courses.dtype).at[jnp.asarray(rows)].set(courses)
    return Pinned(states, jnp.zeros((n,)).at[jnp.asarray(rows)].set(1.0))
