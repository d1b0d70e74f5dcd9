"""Paired differences with intervals and p-values, ratios of effects, and requirements of a matrix of effects."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Effect:
    """The mean of n paired differences in the measure's own unit, and `sd`, the unit in which effects are compared.

    `half` is half of the 95 % confidence interval of Student's t; `p` is two-sided, of a mean difference of zero.
    """

    mean: float
    half: float
    p: float
    n: int
    sd: float

    @property
    def in_sd(self) -> float:
        """The mean in standard deviations."""
        return self.mean / self.sd if self.sd > 0 else 0.0 if self.mean == 0 else math.copysign(math.inf, self.mean)

    @property
    def half_in_sd(self) -> float:
        """Half of the interval in standard deviations; that of `sd` itself is not in it."""
        return self.half / self.sd if self.sd > 0 else 0.0

    @property
    def zero(self) -> bool:
        """Whether every single difference is zero."""
        return self.mean == 0 and self.half == 0

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for a JSON file."""
        return {**dataclasses.asdict(self), "in_sd": self.in_sd, "half_in_sd": self.half_in_sd}


def paired(changed: np.ndarray, before: np.ndarray, sd: float | None = None) -> Effect:
    """Compare two measurements (n,) of the same pictures; pairs with a NaN are left out.

    `sd` is the unit of comparison, the standard deviation of `before` if None.
    """
    changed, before = np.asarray(changed, np.float64), np.asarray(before, np.float64)
    unit = spread(before) if sd is None else sd
    difference = changed - before
    difference = difference[np.isfinite(difference)]
    n = len(difference)
    if n < 2:
        return Effect(math.nan, math.nan, math.nan, n, unit)
    mean, error = float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return Effect(mean, 0.0, 1.0 if mean == 0 else 0.0, n, unit)
    p = 2 * float(stdtr(n - 1, -abs(mean / error)))
    return Effect(mean, error * float(stdtrit(n - 1, (1 + LEVEL) / 2)), p, n, unit)


def spread(values: np.ndarray) -> float:
    """Return the standard deviation (n - 1) of the values that are not NaN."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def ratio(a: Effect, b: Effect) -> tuple[float, float]:
    """Return a / b of two independent effects and half of its 95 % interval (delta method); NaN if b is zero."""
    if b.mean == 0:
        return math.nan, math.nan
    r = a.mean / b.mean
    return r, math.hypot(a.half, r * b.half) / abs(b.mean)


def pooled(effects: Sequence[Effect], units: Sequence[float]) -> Effect:
    """Return the sum of effects, each in its unit, as one; its interval assumes independence, `p` is NaN."""
    pairs = [(e, unit) for e, unit in zip(effects, units, strict=True) if unit > 0]
    half = math.sqrt(sum((e.half / unit) ** 2 for e, unit in pairs))
    return Effect(sum(e.mean / unit for e, unit in pairs), half, math.nan, min(e.n for e in effects), 1.0)


Matrix = Mapping[str, Mapping[str, Effect]]
"""``{label: {measured dimension: effect}}``."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One requirement, what was found, and whether that is enough."""

    text: str
    passed: bool

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.text}"


def matrix_verdicts(
    found: Matrix, own: Matrix, share: float = 0.6, leak: float = 0.2, whose: str = "the scenes' own"
) -> list[Verdict]:
    """Judge a matrix by that of the real scenes, each in standard deviations of its own neutral pictures.

    On the diagonal an effect must reach `share` of the scenes' own, in their direction; off the diagonal its size must
    not exceed the size of the scenes' own by more than `leak`.
    """
    diagonal, leaks = [], []
    for label, row in found.items():
        for dimension, effect in row.items():
            here, there = effect.in_sd, own[label][dimension].in_sd
            text = f"{label} alone moves {dimension} {here:+.2f} sd, {whose} {there:+.2f}"
            if label == dimension:
                part = here / there if there else math.nan
                diagonal.append(Verdict(f"{text}: {part:.0%}, asked {share:.0%}", part >= share))
            elif not abs(here) - abs(there) <= leak:
                leaks.append(Verdict(f"{text}, asked at most {leak} above it", False))
    kept = Verdict(f"no label moves another dimension by more than {leak} sd above {whose}", True)
    return [*diagonal, *(leaks or [kept])]
