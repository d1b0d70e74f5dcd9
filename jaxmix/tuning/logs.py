"""What a training run writes for people: scalars by step and pictures, as files and as TensorBoard events."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np


class ScalarLog:
    """Scalars and pictures by step, as TensorBoard events and as `metrics.jsonl`, in one folder."""

    def __init__(self, folder: str | Path, resumed_step: int | None = None):
        """Open both for appending; with `resumed_step`, entries of later steps are dropped first.

        So a run that was stopped between two checkpoints has each step once. A truncated last line is dropped as well.
        """
        from tensorboardX import SummaryWriter

        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / "metrics.jsonl"
        purge = None
        if resumed_step is not None:
            _keep_until(path, resumed_step)
            purge = resumed_step + 1
        self._events = SummaryWriter(str(folder), purge_step=purge)
        self._lines = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write one row of scalars, leaving out those that are not finite (a timestep bin without rows)."""
        scalars = {name: round(float(value), 7) for name, value in scalars.items() if math.isfinite(value)}
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
        self._lines.flush()

    def picture(self, step: int, name: str, image: np.ndarray, folder: Path) -> Path:
        """Write `image` (H, W, 3) uint8 as FOLDER/{name}-{step:07d}.png and as an event; return the file."""
        from PIL import Image

        path = folder / f"{name}-{step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        self._events.add_image(name, image, step, dataformats="HWC")
        return path

    def close(self) -> None:
        """Write what is buffered."""
        self._events.close()
        self._lines.close()


def _keep_until(path: Path, step: int) -> None:
    """Drop the rows of a metrics.jsonl after `step`, and those that cannot be read."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and row.get("step", math.inf) <= step:
            kept.append(line)
    beside = path.with_suffix(".jsonl.new")
    beside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(beside, path)  # atomic: a run killed here loses no row


def mean_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the means over steps of scalar metrics; `bin_sum` and `bin_count` become loss/t0 .. loss/tN."""
    total = jax.tree.map(lambda *xs: np.sum(np.asarray(xs, np.float64), axis=0), *rows)
    sums, counts = total.pop("bin_sum", np.zeros(0)), total.pop("bin_count", np.zeros(0))
    means = {name: float(value) / len(rows) for name, value in total.items()}
    bins = {f"loss/t{i}": s / n if n else math.nan for i, (s, n) in enumerate(zip(sums, counts, strict=True))}
    return {**means, **bins}
