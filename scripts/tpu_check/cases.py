"""What is compiled: every sampler and every training step, for which chips, in the order of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxmix.command import near_misses
from jaxmix.types import InputError
from scripts.bench.rows import ADAPTERS, METHODS, TOGETHER
from scripts.bench.train_shapes import TRAINERS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip: a topology that has some, its memory for programs as its compiler says it, and its data sheet.

    ``memory`` is in bytes, ``bandwidth`` of that memory in bytes a second.
    """

    topology: str
    memory: int
    bandwidth: float
    platform: str = "tpu"


CHIPS = {
    "v5e": Chip("v5e:2x2", int(15.75 * GIB), 819e9),
    "v5p": Chip("v5p:2x2x1", int(95.74 * GIB), 2765e9),
    "v6e": Chip("v6e:2x2", int(31.25 * GIB), 1638e9),
    "h100": Chip("1x1x4", 79 * GIB, 3350e9, "cuda"),
}
"""The chips of the table. What XLA leaves of an H100's 80 GB is a setting: here all but 1 GiB."""

SAMPLERS = tuple(dict.fromkeys(("ours", TOGETHER, *ADAPTERS, *METHODS)))
LARGEST = "dreambooth"  # the trainer of all weights
EVERYWHERE = ("ours", TOGETHER, LARGEST)
"""What is compiled for every chip; the rest for the smallest."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table: a sampler (by its engine's name), the decoder or a trainer, for a model and a chip."""

    kind: str  # sample, decode or train
    model: str
    name: str
    chip: str

    @property
    def key(self) -> str:
        """Return what the case is called in results, such as "v5e sd15 sample together"."""
        return " ".join((self.chip, self.model, *dict.fromkeys((self.kind, self.title))))

    @property
    def title(self) -> str:
        """Return the name without "ours-"."""
        if self.kind != "sample":
            return self.name if self.kind == "train" else self.kind
        return "plain" if self.name == "ours" else self.name.removeprefix("ours-")

    @property
    def batches(self) -> tuple[int, int]:
        """Return the two numbers of images (or rows) of a device from which the largest is estimated."""
        if self.name == "ours-aligned":
            return 2, 4  # a group is two at least
        return (1, 4) if self.model == "sd15" and self.kind != "train" else (1, 2)


def plan(models: Sequence[str], chips: Sequence[str], only: Sequence[str]) -> list[Case]:
    """List the cases, those of the first model first, and within it those of the smallest chip.

    `only` holds titles to keep (all if empty); raises `InputError` for one that nothing has.
    """
    found = []
    for model in models:
        for chip in chips:
            everything = chip == "v5e"
            kinds = (("sample", SAMPLERS), ("decode", ("ours",)), ("train", tuple(TRAINERS)))
            for kind, names in kinds:
                found += [
                    Case(kind, model, name, chip)
                    for name in names
                    if (everything or name in EVERYWHERE) and (everything or kind != "decode")
                ]
    titles = {case.title for case in found}
    for title in only:
        if title not in titles:
            raise InputError(f"--only: {title!r} is not known{near_misses(title, sorted(titles))}")
    return [case for case in found if not only or case.title in only]
