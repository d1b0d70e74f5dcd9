"""IP-Adapter (arXiv 2308.06721) as a method: an adapter file, pictures per image, and the blocks that listen."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.cards import Card, weights
from jaxmix.controls import ip_adapter as maths
from jaxmix.models.unet import sites, subtree
from jaxmix.pipeline.blocks import Blocks, at_sites, attn2_names
from jaxmix.pipeline.embedded import Embeddings, Takes
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.references import One, name_of, per_image, remember, several
from jaxmix.pipeline.request import Method, Request, is_list
from jaxmix.pipeline.vision import ImageEncoder, as_mask, as_picture
from jaxmix.rows import numbers, tile
from jaxmix.types import AnyArray, InputError, Params, shown
from jaxmix.weights.files import ASSETS, path_here, user_path
from jaxmix.weights.ip_adapter_files import read_ip_adapter, write_ip_adapter

PLACES = {name: ASSETS / name / "ip_adapter.safetensors" for name in ("mini-ip", "mini-ip-plus")}
EMBEDDED = {name: path for name, path in PLACES.items() if path.is_file()}
"""Adapters that come with the package, by name; their image encoder is "mini-clip"."""

_ENCODERS = {1024: "ViT-H/14", 1280: "ViT-bigG/14", 768: "ViT-L/14"}  # by the width of the projection


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class IPAdapter(Card):
    """An IP-Adapter: ``kind`` "base", "plus" or "full", its projection and its layers by the names of their sites."""

    kind: str
    projection: Params
    layers: Mapping[str, Params]
    image_encoder: ImageEncoder | None = None
    where: str = "IP-Adapter"

    def _facts(self) -> Iterator[tuple[str, str]]:
        seen, context = maths.widths(self.kind, self.projection)
        yield "kind", f"{self.kind}, {maths.tokens_of(self.kind, self.projection)} tokens a picture"
        yield "for", f"{len(self.layers)} attn2 of {context} text channels, CLIP of {seen}"
        yield "weights", weights({"projection": self.projection, "layers": self.layers})

    @classmethod
    def init(
        cls, key: jax.Array, pipe: Pipeline, image_encoder: ImageEncoder, kind: str = "base", tokens: int | None = None
    ) -> IPAdapter:
        """Make an untrained adapter for a pipeline and an image encoder, as the authors start theirs.

        Its keys and values of pictures are copies of those of the text; ``tokens`` is 4 for "base" and 16 for "plus"
        if None.
        """
        if kind not in maths.KINDS:
            raise InputError(f"IP-Adapter: kind: found {shown(kind)}, expected one of {', '.join(maths.KINDS)}")
        seen, context = image_encoder.model.config, pipe.unet.config.cross_attention_dim
        width = seen.projection_dim if kind == "base" else seen.hidden_size
        base = {name: subtree(pipe.params["unet"], name) for name in attn2_names(pipe)}
        layers = {
            name: {x: {"kernel": jnp.array(old[x]["kernel"], jnp.float32)} for x in ("to_k", "to_v")}
            for name, old in base.items()
        }
        return cls(kind, maths.init_projection(key, kind, width, context, tokens), layers, image_encoder)

    @classmethod
    def load(
        cls, path: str | Path, pipe: Pipeline, image_encoder: ImageEncoder | str | Path | None = None
    ) -> IPAdapter:
        """Read an adapter file for a pipeline.

        The published files as ``.safetensors``, training checkpoints, UNets that diffusers saved with an adapter, or
        one of `EMBEDDED`, which come with their encoder. Files hold no image encoder:
        ``image_encoder`` is one, or the folder or file of one; without it pictures cannot be read, only `Embeddings` of
        them. Raises `InputError` for any other file (with the command that converts a pickle), FaceID, and an adapter
        or encoder for another base.
        """
        where, names = EMBEDDED.get(str(path)) or user_path(path), attn2_names(pipe)
        if image_encoder is None and str(path) in EMBEDDED:
            image_encoder = "mini-clip"
        kind, projection, layers = read_ip_adapter(where, names)
        tree = maths.as_parameters(projection)
        try:
            _, context = maths.widths(kind, tree)
            maths.tokens_of(kind, tree)
        except (KeyError, IndexError) as error:
            raise InputError(f"{where}: its projection has no {error}, expected all tensors of a {kind} one") from None
        if isinstance(image_encoder, (str, Path)):
            image_encoder = ImageEncoder.load(image_encoder, pipe.unet.dtype)
        params = jax.tree.map(jnp.asarray, {"projection": tree, "layers": layers})
        made = cls(kind, params["projection"], params["layers"], image_encoder, str(where))
        made.check(pipe)
        if context != pipe.unet.config.cross_attention_dim:
            raise InputError(
                f"{where}: its tokens have {context} channels, expected the {pipe.unet.config.cross_attention_dim} of "
                "this model's text; an adapter for another base?"
            )
        return made

    def save(self, path: str | Path, dtype: Any = None) -> None:
        """Write the adapter in the layout of the published files, which diffusers loads; ``dtype`` casts it."""
        write_ip_adapter(path_here(path), self.projection, self.layers, dtype)

    def check(self, pipe: Pipeline) -> None:
        """Raise `InputError` if the adapter does not fit the pipeline, or its encoder not the adapter."""
        expected = {}
        for name in attn2_names(pipe):
            expected[name] = subtree(pipe.params["unet"], name)["to_k"]["kernel"].shape
        found = {name: tuple(layer["to_k"]["kernel"].shape) for name, layer in self.layers.items()}
        if found != expected or any(
            layer["to_v"]["kernel"].shape != expected[name] for name, layer in self.layers.items()
        ):
            odd = next((name for name in expected if found.get(name) != expected[name]), next(iter(expected)))
            raise InputError(
                f"{self.where}: its {odd} has {found.get(odd, 'no layer')}, expected {expected[odd]}; an adapter for "
                "another base?"
            )
        if self.image_encoder is not None:
            self.takes.check(self.image_encoder)

    @property
    def takes(self) -> Takes:
        """What the adapter takes of CLIP."""
        width, _ = maths.widths(self.kind, self.projection)
        return Takes("projected" if self.kind == "base" else "penultimate", width, self.where, self.needs)

    @property
    def needs(self) -> str:
        """The image encoder that the adapter was trained with, as far as widths tell it."""
        wanted, _ = maths.widths(self.kind, self.projection)
        if self.kind == "base":
            return f"{_ENCODERS.get(wanted, 'an image encoder')} (its projection of {wanted})"
        named = {1280: "ViT-H/14", 1664: "ViT-bigG/14", 1024: "ViT-L/14"}.get(wanted, "an image encoder")
        return f"{named} (its states of {wanted})"

    def needs_encoder(self) -> ImageEncoder:
        """Return the image encoder; raises `InputError` that says which one the adapter needs if there is none."""
        if self.image_encoder is None:
            raise InputError(
                f"{self.where}: an adapter file holds no image encoder, expected {self.needs}: image_encoder= "
                "(--image-encoder) names its folder or file"
            )
        self.takes.check(self.image_encoder)
        return self.image_encoder

    def embed(self, pictures: Sequence[Any], negative: Any = None) -> Embeddings:
        """Return what CLIP sees in pictures (paths, arrays or PIL's), and in ``negative``, no picture if None.

        Raises `InputError` without an image encoder, and for what is no picture.
        """
        encoder, output = self.needs_encoder(), self.takes.output
        seen = encoder(encoder.pixels([as_picture(x, f"pictures[{i}]") for i, x in enumerate(pictures)]))
        if negative is not None:
            states = encoder(encoder.pixels([as_picture(negative, "negative")]))
        else:
            states = encoder.none
        shown_to, none = (np.asarray(getattr(x, output), np.float32) for x in (seen, states))
        return Embeddings(shown_to, np.zeros_like(none[0]) if self.kind == "base" and negative is None else none[0])

    def on(
        self,
        pictures: Any,
        scale: float | Sequence[Any] = 1.0,
        *,
        blocks: Blocks = None,
        masks: Sequence[Any] | None = None,
        negative: Any = None,
        subtract: Any = None,
        subtract_scale: float | Sequence[float] = 1.0,
        window: tuple[float, float] = (0.0, 1.0),
    ) -> Look:
        """Return the method that shows pictures to the model.

        ``pictures`` is one for all images, or a list of one entry per image, each a picture or a list of several; or
        `Embeddings` likewise, of one entry per image, or with one for all. Several pictures of an image share one
        softmax; with ``masks`` (per image as many as pictures, each (H, W) with 1 where its picture is seen) each has
        its own. ``scale`` is a number or one per image, with masks also a list per image: 0 is the base, bit for bit.
        ``blocks`` are those that listen: "style", "layout" or "style+layout" (InstantStyle, arXiv 2404.02733), a
        regular expression over the names of attn2, or diffusers' dictionary ({"up": {"block_0": [0.0, 1.0, 0.0]}},
        where what is not named gets 0). ``negative`` is a picture for the unconditional branch. ``subtract`` is what to
        take out of the pictures, ``subtract_scale`` times, in CLIP's projection and so with "base" adapters only
        (InstantStyle, section 3.3): a phrase or one per image, where the image encoder is from the folder of a whole
        CLIP or the pipeline has its text encoder (SDXL with ViT-bigG); or CLIP's projection of it, (p,) or one per
        image; None for an image of which nothing is. ``window`` is the share of the steps
        in which the pictures are seen.
        """
        if getattr(pictures, "ndim", 0) == 4:
            pictures = list(pictures)
        elif hasattr(pictures, "ndim"):
            pictures = One(pictures)  # an array, which is no list of images
        if getattr(subtract, "ndim", 0) == 2:
            subtract = list(subtract)
        elif hasattr(subtract, "ndim"):
            subtract = One(subtract)
        return Look(self, pictures, scale, blocks, masks, negative, subtract, subtract_scale, window)


@dataclasses.dataclass(frozen=True, eq=False)
class Look(Method):
    """An IP-Adapter with the pictures of the images; see `IPAdapter.on`."""

    adapter: IPAdapter
    pictures: Any
    scale: float | Sequence[Any] = 1.0
    blocks: Blocks = None
    masks: Sequence[Any] | None = None
    negative: Any = None
    subtract: Any = None
    subtract_scale: float | Sequence[float] = 1.0
    window: tuple[float, float] = (0.0, 1.0)

    title: ClassVar[str] = "IP-Adapter"
    per_image: ClassVar[tuple[str, ...]] = ("pictures", "scale", "masks", "subtract", "subtract_scale")

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Refuse another model's adapter, pictures that cannot be read, and lists of other lengths."""
        super().check(pipe, request)
        self.adapter.check(pipe)
        try:
            at_sites(pipe, self.blocks)
        except InputError as error:
            raise InputError(f"IP-Adapter: {error}") from None
        shown_to = per_image(self.pictures, request.n)
        counts = {_count(x) for x in shown_to}
        if len(counts) > 1 or 0 in counts:
            raise InputError(f"IP-Adapter: found {sorted(counts)} pictures an image, expected as many for each")
        self._scales(request.n, counts.pop())
        self._content(pipe, request.n)
        for i, x in enumerate(shown_to):
            if self.adapter.image_encoder is None and not isinstance(x, Embeddings):
                self.adapter.needs_encoder()
            for j, one in enumerate(several(x)):
                if isinstance(one, Embeddings):
                    one.check(self.adapter.takes, f"IP-Adapter: pictures[{i}]")
                else:
                    as_picture(one, f"pictures[{i}][{j}]")
        if self.masks is not None:
            self._masks(pipe, request)

    def sketch(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control with tokens of zeros."""
        m, n = _count(per_image(self.pictures, request.n)[0]), request.n
        made = (1, m, maths.tokens_of(self.adapter.kind, self.adapter.projection), pipe.unet.config.cross_attention_dim)
        zeros = jnp.zeros(made)
        masks = None if self.masks is None else {k: x[:1] for k, x in self._masks(pipe, request).items()}
        control = maths.bind(
            self.adapter.layers,
            zeros,
            zeros,
            scale=np.zeros((1, m)),
            at_site=at_sites(pipe, self.blocks),
            masks=masks,
            window=self.window,
        )
        return request.add(controls=(tile(control, n),))

    def apply(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control with the tokens of the pictures."""
        n = request.n
        found = [self._seen(x) for x in per_image(self.pictures, n)]
        shown_to = np.stack([x.shown for x in found])  # (n, m, ...)
        none = np.stack([np.broadcast_to(x.none, x.shown.shape) for x in found])
        if (content := self._content(pipe, n)) is not None:
            shown_to = shown_to - content[:, None]
        tokens, empty = (self._tokens(pipe, x) for x in (shown_to, none))
        control = maths.bind(
            self.adapter.layers,
            tokens,
            empty,
            scale=self._scales(n, shown_to.shape[1]),
            at_site=at_sites(pipe, self.blocks),
            masks=None if self.masks is None else self._masks(pipe, request),
            window=self.window,
        )
        return request.add(controls=(control,))

    def _tokens(self, pipe: Pipeline, seen: np.ndarray) -> Any:
        n, m = seen.shape[:2]
        made = _project(self.adapter.kind, self.adapter.projection, seen.reshape(n * m, *seen.shape[2:]))
        return made.reshape(n, m, *made.shape[1:]).astype(pipe.unet.dtype)

    def _seen(self, given: Any) -> Embeddings:
        """Return one image's pictures as CLIP sees them, each encoded once."""
        if isinstance(given, Embeddings):
            return given
        kept = self.adapter.__dict__.setdefault("_kept", {})
        shown_to = list(several(given))
        key = tuple(name_of(x) for x in (*shown_to, self.negative))
        if None in key or key not in kept:
            made = self.adapter.embed(shown_to, self.negative)
            return made if None in key else remember(kept, key, made)
        return kept[key]

    def _scales(self, n: int, m: int) -> np.ndarray:
        """Return the scale of each picture, (n, m)."""
        given = self.scale
        rows: list[Any] = list(given) if is_list(given) else [given] * n  # type: ignore[arg-type]
        try:
            made = np.stack([np.broadcast_to(np.asarray(row, np.float32), (m,)) for row in rows])
        except (TypeError, ValueError, OverflowError):
            raise InputError(
                f"IP-Adapter: scale: found {shown(given)}, expected a number, one per image, or a list of {m} per image"
            ) from None
        if len(made) != n or not np.isfinite(made).all():
            raise InputError(f"IP-Adapter: scale: found {shown(given)}, expected finite numbers for {n} images")
        if self.masks is None and (made != made[:, :1]).any():
            raise InputError("IP-Adapter: scale: found one per picture, which share a softmax, expected masks with it")
        return made

    def _content(self, pipe: Pipeline, n: int) -> np.ndarray | None:
        """Return what is subtracted from each image's pictures, (n, p), None if nothing is."""
        if self.subtract is None:
            return None
        kind, (width, _) = self.adapter.kind, maths.widths(self.adapter.kind, self.adapter.projection)
        if kind != "base":
            raise InputError(
                f"IP-Adapter: subtract: found a {kind} adapter, which reads no projection, expected a base one"
            )
        scale = numbers("IP-Adapter: subtract_scale", self.subtract_scale, n, "prompts")
        rows = [x.picture if isinstance(x, One) else x for x in per_image(self.subtract, n)]
        phrases = list(dict.fromkeys(x for x in rows if isinstance(x, str)))
        told = dict(zip(phrases, self._said(pipe, phrases, width), strict=True)) if phrases else {}
        none = np.zeros(width, np.float32)
        made = [told[x] if isinstance(x, str) else none if x is None else np.asarray(x, np.float32) for x in rows]
        if wrong := [x.shape for x in made if x.shape != (width,)]:
            raise InputError(f"IP-Adapter: subtract: found shape {wrong[0]}, expected ({width},)")
        return np.stack(made).astype(np.float32) * scale[:, None]

    def _said(self, pipe: Pipeline, phrases: Sequence[str], width: int) -> np.ndarray:
        """Return the projections of phrases in the space of the adapter's CLIP, (n, p)."""
        encoder, second = self.adapter.image_encoder, pipe.text_encoder_2
        if encoder is not None and encoder.has_texts:
            return encoder.texts(phrases)
        if second is None or not second.config.projection or second.config.projection_dim != width:
            raise InputError(
                f"IP-Adapter: subtract: found {shown(phrases[0])}, but no text encoder of {width} channels beside "
                f"{self.adapter.needs}, expected an image encoder from the folder of its whole CLIP, or CLIP's "
                f"projection of the phrase, ({width},)"
            )
        return np.asarray(pipe.encode_prompt(phrases).pooled)

    def _masks(self, pipe: Pipeline, request: Request) -> dict[str, np.ndarray]:
        """Return the masks at every grid, (n, m, cells)."""
        assert self.masks is not None and request.height is not None and request.width is not None
        size = (request.height, request.width)
        made = []
        for i, (given, seen) in enumerate(zip(self.masks, per_image(self.pictures, request.n), strict=True)):
            held = list(given) if isinstance(given, (list, tuple)) else [given]
            if len(held) != _count(seen):
                raise InputError(f"IP-Adapter: masks[{i}]: found {len(held)}, expected one for each of {_count(seen)}")
            made.append(np.stack([as_mask(x, size, f"IP-Adapter: masks[{i}]") for x in held]))
        factor = pipe.vae.config.factor
        grids = sorted({site.hw for site in sites(pipe.unet.config, (size[0] // factor, size[1] // factor))})
        return maths.mask_grids(np.stack(made), grids)


@functools.partial(jax.jit, static_argnames=("kind",))
def _project(kind: str, params: Params, seen: AnyArray) -> Any:
    return maths.project(kind, params, jnp.asarray(seen))


def _count(given: Any) -> int:
    return len(given.shown) if isinstance(given, Embeddings) else len(several(given))
