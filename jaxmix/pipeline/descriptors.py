"""What pictures are like, as unit vectors: the encoders of guidance, and how latents are seen with a gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxmix.cards import Card
from jaxmix.models import AutoencoderKL, CLIPVisionConfig, CLIPVisionModel
from jaxmix.pictures import CLIP_MEAN, CLIP_STD
from jaxmix.pipeline.parts import Parts
from jaxmix.pipeline.vision import ImageEncoder
from jaxmix.rows import dataclass, static
from jaxmix.types import AnyArray, Array, InputError, Params, shown
from jaxmix.weights import load_tree
from jaxmix.weights.csd_files import open_csd
from jaxmix.weights.files import user_path

_LARGE = 512 * 512  # pixels from which images are seen one at a time: the gradient of one fills a device


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CSD(Card):
    """Contrastive Style Descriptors (arXiv 2404.01292): an image encoder, and what makes style and content of it.

    ``heads`` {"style", "content"} are matrices (hidden size, p) on the encoder's pooled state.
    """

    image_encoder: ImageEncoder
    heads: Mapping[str, Array]

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield from self.image_encoder._facts()
        yield "style, content", f"{self.heads['style'].shape[1]} channels each"

    @classmethod
    def load(cls, path: str | Path, dtype: Any = jnp.float32) -> CSD:
        """Read the authors' checkpoint, converted to ``.safetensors``.

        What it holds is known from the authors' code; the file itself was not at hand. Raises `InputError` for any
        other file, and a pickle with the command that converts it.
        """
        where = user_path(path)
        config, source, heads = open_csd(where)
        try:
            model = CLIPVisionModel(CLIPVisionConfig.from_dict(config), dtype=jnp.dtype(dtype))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        params = load_tree(source, model.abstract_params(), dtype)
        return cls(ImageEncoder(model, params), {name: jnp.asarray(x) for name, x in heads.items()})


@dataclass
class Eye:
    """How scaled latents look: decoded and described in float32, all of it differentiable."""

    vae: AutoencoderKL = static()
    model: CLIPVisionModel = static()
    vae_params: Params
    params: Params
    heads: Mapping[str, Array] | None = None

    def __call__(self, latents: Float[Array, "n h w c"]) -> tuple[Float[Array, "n p"], Float[Array, "n p"]]:
        """Return the unit vectors of style and of content of latents as they would be drawn.

        Pictures are cut to [0, 1] and resized without antialiasing and without a cut: a picture that is not square is
        seen out of shape.
        """
        z = latents.astype(jnp.float32) / self.vae.config.scaling_factor
        images = jnp.clip(self.vae.apply({"params": self.vae_params}, z, method="decode") / 2 + 0.5, 0.0, 1.0)
        return self.describe(seen_pixels(images, self.model.config.image_size))

    def describe(self, pixels: Float[AnyArray, "n s s 3"]) -> tuple[Float[Array, "n p"], Float[Array, "n p"]]:
        """Return the unit vectors of style and of content of pixels as the encoder reads them."""
        states = self.model.apply({"params": self.params}, pixels)
        if self.heads is None:
            found = _unit(states.projected)
            return found, found
        return _unit(states.pooled @ self.heads["style"]), _unit(states.pooled @ self.heads["content"])

    def large(self, hw: tuple[int, int]) -> bool:
        """Return whether images of latents of that size are to be seen one at a time."""
        return hw[0] * hw[1] * self.vae.config.factor**2 >= _LARGE


def eye_of(parts: Parts, encoder: Any, where: str) -> Eye:
    """Return the eye of a pipeline with an image encoder or a `CSD`.

    Raises `InputError` starting with ``where`` for anything else, and for an encoder that gives no vector.
    """
    if not isinstance(encoder, (ImageEncoder, CSD)):
        raise InputError(f"{where}: found {shown(encoder)}, expected an ImageEncoder or a CSD")
    inner = encoder.image_encoder if isinstance(encoder, CSD) else encoder
    heads = encoder.heads if isinstance(encoder, CSD) else None
    if heads is None and not inner.model.config.projection:
        raise InputError(f"{where}: found an image encoder without a projection, expected one that has it, or a CSD")
    if parts.vae.config.out_channels != 3:
        raise InputError(f"{where}: images of {parts.vae.config.out_channels} channels, expected 3 to look at")
    vae, model = parts.vae.clone(dtype=jnp.float32), inner.model.clone(dtype=jnp.float32)
    return Eye(vae, model, parts.params["vae"], inner.params, heads)


def seen_pixels(images: Float[AnyArray, "n h w 3"], size: int) -> Float[Array, "n s s 3"]:
    """Return images in [0, 1] as CLIP reads them, resized bilinearly to a square without antialiasing."""
    x = jax.image.resize(images, (images.shape[0], size, size, 3), "bilinear", antialias=False)
    return (x - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)


@jax.jit
def described(eye: Eye, pixels: AnyArray) -> tuple[Array, Array]:
    """Return `Eye.describe` of references, compiled."""
    return eye.describe(jnp.asarray(pixels))


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
