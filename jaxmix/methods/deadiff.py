"""DEADiff (arXiv 2403.06951) as a method: the authors' checkpoint, and a picture for style, content, or each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix import pictures
from jaxmix.cards import Card, weights
from jaxmix.controls import deadiff as maths
from jaxmix.models import CLIPVisionConfig, CLIPVisionModel
from jaxmix.models.unet import subtree
from jaxmix.pipeline.blocks import at_sites, attn2_names
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.references import One, name_of, per_image, remember
from jaxmix.pipeline.request import Method, Request
from jaxmix.pipeline.vision import ImageEncoder, as_picture
from jaxmix.rows import numbers
from jaxmix.types import AnyArray, Array, InputError, Params
from jaxmix.weights import load_tree
from jaxmix.weights.deadiff_files import open_deadiff, open_slot_encoder, read_layers, read_slot
from jaxmix.weights.files import user_path


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DEADiff(Card):
    """DEADiff: ``readers`` makes the tokens of "style" and "content", ``layers`` has every attn2's {"to_k", "to_v"}.

    ``slots`` says which of the two an attn2 sees, and ``encoders`` which image encoder each reads with.
    """

    readers: Mapping[str, Params]
    layers: Mapping[str, Params]
    encoders: Mapping[str, ImageEncoder]
    slots: Mapping[str, str]
    where: str = "DEADiff"

    def _facts(self) -> Iterator[tuple[str, str]]:
        seen, context = maths.widths(self.readers["style"])
        yield "for", f"{len(self.layers)} attn2 of {context} text channels, CLIP's states of {seen}"
        yield "content", ", ".join(name.split(".transformer")[0] for name, s in self.slots.items() if s == "content")
        yield "weights", weights({"readers": self.readers, "layers": self.layers})

    @classmethod
    def load(cls, path: str | Path, pipe: Pipeline, content_layers: str = maths.CONTENT) -> DEADiff:
        """Read the authors' checkpoint, converted to ``.safetensors``, for a Stable Diffusion 1.x pipeline.

        What it holds is known from the authors' code; the file itself was not at hand. ``content_layers`` is a pattern
        of the attn2 that see the content (`jaxmix.IPAdapter.on`), the authors' by default; all others see the style.
        Raises `InputError` for any other file, a pickle with the command that converts it, and another base.
        """
        file = open_deadiff(user_path(path))
        names = attn2_names(pipe)
        layers = read_layers(file, pipe.unet.config.to_dict(), names)
        readers, encoders = {}, {}
        for slot in maths.SLOTS:
            held = read_slot(file, slot, maths.WORD_IDS[slot])
            readers[slot] = _reader(held)
            encoders[slot] = _encoder(file, slot)
        try:
            content = at_sites(pipe, content_layers)
        except InputError as error:
            raise InputError(f"DEADiff: content_layers: {str(error).removeprefix('blocks: ')}") from None
        slots = {name: "content" if name in content else "style" for name in names}
        made = cls(readers, jax.tree.map(jnp.asarray, layers), encoders, slots, file.where)
        made.check(pipe)
        return made

    def check(self, pipe: Pipeline) -> None:
        """Raise `InputError` if the checkpoint does not fit the pipeline, or lacks something."""
        for name in attn2_names(pipe):
            expected = subtree(pipe.params["unet"], name)["to_k"]["kernel"].shape
            found = tuple(self.layers[name]["to_k"]["kernel"].shape) if name in self.layers else None
            if found != expected:
                raise InputError(f"{self.where}: its {name} has {found}, expected {expected}; for another base?")
        for slot, reader in self.readers.items():
            states, context = self.encoders[slot].model.config.hidden_size, pipe.unet.config.cross_attention_dim
            try:
                wanted = jax.ShapeDtypeStruct((1, 2, states), jnp.float32)
                found = jax.eval_shape(maths.tokens_of, reader, wanted).shape[-1]
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(
                    f"{self.where}: {slot}_blip: {str(error).splitlines()[0]}: expected all tensors of its Q-Former "
                    "and projection, that fit each other"
                ) from None
            if found != context:
                raise InputError(f"{self.where}: its tokens have {found} channels, expected the {context} of the text")

    def see(self, slot: str, picture: Any, where: str = "picture") -> Array:
        """Return the tokens (t, c) of a picture for "style" or "content"; the picture is squashed to CLIP's square."""
        encoder = self.encoders[slot]
        pixels = pictures.clip_pixels(as_picture(picture, where), encoder.model.config.image_size, squash=True)
        return _tokens(self.readers[slot], encoder(pixels[None]).last_hidden_state)[0]

    def on(
        self,
        style: Any = None,
        content: Any = None,
        scale: float | Sequence[float] = 1.0,
        window: tuple[float, float] = (0.0, 1.0),
    ) -> Disentangled:
        """Return the method that takes the style of pictures, their content, or both.

        ``style`` and ``content`` are a picture for all images or a list of one (or None) per image. ``scale`` (1 in the
        authors' code, 0 is the base, bit for bit) is a number or one per image; ``window`` is the share of the steps.
        """
        style, content = (One(x) if getattr(x, "ndim", 0) == 3 else x for x in (style, content))
        return Disentangled(self, style, content, scale, window)


@dataclasses.dataclass(frozen=True, eq=False)
class Disentangled(Method):
    """DEADiff with the pictures of the images; see `DEADiff.on`."""

    adapter: DEADiff
    style: Any = None
    content: Any = None
    scale: float | Sequence[float] = 1.0
    window: tuple[float, float] = (0.0, 1.0)

    title: ClassVar[str] = "DEADiff"
    per_image: ClassVar[tuple[str, ...]] = ("style", "content", "scale")

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Refuse another model's checkpoint, pictures that cannot be read, and lists of other lengths."""
        super().check(pipe, request)
        self.adapter.check(pipe)
        numbers("DEADiff: scale", self.scale, request.n, "prompts", least=0)
        if self.style is None and self.content is None:
            raise InputError("DEADiff: found neither a style nor a content, expected a picture for one of them")
        for slot in maths.SLOTS:
            for i, one in enumerate(per_image(getattr(self, slot), request.n)):
                if one is not None:
                    as_picture(one.picture if isinstance(one, One) else one, f"DEADiff: {slot}[{i}]")

    def sketch(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control with tokens of zeros."""
        zeros = np.stack([np.zeros(self._shape(slot), np.float32) for slot in maths.SLOTS])
        tokens = {slot: np.tile(x, (request.n, 1, 1)) for slot, x in zip(maths.SLOTS, zeros, strict=True)}
        return self._add(pipe, request, tokens)

    def apply(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control with the tokens of the pictures; a slot without one has tokens of zeros."""
        tokens = {}
        for slot in maths.SLOTS:
            zeros = jnp.zeros(self._shape(slot))
            given = per_image(getattr(self, slot), request.n)
            made = [zeros if one is None else self._seen(slot, one, i) for i, one in enumerate(given)]
            tokens[slot] = jnp.stack(made).astype(pipe.unet.dtype)
        return self._add(pipe, request, tokens)

    def _shape(self, slot: str) -> tuple[int, int]:
        _, count, width = self.adapter.readers[slot]["qformer"]["query_tokens"].shape
        return count, width

    def _add(self, pipe: Pipeline, request: Request, tokens: Mapping[str, AnyArray]) -> Request:
        scale = np.asarray(numbers("DEADiff: scale", self.scale, request.n, "prompts", least=0), np.float32)
        adapter = self.adapter
        return request.add(
            controls=(maths.bind(adapter.layers, tokens, adapter.slots, scale=scale, window=self.window),)
        )

    def _seen(self, slot: str, given: Any, i: int) -> Array:
        """Return the tokens of a picture, made once for each file."""
        picture = given.picture if isinstance(given, One) else given
        kept = self.adapter.__dict__.setdefault("_kept", {})
        key = (slot, name_of(picture))
        if key[1] is not None and key in kept:
            return kept[key]
        made = self.adapter.see(slot, picture, f"DEADiff: {slot}[{i}]")
        return made if key[1] is None else remember(kept, key, made)


@functools.partial(jax.jit)
def _tokens(params: Params, states: AnyArray) -> Array:
    return maths.tokens_of(params, states)


def _reader(held: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Return a slot's parameters from its tensors."""
    alone = {name: jnp.asarray(held["qformer"][name]) for name in ("query_tokens", "words")}
    rest = {name: array for name, array in held["qformer"].items() if name not in alone}
    norm = maths.as_parameters(held["ln_vision"]).get("ln_vision", {})
    return {
        "ln_vision": norm,
        "qformer": {**maths.as_parameters(rest), **alone},
        "proj": maths.as_parameters(held["proj"]),
    }


def _encoder(file: Any, slot: str) -> ImageEncoder:
    """Return a slot's image encoder; the norm after its layers, which the file lacks and nothing reads, is the unit."""
    config, source = open_slot_encoder(file, slot)
    model = CLIPVisionModel(CLIPVisionConfig.from_dict(config))
    wanted = model.abstract_params()
    tower = {name: leaf for name, leaf in wanted["vision_model"].items() if name != "post_layernorm"}
    params = load_tree(source, {"vision_model": tower})
    ones = jnp.ones(model.config.hidden_size)
    return ImageEncoder(
        model, {"vision_model": {**params["vision_model"], "post_layernorm": {"scale": ones, "bias": 0 * ones}}}
    )
