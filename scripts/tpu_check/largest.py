"""The largest batch that fits a chip: estimated from two sizes, confirmed by compiling it."""

from __future__ import annotations

from typing import Any

from scripts.tpu_check.cases import CHIPS, Case
from scripts.tpu_check.compiling import too_many

MOST = 256  # images of a device: nobody draws more at once
_TRIES = 3  # sizes beyond the first two

Runs = dict[str, dict[str, Any]]


def name_of(batch: int, fsdp: int) -> str:
    """Return what results call a size: how many for each device, and over how many devices weights are split."""
    return f"{batch}" if fsdp == 1 else f"{batch} fsdp {fsdp}"


def fits(case: Case, run: dict[str, Any]) -> bool:
    """Return whether a compiled program leaves its chip enough memory."""
    return run.get("peak_bytes", CHIPS[case.chip].memory + 1) <= CHIPS[case.chip].memory


def of_size(runs: Runs, fsdp: int) -> dict[int, dict[str, Any]]:
    """Return the runs with weights split over so many devices, by their batch."""
    found = ((name.split(" fsdp "), run) for name, run in runs.items())
    return {int(parts[0]): run for parts, run in found if int((*parts, "1")[1]) == fsdp}


def estimate(case: Case, runs: dict[int, dict[str, Any]]) -> int:
    """Return how many fit by the straight line through the two largest sizes that do, 0 if none does."""
    points = sorted((batch, run["peak_bytes"]) for batch, run in runs.items() if fits(case, run))
    if len(points) < 2:
        return points[0][0] if points else 0
    (few, small), (many, large) = points[-2:]
    each = max((large - small) / (many - few), 1.0)
    guess = int(many + (CHIPS[case.chip].memory - large) / each)
    failed = [batch for batch, run in runs.items() if not fits(case, run) and "reason" not in run]
    return min([guess, MOST, *(batch - 1 for batch in failed)])


def split_of(case: Case, runs: Runs) -> int:
    """Return over how many devices the weights of a case are split: all if a training step does not fit without."""
    first = runs.get(name_of(case.batches[0], 1))
    too_large = case.kind == "train" and first is not None and "reason" not in first and not fits(case, first)
    return first["devices"] if first is not None and too_large else 1


def wanted(case: Case, runs: Runs, confirm: bool = True) -> tuple[int, int] | None:
    """Return the size to compile next as (batch, fsdp), None if all is known that will be.

    Without `confirm` those are the sizes from which the largest is estimated, and no others.
    """
    fsdp = split_of(case, runs)
    mine = of_size(runs, fsdp)
    for batch in case.batches:
        if batch not in mine:
            return batch, fsdp
        if not fits(case, mine[batch]):
            return None
    if not confirm:
        return None
    tried = [batch for batch in mine if batch not in case.batches]
    best, guess = max(batch for batch, run in mine.items() if fits(case, run)), estimate(case, mine)
    if guess <= best or len(tried) >= _TRIES or any(fits(case, mine[b]) or "reason" in mine[b] for b in tried):
        return None
    # After one that was too large, a tenth below the line.
    return (guess if not tried else max(best + 1, int(guess * 0.9))), fsdp


def known(case: Case, runs: Runs) -> tuple[int, int, int | None, dict[str, Any] | None]:
    """Return (fsdp, the estimate, the largest size that was compiled and fits, its run)."""
    fsdp = split_of(case, runs)
    mine = of_size(runs, fsdp)
    fit = [batch for batch, run in mine.items() if fits(case, run)]
    return fsdp, estimate(case, mine), max(fit, default=None), mine[max(fit)] if fit else None


def complaints(case: Case, runs: Runs) -> list[str]:
    """Return one line for each thing that is wrong with a case: it failed, fits nothing, or a sampler communicates."""
    found = [f"{case.key}: {name}: {run['reason']}" for name, run in runs.items() if "reason" in run]
    fsdp, _, best, _ = known(case, runs)
    first = of_size(runs, fsdp).get(case.batches[0])
    if best is None and first is not None and "reason" not in first:
        found.append(too_many(case, case.batches[0], first))
    if case.kind != "train":
        spoken = {kind for run in runs.values() for kind in run.get("collectives", ())}
        if spoken:
            found.append(f"{case.key}: found {', '.join(sorted(spoken))} in a sampler, expected no collective")
    return found
