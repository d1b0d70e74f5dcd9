"""Several methods at once: their order, the groups that they need, and the prompts that they bring."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmix.pipeline.batching import Batch
from jaxmix.pipeline.given import seed_list
from jaxmix.pipeline.request import Method, Request
from jaxmix.types import InputError


def ordered(methods: Method | Sequence[Method]) -> tuple[Method, ...]:
    """Return methods, or a single one, in the order in which they are applied.

    Raises `InputError` for anything that is not a method.
    """
    given: Any = (methods,) if isinstance(methods, Method) or not hasattr(methods, "__iter__") else tuple(methods)
    for method in given:
        if not isinstance(method, Method):
            kind = type(method).__name__
            hint = f"{kind}.on(...)" if hasattr(method, "on") else "one such as MagicFusion(...)"
            raise InputError(f"methods: found {kind}, expected {hint}")
    return tuple(sorted(given, key=lambda method: method.when))


def common_groups(methods: Sequence[Method], n: int) -> Sequence[int] | None:
    """Return the groups in which the images must be drawn; raises `InputError` if methods need different ones."""
    found: list[tuple[str, list[int]]] = []
    for method in methods:
        sizes = method.together(n)
        if sizes is not None:
            found.append((type(method).__name__, list(sizes)))
    if not found:
        return None
    for name, sizes in found[1:]:
        if sizes != found[0][1]:
            raise InputError(f"groups: found {found[0][1]} in {found[0][0]} and {sizes} in {name}, expected the same")
    return found[0][1]


def beside(methods: Sequence[Method], n: int) -> list[list[str]]:
    """Return for each of ``n`` images the prompts that methods draw it with beside its own."""
    found: list[list[str]] = [[] for _ in range(n)]
    for method in methods:
        for i, texts in enumerate(method.further_prompts(n)):
            found[i] += texts
    return found


def several(
    request: Request, methods: Sequence[Method], k: int, seeds: Any = None
) -> tuple[Request, tuple[Method, ...]]:
    """Return a checked request with each image ``k`` times in a row, and its methods; ``seeds`` are those given.

    Raises `InputError` for methods that draw images in groups, which say who is drawn with whom.
    """
    n = request.n
    if k == 1:
        return request, tuple(methods)
    for method in methods:
        if method.together(n) is not None:
            name = method.title or type(method).__name__
            raise InputError(f"num_images: found {k} with {name}, which draws images in groups, expected 1")
    rows = np.repeat(np.arange(n), k)
    batch = Batch(rows, np.arange(n * k), (1,) * (n * k))
    made = request.repeat(k)
    listed = isinstance(seeds, Sequence) or hasattr(seeds, "__len__")
    counted = [seed + j for seed in request.seeds or () for j in range(k)] if listed else seeds
    made = dataclasses.replace(made, seeds=seed_list(counted, n * k))
    return made, tuple(method.take(batch, n) for method in methods)
