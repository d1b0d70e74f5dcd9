"""The denoising loop: one scan per phase, traceable, carrying nothing but x."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxmix.types import ModelFn


class Solver(Protocol):
    """What the loop asks of a solver."""

    @property
    def timesteps(self) -> jax.Array:
        """Timesteps (steps,), descending."""
        ...

    def step(self, i: jax.Array, x: jax.Array, pred: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Returns the state after step i."""
        ...


@dataclasses.dataclass(frozen=True)
class Phase:
    """A run of steps [start, stop) that share one model function.

    More than one phase is for what changes the computation itself, such as a control that acts on the first steps
    only; what changes numbers only belongs into one phase, by way of the model function's `step`.
    """

    model_fn: ModelFn
    start: int
    stop: int


def sample(
    phases: Sequence[Phase],
    solver: Solver,
    x: jax.Array,
    *,
    record: Callable[[jax.Array, jax.Array, jax.Array], Any] | None = None,
    noise_fn: Callable[[jax.Array], jax.Array] | None = None,
) -> Any:
    """Runs the solver from start noise x (n, ...) to the last step and returns the final float32 state.

    `model_fn(x, t, step)` sees the float32 state, the timestep (a traced int32 scalar) and the step index.
    `record(x, pred, step)` is called before each step; what it returns is stacked over all steps, and the result is
    then (x, records). `noise_fn(step)` gives the noise of a stochastic solver's step. Raises ValueError if the phases
    do not tile the solver's steps in order.
    """
    steps = solver.timesteps.shape[0]
    bounds = [0, *(bound for phase in phases for bound in (phase.start, phase.stop)), steps]
    if not phases or any(phase.start >= phase.stop for phase in phases) or bounds[::2] != bounds[1::2]:
        found = ", ".join(f"[{phase.start}, {phase.stop})" for phase in phases) or "none"
        raise ValueError(f"phases are {found}, expected them to tile [0, {steps}) in order")

    x = jnp.asarray(x, jnp.float32)
    records = []
    for phase in phases:

        def body(x: jax.Array, i: jax.Array, model_fn: ModelFn = phase.model_fn) -> tuple[jax.Array, Any]:
            pred = model_fn(x, solver.timesteps[i], i)
            recorded = None if record is None else record(x, pred, i)
            return solver.step(i, x, pred, None if noise_fn is None else noise_fn(i)), recorded

        x, recorded = jax.lax.scan(body, x, jnp.arange(phase.start, phase.stop, dtype=jnp.int32))
        records.append(recorded)
    if record is None:
        return x
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *records)
