"""LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685), from files and merged into weights.

A B-LoRA (Implicit Style-Content Separation, arXiv 2403.14572) is a LoRA of two blocks, of which one learns the style of
a picture and the other its content; each can be kept without the other (`LoRA.only`) or have a strength of its own.
Its authors' script multiplies both factors of a block by the strength, so that 0.5 there is 0.25 here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmix import lora_forms as forms
from jaxmix.cards import Card, some, weights
from jaxmix.pipeline.blocks import halves
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.request import WEIGHTS, Method, Request
from jaxmix.tuning import lora as low_rank
from jaxmix.types import InputError, Params, shown
from jaxmix.weights.files import exists, path_here, user_path
from jaxmix.weights.lora_files import read_blocks, read_lora
from jaxmix.weights.lora_write import write_lora

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""The parts of a pipeline that a LoRA may change."""

Strength = float | Mapping[str, float]
"""One number for all modules, or one for each name or pattern of some; modules that none names get 0."""

_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers' and PEFT's own names


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoRA(Card):
    """A LoRA (arXiv 2106.09685): for each part of a pipeline that it changes, factors as in `jaxmix.tuning.lora`.

    Instead of ``parts``, ``file`` (path, name in that folder) is read for the pipeline that the LoRA is applied to, and
    of it what all of ``chosen`` name is kept. ``blocks`` are names for some of its modules, each with a regular
    expression: {"style": ..., "content": ...}; ``usual`` are those of the base's family, for what has none of its own.
    """

    parts: Mapping[str, low_rank.Factors] = dataclasses.field(default_factory=dict)
    file: tuple[Path, str | None] | None = None
    blocks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    usual: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chosen: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        """Refuse parts that no pipeline has."""
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown:
            raise InputError(f"lora: found the part {unknown[0]!r}, expected one of {', '.join(PARTS)}")

    def _facts(self) -> Iterator[tuple[str, str]]:
        for name, factors in self.parts.items():
            found = (forms.rank({role: x.shape for role, x in f.items()}) for f in factors.values())
            ranks = sorted({rank for rank in found if rank is not None})
            ranked = f", rank {some(map(str, ranks))}" if ranks else ""
            kinds = sorted({forms.kind(f) for f in factors.values()} - {"LoRA"})
            said = f"{len(factors)} modules{ranked}{''.join(f', {kind}' for kind in kinds)}"
            held = {module: {role: x for role, x in f.items() if role != "alpha"} for module, f in factors.items()}
            yield name, f"{said}, {weights(held)}"
        if self.file is not None:
            yield "file", str(self.file[0] / (self.file[1] or ""))
        for names in self.chosen:
            yield "only", ", ".join(names)

    def on(self, strength: Strength = 1.0) -> Merge:
        """Return the method that merges the LoRA into the weights: 1 as trained, 0 not at all.

        A mapping has a strength for each of some modules, named as in `only`: {"style": 1.0, "content": 0.5}; of
        several that name a module the last counts, and a module that none names gets 0.
        """
        return Merge(self, tuple(strength.items()) if isinstance(strength, Mapping) else strength)

    def only(self, *names: str) -> LoRA:
        """Return the LoRA of some of its modules: "style" or "content", or a regular expression found in their names.

        Names are searched with their part ("unet.", "text_encoder.") and without it. Which blocks are a B-LoRA's style
        and content the file says if it was trained here, else the family of the base does: SDXL's are the authors'.
        Raises `InputError` for a name that names nothing, with near misses; for a file, when it is read.
        """
        if not names:
            raise InputError("LoRA.only: found no names, expected at least one, such as 'style'")
        if self.file is not None:
            return dataclasses.replace(self, chosen=(*self.chosen, names))
        kept = self.named(names)
        parts = {part: {m: f for m, f in factors.items() if (part, m) in kept} for part, factors in self.parts.items()}
        return dataclasses.replace(self, parts={part: factors for part, factors in parts.items() if factors})

    def named(self, names: Sequence[str], where: str = "LoRA") -> dict[tuple[str, str], str]:
        """Return {(part, module): name} of the modules that some names or patterns name; the last that does counts."""
        found: dict[tuple[str, str], str] = {}
        for name in names:
            mine = self._modules_of(name, where)
            if not mine:
                every = [module for factors in self.parts.values() for module in factors]
                near = difflib.get_close_matches(name.replace("\\", ""), [*self._known, *every], n=3, cutoff=0.0)
                means = f" ({self._known[name]})" if name in self._known else ""
                raise InputError(
                    f"{where}: {shown(name)}{means} names none of its {len(every)} modules; near misses: "
                    f"{', '.join(near)}"
                )
            found |= dict.fromkeys(mine, name)
        return found

    @property
    def _known(self) -> dict[str, str]:
        return {**self.usual, **self.blocks}

    def _modules_of(self, name: Any, where: str) -> list[tuple[str, str]]:
        if not isinstance(name, str):
            raise InputError(f"{where}: found {shown(name)}, expected the name or pattern of some modules")
        try:
            search = re.compile(self._known.get(name, name)).search
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{where}: {shown(name)} is not a regular expression: {error}") from None
        every = [(part, module) for part, factors in self.parts.items() for module in factors]
        return [(part, module) for part, module in every if search(module) or search(f"{part}.{module}")]

    def at(self, strength: Strength) -> list[tuple[LoRA, float]]:
        """Return the LoRA as several, each with the one strength of its modules; those of strength 0 are left out."""
        if not isinstance(strength, Mapping):
            return [(self, strength)]
        # A half that a file lacks may be told to be 0.
        told = [n for n, number in strength.items() if number or n not in self._known or self._modules_of(n, "LoRA")]
        found: dict[float, dict[str, dict[str, Any]]] = {}
        for (part, module), name in self.named(told).items():
            found.setdefault(float(strength[name]), {}).setdefault(part, {})[module] = self.parts[part][module]
        return [(LoRA(parts), number) for number, parts in found.items() if number]

    def read(self, pipe: Pipeline) -> LoRA:
        """Return the LoRA with its factors: itself, or its file read for a pipeline."""
        if self.file is None:
            return self
        made = LoRA.load(self.file[0], pipe, self.file[1])
        for names in self.chosen:
            try:
                made = made.only(*names)
            except InputError as error:
                raise InputError(f"{self.file[0]}: {error}") from None
        return made

    @classmethod
    def load(cls, path: str | Path, pipe: Pipeline | None = None, name: str | None = None) -> LoRA:
        """Read a LoRA file (diffusers, PEFT, kohya or LyCORIS, any generation) for a pipeline, in float32.

        LoRA, LoCon, LoHa, LoKr, full differences, and DoRA of any of them; see `jaxmix.lora_forms`. Without a
        pipeline only the path is checked, and the file is read for the pipeline that it is applied to. In a folder,
        ``name`` picks the file; if None, it is the one that diffusers or PEFT would have written, or the only one
        there, or one in each folder that is named like a part (`unet/`, `text_encoder/`). A `CheckpointWarning` names
        what the file has beside that. Raises `InputError` for a file without a LoRA, or with one for another base.
        """
        path = user_path(path)
        if pipe is None:
            if not exists(path):
                raise InputError(f"{path}: no such file, expected a LoRA")
            return cls(file=(path, name))
        shapes = {
            part: {
                module: {leaf: tuple(x.shape) for leaf, x in leaves.items()}
                for module, (_, leaves) in low_rank.modules(pipe.params[part]).items()
            }
            for part in PARTS
            if part in pipe.params
        }
        made: dict[str, Any] = {}
        blocks: dict[str, str] = {}
        for file, part in _find(path, name):
            for found, modules in read_lora(file, shapes, pipe.unet.config.to_dict(), part).items():
                made.setdefault(found, {}).update(modules)
            blocks |= read_blocks(file)
        return cls(made, blocks=blocks, usual=halves(pipe))

    def save(
        self, path: str | Path, pipe: Pipeline | None = None, format: str = "diffusers", dtype: Any = None
    ) -> None:
        """Write the LoRA as one ``.safetensors`` file, in the ``format`` "diffusers" or "kohya".

        "diffusers" keeps alpha in the metadata, where diffusers 0.34 and newer look; "kohya" stores it as tensors,
        which everyone reads (diffusers only one alpha for all modules of a part), and takes every form, "diffusers"
        only plain LoRA and DoRA of it. With ``pipe`` the LoRA is checked against it first, and kohya's names for SDXL
        are those of the original layout, as kohya's own scripts expect. ``dtype`` casts the factors.
        """
        path = path_here(path)
        if path.suffix.lower() != ".safetensors":
            raise InputError(f"{path}: found {path.suffix or 'no ending'!r}, expected a file that ends in .safetensors")
        original = None
        if pipe is not None:
            for part, factors in self.parts.items():
                low_rank.check(_modules(pipe.params, part), factors)
            if pipe.text_encoder_2 is not None:
                original = pipe.unet.config.to_dict()
        write_lora(path, self.parts, format, dtype, original, self.blocks)


def apply_loras(pipe: Pipeline, loras: Sequence[tuple[LoRA, Strength]]) -> Pipeline:
    """Return the pipeline with LoRAs merged into its weights, each with its strength (1: as trained, 0: not at all).

    A strength may be a mapping, as in `LoRA.on`.

    Weights that no LoRA changes are shared with ``pipe``, which stays as it is. The sampler never recompiles, nor does
    the merge for other strengths or other LoRAs of the same modules and ranks. Raises `InputError` if a LoRA does not
    fit the pipeline.
    """
    split = [one for lora, strength in loras for one in lora.read(pipe).at(strength)]
    return dataclasses.replace(pipe, params=merge(pipe.params, split))


def merge(params: Params, loras: Sequence[tuple[LoRA, float]]) -> dict[str, Any]:
    """Return a pipeline's parameters with LoRAs merged in, each with its strength; see `apply_loras`."""
    params = dict(params)
    for part in PARTS:
        found = [(lora.parts[part], jnp.asarray(s, jnp.float32)) for lora, s in loras if lora.parts.get(part)]
        if found:
            _modules(params, part)
            # Leaf by leaf: few programs, since many share a shape, and one float32 copy at a time.
            factors, strengths = [f for f, _ in found], [s for _, s in found]
            params[part] = low_rank.merge(params[part], factors, strengths, _add)
    return params


_add = jax.jit(low_rank.add)


@dataclasses.dataclass(frozen=True, eq=False)
class Merge(Method):
    """A LoRA at a strength, or at one for each of some modules, both as a method and as the edit of the weights."""

    lora: LoRA
    strength: float | tuple[tuple[str, float], ...] = 1.0

    title: ClassVar[str] = "LoRA"
    when: ClassVar[int] = WEIGHTS

    def __eq__(self, other: object) -> bool:
        """Return whether the same LoRA is merged at the same strength."""
        return isinstance(other, Merge) and (self.lora is other.lora and self.strength == other.strength)

    def __hash__(self) -> int:
        """Agree with ``==``."""
        return hash((id(self.lora), self.strength))

    def __call__(self, params: Params) -> Params:
        """Merge the LoRA in."""
        strength = self.strength
        return merge(params, self.lora.at(dict(strength) if isinstance(strength, tuple) else strength))

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Refuse a strength that is not a number, names of no module, and a LoRA that does not fit the pipeline."""
        told = self.strength if isinstance(self.strength, tuple) else ((None, self.strength),)
        for name, number in told:
            if not isinstance(number, (int, float)) or isinstance(number, bool) or not math.isfinite(number):
                of = "" if name is None else f" for {shown(name)}"
                raise InputError(f"LoRA: found strength {number!r}{of}, expected a number")
        read = self._read(pipe)
        for part, factors in read.parts.items():
            low_rank.check(_modules(pipe.params, part), factors)
        if isinstance(self.strength, tuple):
            try:
                read.at(dict(self.strength))
            except InputError as error:
                raise InputError(f"{self.lora.file[0]}: {error}" if self.lora.file else str(error)) from None

    def apply(self, pipe: Pipeline, request: Request) -> Request:
        """Add the merge to the edits of the weights."""
        return request.add(weights=(Merge(self._read(pipe), self.strength),))

    def _read(self, pipe: Pipeline) -> LoRA:
        # Kept with the LoRA itself, so that the file is read once and equal merges stay equal.
        if self.lora.file is None:
            return self.lora
        kept = self.lora.__dict__.setdefault("_read", {})
        encoders = (pipe.text_encoder, pipe.text_encoder_2)
        key = (pipe.unet.config, *(None if encoder is None else encoder.config for encoder in encoders))
        if key not in kept:
            kept[key] = self.lora.read(pipe)
        return kept[key]


def _modules(params: Params, part: str) -> low_rank.Modules:
    if part not in params:
        raise InputError(f"lora: found factors for {part}, which this pipeline lacks, expected a LoRA for its base")
    return low_rank.modules(params[part])


def _find(path: Path, name: str | None) -> list[tuple[Path, str | None]]:
    """Return the LoRA files at a path, which may be a folder, each with the part that its place tells, if any."""
    if not path.is_dir():
        if name is not None:
            raise InputError(f"{path}: found the file name {name!r} with it, expected a folder")
        return [(path, None)]
    if name is not None:
        return [(path / name, None)]
    files = sorted(file.name for file in path.iterdir() if file.suffix.lower() == ".safetensors")
    by_part = [(path / part / _FILES[1], part) for part in PARTS if (path / part / _FILES[1]).is_file()]
    if by_part and not files:
        return list(by_part)
    chosen = [file for file in _FILES if file in files] or files
    if not chosen or (chosen is files and len(files) > 1):
        listing = ", ".join(files[:4]) or "no .safetensors files"
        raise InputError(f"{path}: found {listing}, expected one LoRA file: give its name")
    return [(path / chosen[0], None)]
