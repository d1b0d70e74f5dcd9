"""The denoising loop: one scan per phase, traceable, carrying x and the solver's memory."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.types import ModelFn


class Solver(Protocol):
    """What the loop needs of a solver: a pytree of tables over S steps.

    Whatever the solver, the state is x = signal x0 + sigma eps, which is what the model sees. A step is a full one,
    from one level to the next; some solvers call the model twice in it (`TwoCalls`).
    """

    @property
    def timesteps(self) -> jax.Array:
        """Timesteps (S,), descending, int32, or float32 where they are fractional."""
        ...

    @property
    def signals(self) -> jax.Array:
        """Factors of x0 (S + 1,) before each step, and at the end."""
        ...

    @property
    def sigmas(self) -> jax.Array:
        """Factors of eps (S + 1,) before each step, and at the end."""
        ...

    @property
    def init_scale(self) -> jax.Array:
        """The factor of standard normal start noise, ()."""
        ...

    @property
    def stochastic(self) -> bool:
        """Whether a step needs noise."""
        ...

    @property
    def prediction_type(self) -> str:
        """What the model predicts: "epsilon", "v_prediction" or "sample"."""
        ...

    @property
    def steps(self) -> int:
        """The number of steps S."""
        ...

    def memory(self, x: jax.Array) -> Any:
        """Return what the solver carries beside x before the first step of a run; () for nothing."""
        ...

    def step(
        self, i: jax.Array, x: jax.Array, memory: Any, pred: jax.Array, noise: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Return the state and the memory after step i."""
        ...


class TwoCalls(Solver, Protocol):
    """A solver that calls the model twice in some of its steps.

    The first call, ``part`` 0, sees the state before the step; `step` then returns a provisional state, which the
    second call, ``part`` 1, sees at a level of its own. In a step with one call part 0 leads to the state after it.
    """

    @property
    def second_timesteps(self) -> jax.Array:
        """Timesteps (S,) of the second calls, in the dtype of `timesteps`."""
        ...

    @property
    def second_signals(self) -> jax.Array:
        """Factors of x0 (S,) in what the second calls see."""
        ...

    @property
    def second_sigmas(self) -> jax.Array:
        """Factors of eps (S,) in what the second calls see."""
        ...

    def calls(self, step: int, start: int) -> int:
        """Return how often the model is called in a step, 1 or 2, if the run begins with step `start`."""
        ...

    def step(
        self,
        i: jax.Array,
        x: jax.Array,
        memory: Any,
        pred: jax.Array,
        noise: jax.Array | None = None,
        part: jax.Array | int = 0,
    ) -> tuple[jax.Array, Any]:
        """Return the state and the memory after a call of step i."""
        ...


def level(solver: Solver, step: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the factors of x0 and of eps in what the model sees when it is called in a step with timestep t."""
    signal, sigma = solver.signals[step], solver.sigmas[step]
    if not hasattr(solver, "calls"):
        return signal, sigma
    two = cast(TwoCalls, solver)
    first = t == two.timesteps[step]  # where both have one timestep, they have one level
    return jnp.where(first, signal, two.second_signals[step]), jnp.where(first, sigma, two.second_sigmas[step])


@dataclasses.dataclass(frozen=True)
class Phase:
    """A run of steps [start, stop) that share one model function.

    Use more than one phase for what changes the computation itself, such as a control that acts in the first steps
    only; what changes only numbers belongs in one phase, through the model function's `step`.
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
    latents_fn: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Any:
    """Run the solver from x (n, ...), the state before step `start`, to the float32 state before step `stop`.

    A `stop` of None is the end.

    From pure noise, x is standard normal noise times `solver.init_scale`; from an image, see `latents.noised`.
    `model_fn(x, t, step)` sees the float32 state, the timestep (a traced scalar) and the step index.
    `latents_fn(x, step)` edits the state after a step, before the next one. `record(x, pred, step)` is called in each
    step before the state changes; its results are stacked over the steps run, and the function then returns (x,
    records). `noise_fn(step)` gives the noise of a stochastic solver's step. Under a solver of `TwoCalls` the model
    function is called up to twice with the same step, `noise_fn(2 step + part)` gives the noise of each call, and the
    other functions see whole steps. Raises ValueError if the phases do not tile the steps in order, or a stochastic
    solver gets no noise.
    """
    steps = solver.timesteps.shape[0] if stop is None else stop
    bounds = [start, *(bound for phase in phases for bound in (phase.start, phase.stop)), steps]
    if not phases or any(phase.start >= phase.stop for phase in phases) or bounds[::2] != bounds[1::2]:
        found = ", ".join(f"[{phase.start}, {phase.stop})" for phase in phases) or "none"
        raise ValueError(f"phases are {found}, expected them to tile [{start}, {steps}) in order")

    x = jnp.asarray(x, jnp.float32)
    state = (x, solver.memory(x))
    records = []
    for phase in phases:
        if hasattr(solver, "calls"):
            body, calls = _by_calls(phase, cast(TwoCalls, solver), start, record, noise_fn, latents_fn)
            state, recorded = jax.lax.scan(body, state, calls)
            recorded = jax.tree.map(lambda x, first=calls[1] == 0: x[first], recorded)
            records.append(recorded)
            continue

        def body(state: tuple[jax.Array, Any], i: jax.Array, model_fn: ModelFn = phase.model_fn) -> tuple[Any, Any]:
            x, memory = state
            pred = model_fn(x, solver.timesteps[i], i)
            recorded = None if record is None else record(x, pred, i)
            x, memory = solver.step(i, x, memory, pred, None if noise_fn is None else noise_fn(i))
            return (x if latents_fn is None else latents_fn(x, i), memory), recorded

        state, recorded = jax.lax.scan(body, state, jnp.arange(phase.start, phase.stop, dtype=jnp.int32))
        records.append(recorded)
    if record is None:
        return state[0]
    return state[0], jax.tree.map(lambda *parts: jnp.concatenate(parts), *records)


def _by_calls(
    phase: Phase, solver: TwoCalls, start: int, record: Any, noise_fn: Any, latents_fn: Any
) -> tuple[Callable[[Any, Any], tuple[Any, Any]], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return the body of a scan over the calls of a phase, in which the model is compiled once, and what it scans.

    That is for each call its step, its part, and whether it is the last of its step.
    """
    counts = [solver.calls(i, start) for i in range(phase.start, phase.stop)]
    steps = np.repeat(np.arange(phase.start, phase.stop, dtype=np.int32), counts)
    parts = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    ends = np.concatenate([np.arange(count) == count - 1 for count in counts])

    def body(state: tuple[jax.Array, Any], call: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, Any]:
        (x, memory), (i, part, ends) = state, call
        pred = phase.model_fn(x, jnp.where(part == 0, solver.timesteps[i], solver.second_timesteps[i]), i)
        recorded = None if record is None else record(x, pred, i)
        x, memory = solver.step(i, x, memory, pred, None if noise_fn is None else noise_fn(2 * i + part), part)
        return (x if latents_fn is None else jnp.where(ends, latents_fn(x, i), x), memory), recorded

    return body, (steps, parts, ends)
