"""Pictures of any condition, drawn once and kept, and tables of what was measured of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.types import InputError
from scripts.effects.draw import digest
from scripts.effects.stats import paired

Measured = Mapping[str, Mapping[str, np.ndarray]]
"""``{condition: {measure: one value per case}}``."""


class Studio:
    """Draw pictures batch by batch, keep them under `out`, and report progress; `seed` is that of the first."""

    def __init__(self, out: Path, pipe: jaxmix.Pipeline, seed: int) -> None:
        self.pipe, self.seed = pipe, seed
        self.folder = out / "drawn"
        self._model = digest(pipe.params)

    def draw(
        self,
        key: Sequence[Any],
        n: int,
        some: Callable[[slice, list[int]], np.ndarray],
        a_batch: int,
        title: str = "",
    ) -> np.ndarray:
        """Return uint8 pictures of n cases; ``some`` draws those of a slice with the given seeds of its images.

        ``key`` has everything that the pictures depend on besides the model, the seeds and the steps. ``title`` is only
        shown, so that a condition of several tables is drawn once; without one the first three of ``key`` are.
        """
        settings = [*key, n, self._model, self.seed, self.pipe.default_steps]
        name = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:24]
        path = self.folder / f"{name}.npz"
        if path.is_file():
            with np.load(path) as kept:
                return kept["images"]
        parts = []
        with command.progress(n, title or " ".join(str(x) for x in key[:3]), "cases") as bar:
            for start in range(0, n, a_batch):
                rows = slice(start, min(start + a_batch, n))
                parts.append(some(rows, [self.seed + i for i in range(rows.start, rows.stop)]))
                bar.update(rows.stop - rows.start)
        images = np.concatenate(parts)
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        with open(unfinished, "wb") as file:
            np.savez_compressed(file, images=images)
        unfinished.replace(path)
        return images


def filled(draw: Callable[[list[int], list[int]], np.ndarray], a_batch: int) -> Callable[..., np.ndarray]:
    """Return what `Studio.draw` asks for, of ``draw(indices, seeds)``, which is always given ``a_batch`` of them.

    A last batch that is smaller is filled up with its last case, so that one program does.
    """

    def some(rows: slice, seeds: list[int]) -> np.ndarray:
        missing = a_batch - len(seeds)
        index = [*range(rows.start, rows.stop), *[rows.stop - 1] * missing]
        return draw(index, seeds + seeds[-1:] * missing)[: len(seeds)]

    return some


def check_counts(cfg: Any, **least: int) -> None:
    """Raise `InputError` for a field of a config that is below its least value."""
    for name, value in least.items():
        if getattr(cfg, name) < value:
            raise InputError(f"{name}: found {getattr(cfg, name)}, expected {value} or more")


def check_parts(text: str, known: Sequence[str]) -> None:
    """Raise `InputError` for a comma list with a name that is not known."""
    if unknown := [part for part in text.split(",") if part not in known]:
        raise InputError(f"parts: found {unknown[0]!r}, expected some of {', '.join(known)}")


def table(title: str, found: Measured, base: str, units: Mapping[str, str]) -> str:
    """Return a Markdown table: means, and in brackets the paired difference from `base` with half its interval."""
    columns = list(next(iter(found.values())))
    lines = [f"**{title}**", "", "| | " + " | ".join(f"{c}{units.get(c, '')}" for c in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, measures in found.items():
        cells = []
        for c in columns:
            if np.isnan(measures[c]).all():
                cells.append("")
                continue
            cell = f"{np.nanmean(measures[c]):.3f}"
            if (
                not np.isnan(found[base][c]).all()
                and name != base
                and not name.startswith("real")
                and len(measures[c]) == len(found[base][c])
            ):
                effect = paired(measures[c], found[base][c])
                cell += f" ({effect.mean:+.3f} ±{effect.half:.3f})"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def means(measured: Measured) -> dict[str, dict[str, float]]:
    """Return the mean of every measure of every condition, for a JSON file."""
    return {
        name: {k: float(np.nanmean(v)) for k, v in m.items() if not np.isnan(v).all()} for name, m in measured.items()
    }
