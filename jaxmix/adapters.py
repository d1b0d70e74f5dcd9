"""Adapters as users hold them: the parameters of a method, made for a pipeline, in one safetensors file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxmix.controls import vmix
from jaxmix.models.unet import sites, subtree
from jaxmix.types import InputError, Params
from jaxmix.weights import load_tree, read_header, save_tree

if TYPE_CHECKING:
    from jaxmix.pipeline import Pipeline

_KEY = "jaxmix"  # of the safetensors metadata, under which the config is stored


@dataclasses.dataclass(frozen=True)
class VMix:
    """A VMix adapter (arXiv 2412.20800): ``config`` says what it was made for, ``params`` what it has learnt."""

    config: vmix.VMixConfig
    params: Params

    @classmethod
    def init(cls, key: jax.Array, pipe: Pipeline, labels: Mapping[str, tuple[str, str]] | None = None) -> VMix:
        """Make an untrained adapter for a pipeline; until it is trained it changes nothing, bit for bit.

        ``labels`` maps each aesthetic dimension to (label, rare token); the paper's six dimensions if None. Each text
        goes alone through the pipeline's text encoder, and its state at the end-of-text token is kept.
        """
        triples = vmix.label_pairs(labels)
        texts = [text for _, label, rare in triples for text in (rare, label)]
        emb = pipe.encode_text(texts).pooled.astype(jnp.float32)
        base = {
            site.name: subtree(pipe.params["unet"], site.name)["to_v"]["kernel"]
            for site in sites(pipe.unet.config, pipe.latent_shape[:2])
            if site.name.endswith(".attn2")
        }
        config = vmix.VMixConfig(
            labels=triples,
            tokens=pipe.text_length,
            context_dim=emb.shape[-1],
            sites=tuple((name, w.shape[-1]) for name, w in base.items()),
        )
        return cls(config, vmix.init(key, config, emb.reshape(len(triples), 2, -1), base))

    def bind(
        self, pipe: Pipeline, labels: str | Sequence[str] = "all", scale: float | Sequence[float] = 1.0
    ) -> vmix.VMixControl:
        """Return the control for a pipeline: which labels the images have, and how strongly to apply them.

        ``labels`` is "all", "none" or comma-separated dimensions, one string for all images or one an image;
        ``scale`` likewise a number or one an image (0: the base model; the paper shows 0 to 2). Raises `InputError`
        where the adapter does not fit the pipeline.
        """
        found = {
            site.name: subtree(pipe.params["unet"], site.name)["to_v"]["kernel"].shape
            for site in sites(pipe.unet.config, pipe.latent_shape[:2])
            if site.name.endswith(".attn2")
        }
        expected = {name: (self.config.context_dim, inner) for name, inner in self.config.sites}
        if found != expected:
            raise InputError(
                f"VMix: the adapter was made for a UNet with {len(expected)} attn2 of {self.config.context_dim} text "
                f"channels, found one with {len(found)} of {next(iter(found.values()))[0]}"
            )
        if pipe.text_length != self.config.tokens:
            raise InputError(
                f"VMix: the adapter was made for {self.config.tokens} text tokens, the pipeline has {pipe.text_length}"
            )
        present = jnp.asarray(vmix.parse_labels(labels, self.config.dimensions))
        strength = jnp.atleast_1d(jnp.asarray(scale, jnp.float32))
        return vmix.bind(self.params, present, strength)

    def save(self, path: str | Path, dtype: Any = None) -> None:
        """Write the adapter as one safetensors file with its config in the metadata; it appears whole or not at all."""
        config = {"class": "VMix", "version": 1, **dataclasses.asdict(self.config)}
        save_tree(self.params, path, dtype=dtype, metadata={_KEY: json.dumps(config)})

    @classmethod
    def load(cls, path: str | Path) -> VMix:
        """Read an adapter that `save` wrote. Raises `InputError` for a file that is something else."""
        found = read_header(Path(path)).metadata.get(_KEY)
        config = json.loads(found) if found else {}
        if config.get("class") != "VMix":
            kind = config.get("class", "a file without a jaxmix config")
            raise InputError(f"{path}: found {kind}, expected a VMix adapter written by jaxmix")
        made = vmix.VMixConfig(
            labels=tuple(tuple(x) for x in config["labels"]),
            tokens=config["tokens"],
            context_dim=config["context_dim"],
            sites=tuple((name, inner) for name, inner in config["sites"]),
        )
        return cls(made, load_tree(path, vmix.abstract_params(made)))
