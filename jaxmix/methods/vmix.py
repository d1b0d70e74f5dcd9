"""VMix (arXiv 2412.20800) as a method: an adapter made for a pipeline, in one safetensors file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmix.cards import Card, some, weights
from jaxmix.controls import vmix
from jaxmix.methods.lora import LoRA, Merge, apply_loras  # the paper's adapter is trained along with one
from jaxmix.models.clip import at_end_of_text
from jaxmix.models.unet import sites, subtree
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.request import WEIGHTS, Method, Request
from jaxmix.rows import numbers, tile
from jaxmix.tuning.lora import without_alpha
from jaxmix.types import Array, InputError, Params
from jaxmix.weights import load_tree, read_header, save_tree
from jaxmix.weights.files import ASSETS, user_path

EMBEDDED = {"mini-vmix": ASSETS / "mini-vmix" / "adapter.safetensors"}
"""Adapters that come with the package, by name."""

_KEY = "jaxmix"  # of the safetensors metadata, under which the config is stored


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class VMix(Card):
    """A VMix adapter (arXiv 2412.20800): ``config`` says what it was made for, ``params`` is what it has learnt.

    ``lora`` is the LoRA of the UNet that was trained along with it, or None. It is separate: `bind` ignores it,
    `apply_lora` merges it into a pipeline, and its own ``save`` writes it for other programs.
    """

    config: vmix.VMixConfig
    params: Params
    lora: LoRA | None = None

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "dimensions", some(self.config.dimensions)
        yield "for", f"{len(self.config.sites)} attn2 of {self.config.context_dim} text channels"
        yield "weights", weights(self.params)
        if self.lora is not None:
            yield from ((f"lora, {name}", fact) for name, fact in self.lora._facts())

    @classmethod
    def init(cls, key: jax.Array, pipe: Pipeline, labels: Mapping[str, tuple[str, str]] | None = None) -> VMix:
        """Make an untrained adapter for a pipeline; until it is trained it changes nothing, bit for bit.

        ``labels`` maps each aesthetic dimension to (label, rare token); the paper's six dimensions if None. Each text
        goes through the pipeline's text encoders alone, and the state that the UNet would attend to at the end-of-text
        token is kept (SDXL: the penultimate layers of both encoders, joined).
        """
        triples = vmix.label_pairs(labels)
        emb = embed_labels(pipe, [text for _, label, rare in triples for text in (rare, label)])
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

        ``labels`` is "all", "none" or comma-separated dimensions, one string for all images or one per image;
        ``scale`` likewise one number or one per image (0: the base model; the paper shows 0 to 2). Raises `InputError`
        if the adapter does not fit the pipeline.
        """
        self.check(pipe)
        present = jnp.asarray(vmix.parse_labels(labels, self.config.dimensions))
        strength = jnp.atleast_1d(jnp.asarray(scale, jnp.float32))
        return vmix.bind(self.params, present, strength)

    def check(self, pipe: Pipeline) -> None:
        """Raise `InputError` if the adapter does not fit the pipeline's UNet or text length."""
        found = {
            site.name: subtree(pipe.params["unet"], site.name)["to_v"]["kernel"].shape
            for site in sites(pipe.unet.config, pipe.latent_shape[:2])
            if site.name.endswith(".attn2")
        }
        expected = {name: (self.config.context_dim, inner) for name, inner in self.config.sites}
        if found != expected:
            raise InputError(
                f"VMix: found a UNet with {len(found)} attn2 of {next(iter(found.values()))[0]} text channels, "
                f"expected the adapter's {len(expected)} of {self.config.context_dim}"
            )
        if pipe.text_length != self.config.tokens:
            raise InputError(f"VMix: found {pipe.text_length} text tokens, expected the adapter's {self.config.tokens}")

    def on(self, labels: str | Sequence[str] = "all", scale: float | Sequence[float] = 1.0, lora: float = 1.0) -> Mix:
        """Return the method: ``labels`` and ``scale`` as for `bind`, ``lora`` the strength of its own LoRA."""
        return Mix(self, labels, scale, lora)

    def apply_lora(self, pipe: Pipeline, strength: float = 1.0) -> Pipeline:
        """Return the pipeline with the adapter's LoRA merged into its UNet; the same pipeline if there is none."""
        self.check(pipe)
        return pipe if self.lora is None else apply_loras(pipe, [(self.lora, strength)])

    def save(self, path: str | Path, dtype: Any = None) -> None:
        """Write the adapter as one safetensors file with its config in the metadata; it appears whole or not at all.

        The factors of the LoRA are the tensors ``lora.MODULE.down`` and ``.up``; their alphas are in the metadata.
        """
        config = {"class": "VMix", "version": 1, **dataclasses.asdict(self.config)}
        tree = dict(self.params)
        if self.lora is not None:
            factors = self.lora.parts["unet"]
            tree["lora"] = without_alpha(factors)
            config["lora_alpha"] = {name: float(f["alpha"]) for name, f in factors.items()}
        save_tree(tree, path, dtype=dtype, metadata={_KEY: json.dumps(config)})

    @classmethod
    def load(cls, path: str | Path, pipe: Pipeline | None = None) -> VMix:
        """Read an adapter that `save` wrote, or the embedded "mini-vmix".

        Raises `InputError` for any other file, and for an adapter that does not fit ``pipe``; without ``pipe`` that is
        checked when the adapter is applied.
        """
        path = EMBEDDED.get(str(path)) or user_path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file, expected a VMix adapter or one of {', '.join(EMBEDDED)}")
        header = read_header(path)
        made, alphas = _read_config(path, header.metadata)
        target = dict(vmix.abstract_params(made))
        if alphas is not None:
            target["lora"] = {}
            for name in alphas:
                keys = {factor: f"lora.{name}.{factor}" for factor in ("down", "up")}
                if missing := [key for key in keys.values() if key not in header.entries]:
                    raise InputError(f"{path}: found no tensor {missing[0]}, expected it: the metadata has its alpha")
                shapes = {factor: header.entries[key].shape for factor, key in keys.items()}
                target["lora"][name] = {f: jax.ShapeDtypeStruct(shape, jnp.float32) for f, shape in shapes.items()}
        tree = dict(load_tree(path, target))
        factors = tree.pop("lora", None)
        lora = None
        if factors is not None and alphas is not None:
            alpha = {name: jnp.asarray(value, jnp.float32) for name, value in alphas.items()}
            lora = LoRA({"unet": {name: {**f, "alpha": alpha[name]} for name, f in factors.items()}})
        adapter = cls(made, tree, lora)
        if pipe is not None:
            adapter.check(pipe)
        return adapter


@dataclasses.dataclass(frozen=True)
class Mix(Method):
    """A VMix adapter with the labels and strengths of the images; ``lora`` is one strength for all of them."""

    adapter: VMix
    labels: str | Sequence[str] = "all"
    scale: float | Sequence[float] = 1.0
    lora: float = 1.0

    title: ClassVar[str] = "VMix"
    when: ClassVar[int] = WEIGHTS
    per_image: ClassVar[tuple[str, ...]] = ("labels", "scale")

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Refuse an adapter for another model, unknown labels, and strengths that are not numbers."""
        super().check(pipe, request)
        self.adapter.check(pipe)
        vmix.parse_labels(self.labels, self.adapter.config.dimensions)
        numbers("VMix: scale", self.scale, request.n, "prompts")
        if self.adapter.lora is not None:
            Merge(self.adapter.lora, self.lora).check(pipe, request)

    def sketch(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control."""
        return request.add(controls=(self.adapter.bind(pipe, self.labels, self.scale),))

    def apply(self, pipe: Pipeline, request: Request) -> Request:
        """Add the LoRA to the weights and the mixed values to the controls."""
        control = self.adapter.bind(pipe, self.labels, self.scale)
        request = request.add(controls=(tile(control, request.n),))
        if self.adapter.lora is None or self.lora == 0:
            return request
        return request.add(weights=(Merge(self.adapter.lora, self.lora),))


def embed_labels(pipe: Pipeline, texts: Sequence[str]) -> Array:
    """Return (n, d) float32: the states that the UNet attends to at the end-of-text token of each text alone."""
    encoded = pipe.encode_prompt(texts)
    ids, _ = pipe.tokenize(texts)
    return at_end_of_text(pipe.text_encoder.config, ids, encoded.context).astype(jnp.float32)


def _read_config(path: Path, metadata: Mapping[str, str]) -> tuple[vmix.VMixConfig, dict[str, float] | None]:
    """Read an adapter's config, and the alphas of its LoRA (None without one), from a file's metadata."""
    try:
        config = json.loads(metadata.get(_KEY, "{}"))
        kind = config.get("class", "a file without a jaxmix config")
        if kind != "VMix":
            raise InputError(f"{path}: found {kind}, expected a VMix adapter written by jaxmix")
        made = vmix.VMixConfig(
            labels=tuple((str(name), str(label), str(rare)) for name, label, rare in config["labels"]),
            tokens=int(config["tokens"]),
            context_dim=int(config["context_dim"]),
            sites=tuple((str(name), int(inner)) for name, inner in config["sites"]),
        )
        alphas = config.get("lora_alpha")
        return made, None if alphas is None else {name: float(value) for name, value in alphas.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path}: the metadata {_KEY!r} is broken ({why}), expected what VMix.save writes") from None
