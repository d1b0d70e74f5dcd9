"""Pictures of each condition of an experiment, drawn once and kept: an interrupted run resumes where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.types import InputError
from scripts.effects.measures import with_words


@dataclasses.dataclass(frozen=True)
class Condition:
    """What differs between the pictures of two conditions; their prompts, seeds and settings are the same.

    `model` and `adapter` are names in the studio's mappings, `adapter` "" for none; `scale` 0 leaves its value mixing
    out; `lora` is the strength of its LoRA; `words` are the dimensions whose label words are in the prompts.
    """

    model: str = "base"
    adapter: str = ""
    labels: str = "all"
    scale: float = 0.0
    lora: float = 0.0
    words: tuple[str, ...] = ()


def digest(tree: Any) -> str:
    """Return a fingerprint of a tree of arrays."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        if array.dtype == object:
            raise TypeError(f"{jax.tree_util.keystr(path)}: found {type(leaf).__name__}, expected an array")
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:24]


class Studio:
    """Draw the pictures of conditions, batch by batch, and keep them under `folder`."""

    def __init__(
        self,
        models: Mapping[str, jaxmix.Pipeline],
        adapters: Mapping[str, jaxmix.VMix],
        folder: Path,
        steps: int | None,
        guidance_scale: float | None,
        batch_size: int,
        seed: int,
    ) -> None:
        self.models, self.adapters, self.folder = models, adapters, folder
        self.steps, self.guidance_scale, self.batch_size, self.seed = steps, guidance_scale, batch_size, seed
        self._digests: dict[Any, str] = {}
        self._merged: dict[tuple[str, str, float], jaxmix.Pipeline] = {}

    def pipeline(self, condition: Condition) -> jaxmix.Pipeline:
        """Return the pipeline of a condition, with its LoRA merged."""
        pipe = self.models[condition.model]
        if not condition.lora:
            return pipe
        key = (condition.model, condition.adapter, condition.lora)
        if key not in self._merged:
            self._lora(condition)
            self._merged.clear()  # one at a time: each is as large as the UNet
            self._merged[key] = self.adapters[condition.adapter].apply_lora(pipe, condition.lora)
        return self._merged[key]

    def _lora(self, condition: Condition) -> jaxmix.LoRA:
        """Return the LoRA of a condition's adapter. Raises `InputError` if its file has none."""
        lora = self.adapters[condition.adapter].lora
        if lora is None:
            raise InputError(f"{condition.adapter}: found no LoRA in this VMix file, expected one trained along")
        return lora

    def control(self, condition: Condition, pipe: jaxmix.Pipeline) -> tuple[Any, ...]:
        """Return the controls of a condition, for any number of pictures."""
        if not condition.scale:
            return ()
        return (self.adapters[condition.adapter].bind(pipe, condition.labels, condition.scale),)

    def _digest(self, kind: str, name: str, tree: Any) -> str:
        if (kind, name) not in self._digests:
            self._digests[kind, name] = digest(tree)
        return self._digests[kind, name]

    def _path(self, condition: Condition, captions: Sequence[str]) -> Path:
        pipe = self.models[condition.model]
        settings: dict[str, Any] = {
            "captions": list(captions),
            "steps": pipe.default_steps if self.steps is None else self.steps,
            "guidance_scale": pipe.default_guidance_scale if self.guidance_scale is None else self.guidance_scale,
            "sampler": pipe.sampler,
            "seed": self.seed,
            "model": self._digest("model", condition.model, pipe.params),
        }
        if condition.scale:
            vmix = self.adapters[condition.adapter]
            settings["labels"], settings["scale"] = condition.labels, condition.scale
            settings["adapter"] = self._digest("adapter", condition.adapter, vmix.params)
        if condition.lora:
            settings["lora"] = condition.lora
            settings["factors"] = self._digest("lora", condition.adapter, self._lora(condition).parts)
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]
        return self.folder / f"{key}.npz"

    def draw(self, name: str, condition: Condition, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return one picture per prompt, uint8 (n, H, W, 3); picture i always has the noise of seed `seed + i`."""
        captions = [with_words(row["caption"], condition.words) for row in rows]
        path = self._path(condition, captions)
        if path.is_file():
            with np.load(path) as kept:
                return kept["images"]
        pipe = self.pipeline(condition)
        controls, parts = self.control(condition, pipe), []
        with command.progress(len(captions), name, "images") as bar:
            for start in range(0, len(captions), self.batch_size):
                some = captions[start : start + self.batch_size]
                seeds = range(self.seed + start, self.seed + start + len(some))
                parts.append(self._generate(pipe, some, seeds, controls))
                bar.update(len(some))
        images = np.concatenate(parts)
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        with open(unfinished, "wb") as file:
            np.savez_compressed(file, images=images)
        unfinished.replace(path)
        return images

    def latents(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return the base's latents of at most one batch of prompts, (n, h, w, c)."""
        captions = [row["caption"] for row in rows]
        seeds = range(self.seed, self.seed + len(rows))
        return self._generate(self.models["base"], captions, seeds, (), output="latent")

    def _generate(
        self, pipe: jaxmix.Pipeline, captions: Sequence[str], seeds: range, controls: Any, output: str = "uint8"
    ) -> np.ndarray:
        return pipe.generate(
            captions,
            list(seeds),
            self.steps,
            self.guidance_scale,
            controls,
            batch_size=self.batch_size,
            output=output,
        )
