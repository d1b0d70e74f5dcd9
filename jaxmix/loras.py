"""LoRAs as users hold them: files for a pipeline, and pipelines with LoRAs merged in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxmix.tuning import lora as low_rank
from jaxmix.types import InputError
from jaxmix.weights.lora_files import read_lora, write_lora

if TYPE_CHECKING:
    from jaxmix.pipeline import Pipeline

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""The parts of a pipeline that a LoRA may change."""

_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers' and PEFT's own names


@dataclasses.dataclass(frozen=True)
class LoRA:
    """A LoRA (arXiv 2106.09685): for each part of a pipeline that it changes, factors as in `jaxmix.tuning.lora`."""

    parts: Mapping[str, low_rank.Factors]

    def __post_init__(self) -> None:
        """Refuse parts that no pipeline has."""
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown:
            raise InputError(f"lora: found the part {unknown[0]!r}, expected one of {', '.join(PARTS)}")

    @classmethod
    def load(cls, path: str | Path, pipe: Pipeline, name: str | None = None) -> LoRA:
        """Read a LoRA file (diffusers, PEFT or kohya, any generation) for a pipeline, in float32.

        In a folder ``name`` says which file is meant; if None, it is the one that diffusers or PEFT would have
        written, or the only one there. Raises `InputError` for a file that holds no plain LoRA or one for another
        base.
        """
        shapes = {
            part: {module: tuple(kernel.shape) for module, (_, kernel) in low_rank.targets(pipe.params[part]).items()}
            for part in PARTS
            if part in pipe.params
        }
        return cls(read_lora(_find(Path(path), name), shapes, pipe.unet.config.to_dict()))

    def save(
        self, path: str | Path, pipe: Pipeline | None = None, format: str = "diffusers", dtype: Any = None
    ) -> None:
        """Write the LoRA as one ``.safetensors`` file, in the ``format`` "diffusers" or "kohya".

        "diffusers" keeps alpha in the metadata, where diffusers 0.34 and newer look; "kohya" has it as tensors, which
        everyone reads (diffusers only one alpha for all modules of a part). With ``pipe`` the LoRA is checked against
        it first, and kohya's names for SDXL are those of the original layout, as kohya's own scripts want them.
        ``dtype`` casts the factors.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise InputError(f"{path}: found {path.suffix or 'no ending'!r}, expected a file that ends in .safetensors")
        original = None
        if pipe is not None:
            for part, factors in self.parts.items():
                low_rank.check(_targets(pipe, part), factors)
            if pipe.text_encoder_2 is not None:
                original = pipe.unet.config.to_dict()
        write_lora(path, self.parts, format, dtype, original)


def apply_loras(pipe: Pipeline, loras: Sequence[tuple[LoRA, float]]) -> Pipeline:
    """Return the pipeline with LoRAs merged into its weights, each with its strength (1: as trained, 0: not at all).

    The weights that no LoRA changes are shared with ``pipe``, which stays as it is. The sampler never compiles anew;
    the merge does not either, for other strengths or LoRAs of the same modules and ranks. Raises `InputError` where a
    LoRA does not fit the pipeline.
    """
    params = dict(pipe.params)
    for part in PARTS:
        terms: dict[str, list[tuple[Any, jax.Array]]] = {}
        for lora, strength in loras:
            if factors := lora.parts.get(part):
                low_rank.check(_targets(pipe, part), factors)
                for module, f in factors.items():
                    terms.setdefault(module, []).append((f, jnp.asarray(strength, jnp.float32)))
        if terms:
            modules = _targets(pipe, part)
            # Kernel by kernel: few programs, as many kernels have one shape, and float32 copies of one at a time.
            kernels = {module: _add(modules[module][1], *zip(*found, strict=True)) for module, found in terms.items()}
            params[part] = low_rank.with_kernels(params[part], kernels)
    return dataclasses.replace(pipe, params=params)


_add = jax.jit(low_rank.add)


def _targets(pipe: Pipeline, part: str) -> Mapping[str, tuple[tuple[str, ...], Any]]:
    if part not in pipe.params:
        raise InputError(f"lora: it changes the part {part}, which this pipeline has not; a LoRA for another base?")
    return low_rank.targets(pipe.params[part])


def _find(path: Path, name: str | None) -> Path:
    """Return the LoRA file at a path, which may be a folder."""
    if not path.is_dir():
        if name is not None:
            raise InputError(f"{path}: found the file name {name!r} with it, expected a folder")
        return path
    if name is not None:
        return path / name
    files = sorted(file.name for file in path.glob("*.safetensors"))
    chosen = [file for file in _FILES if file in files] or files
    if not chosen or (chosen is files and len(files) > 1):
        listing = ", ".join(files[:4]) or "no .safetensors files"
        raise InputError(f"{path}: found {listing}, expected one LoRA file; give its name")
    return path / chosen[0]
