"""How much of a run was spent compiling."""

from __future__ import annotations

import time
from typing import Any

import jax


class CompileClock:
    """Add up the seconds that JAX spends tracing, lowering and compiling inside a `with` block.

    `programs` counts requests to the persistent cache and `hits` what it held. Durations may nest (an inner jit is
    traced within an outer one), but time is counted once.
    """

    def __init__(self) -> None:
        self.programs = 0
        self.hits = 0
        self._spans: list[tuple[float, float]] = []  # disjoint, in order

    @property
    def seconds(self) -> float:
        """Seconds of compiling so far."""
        return sum(end - start for start, end in self._spans)

    def __enter__(self) -> CompileClock:
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._duration)
        jax.monitoring.unregister_event_listener(self._event)

    def _duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if not event.startswith("/jax/core/compile/"):
            return
        end = time.monotonic()
        start = end - duration_secs
        while self._spans and self._spans[-1][1] > start:
            start = min(start, self._spans.pop()[0])
        self._spans.append((start, end))

    def _event(self, event: str, **_: Any) -> None:
        self.programs += event == "/jax/compilation_cache/compile_requests_use_cache"
        self.hits += event == "/jax/compilation_cache/cache_hits"
