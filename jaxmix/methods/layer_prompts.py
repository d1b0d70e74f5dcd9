"""A prompt per layer (P+, arXiv 2303.09522) as a method: patterns of layers and their prompts in, a control out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jaxmix.controls import layer_prompts as maths
from jaxmix.pipeline.blocks import at_sites, attn2_names, layer_names
from jaxmix.pipeline.given import check_prompt
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.request import Method, Request
from jaxmix.pipeline.text import encode_prompts
from jaxmix.types import InputError, shown

Told = tuple[str, int | None]
"""A layer's prompt, and the number of the layer if the prompt names an embedding that has vectors for each."""


@dataclasses.dataclass(frozen=True)
class LayerPrompts(Method):
    """Give layers prompts of their own; see `jaxmix.controls.layer_prompts`.

    ``prompts`` has for each image a mapping from layers to a prompt, {} for none: {"up_blocks.1": "an ink drawing"}.
    Layers are named by a regular expression over the names of attn2, by "style" or "layout" (`jaxmix.IPAdapter.on`), or
    as P+ does ("IN01" ... "MID" ... "OUT11", in models with these 16); of several that name a layer the last counts.
    All other layers attend to the image's own prompt. SDXL's pooled state stays that of the image's own prompt. A word
    that was learnt with vectors for each layer (`Pipeline.with_embedding`) has those of its layer: {".": "a photo of
    <word>"} tells all layers so.
    ``window`` is the share of the steps with layer prompts.
    """

    prompts: Sequence[Mapping[str, str]]
    window: tuple[float, float] = (0.0, 1.0)

    title: ClassVar[str] = "LayerPrompts"
    per_image: ClassVar[tuple[str, ...]] = ("prompts",)

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Refuse lists of other lengths, patterns that name nothing, and prompts that are no text."""
        if isinstance(self.prompts, (str, Mapping)) or len(self.prompts) != request.n:
            raise InputError(
                f"LayerPrompts: prompts: found {shown(self.prompts)}, expected a mapping of layers for each of "
                f"{request.n} images"
            )
        super().check(pipe, request)
        for i, told in enumerate(self.prompts):
            for layer, prompt in _by_layer(pipe, told, f"LayerPrompts: prompts[{i}]").items():
                check_prompt(prompt, request.syntax, f"LayerPrompts: prompts[{i}][{layer!r}]")

    def further_prompts(self, n: int) -> list[list[str]]:
        """Return the layers' prompts of each image."""
        return [list(told.values()) for told in self.prompts]

    def sketch(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control with states of zeros."""
        told = [_told(pipe, x) for x in self.prompts]
        shape = (request.n, self._count(told), request.tokens(pipe), pipe.unet.config.cross_attention_dim)
        return self._add(pipe, request, told, np.zeros(shape, np.float32))

    def apply(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control with the states of the layer prompts."""
        told = [_told(pipe, x) for x in self.prompts]
        distinct = dict.fromkeys(one for layers in told for one in layers.values())
        if not distinct:
            return request
        chunks = request.tokens(pipe) // pipe.text_length
        opened = dict(zip(("tokenizer", "tokenizer_2"), pipe.tokenizers, strict=True))
        found: dict[Told, np.ndarray] = {}
        for layer in dict.fromkeys(layer for _, layer in distinct):
            prompts = [prompt for prompt, of in distinct if of == layer]
            own = pipe
            if layer is not None:
                own = dataclasses.replace(pipe, embeddings=tuple(one.at(layer) for one in pipe.embeddings), **opened)
            encoded = encode_prompts(own, prompts, None, request.reading, chunks).context
            states = np.asarray(encoded.astype(jnp.float32))
            found |= {(prompt, layer): one for prompt, one in zip(prompts, states, strict=True)}
        shape = next(iter(found.values())).shape
        states = np.zeros((request.n, self._count(told), *shape), np.float32)
        for i, layers in enumerate(told):
            for k, one in enumerate(dict.fromkeys(layers.values())):
                states[i, k] = found[one]
        return self._add(pipe, request, told, states)

    def _count(self, told: Sequence[Mapping[str, Told]]) -> int:
        return max((len(set(layers.values())) for layers in told), default=0)

    def _add(self, pipe: Pipeline, request: Request, told: Sequence[Mapping[str, Told]], states: np.ndarray) -> Request:
        """Add the control for prompts by layer; a layer prompt that is the image's own is no other one."""
        named = [name for name in attn2_names(pipe) if any(name in layers for layers in told)]
        if not named:
            return request
        which = {name: np.zeros(request.n, np.int32) for name in named}
        for i, (layers, own) in enumerate(zip(told, request.prompts, strict=True)):
            numbers = {one: k + 1 for k, one in enumerate(dict.fromkeys(layers.values()))}
            for name, one in layers.items():
                which[name][i] = 0 if one == (own, None) else numbers[one]
        return request.add(controls=(maths.bind(states, which, window=self.window),))


def _told(pipe: Pipeline, prompts: Mapping[str, str]) -> dict[str, Told]:
    """Return what each attn2 is told that has a prompt of its own."""
    numbers = {name: k for k, name in enumerate(layer_names(pipe).values())}
    made = _by_layer(pipe, prompts, "LayerPrompts")
    split = {prompt: pipe.has_layers(prompt) for prompt in set(made.values())}
    return {name: (prompt, numbers[name] if split[prompt] else None) for name, prompt in made.items()}


def _by_layer(pipe: Pipeline, told: Mapping[str, str], where: str) -> dict[str, str]:
    """Return the prompt of each attn2 that has one of its own."""
    if not isinstance(told, Mapping):
        raise InputError(f"{where}: found {shown(told)}, expected a mapping from layers to prompts")
    plus = layer_names(pipe)
    made: dict[str, str] = {}
    for pattern, prompt in told.items():
        if not isinstance(prompt, str):
            raise InputError(f"{where}: {shown(pattern)}: found {shown(prompt)}, expected a prompt")
        try:
            found = [plus[pattern]] if pattern in plus else list(at_sites(pipe, pattern))
        except InputError as error:
            raise InputError(f"{where}: {str(error).removeprefix('blocks: ')}") from None
        made |= dict.fromkeys(found, prompt)
    return made
