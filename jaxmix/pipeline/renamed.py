"""Keywords that `Pipeline.generate` had until 0.1, translated to today's. To be removed in the next release."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmix.pipeline.batching import of_shape
from jaxmix.pipeline.parts import Parts
from jaxmix.pipeline.request import Method, Request, Sizes
from jaxmix.pipeline.stacking import ordered
from jaxmix.samplers import Unguided

KEYWORDS = ("pinned", "fusion", "context", "start", "guided", "original_size", "crop", "target_size")


def translate(
    parts: Parts, request: Request, methods: Method | Sequence[Method], renamed: Mapping[str, Any]
) -> tuple[Request, tuple[Method, ...]]:
    """Return the request and methods that the old keywords stand for, and warn.

    Raises TypeError, as any call does, for a keyword that never existed.
    """
    if unknown := sorted(set(renamed) - set(KEYWORDS)):
        raise TypeError(f"generate() got an unexpected keyword argument {unknown[0]!r}")
    warnings.warn(
        f"generate({', '.join(f'{name}=' for name in renamed)}) is deprecated: use methods=, or Pipeline.draw of a "
        "Request; the keyword will be removed in the next release",
        DeprecationWarning,
        stacklevel=3,
    )
    methods = ordered(methods)
    if renamed.get("fusion") is not None:
        methods = (*methods, renamed["fusion"])
    if renamed.get("pinned") is not None:
        request = request.add(edits=(renamed["pinned"],))
    if renamed.get("guided") is False:
        request = request.add(guidance=(Unguided(),))
    if renamed.get("start"):
        request = dataclasses.replace(request, span=(renamed["start"], None))
    told = [renamed.get(name) for name in ("original_size", "crop", "target_size")]
    if any(told):
        full = request.checked(parts)
        assert full.sizes is not None
        sizes = Sizes(*(tuple(a or b) for a, b in zip(told, full.sizes, strict=True)))
        request = dataclasses.replace(request, sizes=sizes)
    if renamed.get("context") is not None:
        states = request.checked(parts).states(parts)
        context = of_shape("context", renamed["context"], states.context[:, 1].shape)
        spliced = dataclasses.replace(states, context=states.context.at[:, 1].set(context))
        request = dataclasses.replace(request, text=spliced)
    return request, methods
