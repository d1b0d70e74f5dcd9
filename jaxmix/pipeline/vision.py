"""CLIP's image encoder as one object, with the text encoder of the same CLIP where its folder has one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix import pictures
from jaxmix.cards import Card, weights
from jaxmix.models import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from jaxmix.models.vision import VisionStates
from jaxmix.pipeline.text import encode
from jaxmix.pipeline.tokens import open_tokenizer
from jaxmix.types import AnyArray, InputError, Params, shown
from jaxmix.weights import load_tree
from jaxmix.weights.files import ASSETS, exists, user_path
from jaxmix.weights.vision_files import open_image_encoder, open_text_tower

EMBEDDED = {"mini-clip": ASSETS / "mini-clip"}
"""The CLIP that comes with the package, of the pictures that "mini" draws."""

_AT_ONCE = 8  # pictures whose states stay on the device


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ImageEncoder(Card):
    """A CLIP image encoder: its module, its parameters, and the folder it is from if that may have a text encoder."""

    model: CLIPVisionModel
    params: Params
    folder: Path | None = None

    def _facts(self) -> Iterator[tuple[str, str]]:
        cfg = self.model.config
        yield "pictures", f"{cfg.image_size} x {cfg.image_size} pixels, {cfg.tokens} states of {cfg.hidden_size}"
        yield "weights", weights(self.params)

    @classmethod
    def load(cls, path: str | Path, dtype: Any = jnp.float32) -> ImageEncoder:
        """Read an image encoder: a folder of transformers, a file in its layout or open_clip's, or "mini-clip".

        Raises `InputError` for anything else.
        """
        where = EMBEDDED.get(str(path)) or user_path(path)
        config, source = open_image_encoder(where)
        try:
            model = CLIPVisionModel(CLIPVisionConfig.from_dict(config), dtype=jnp.dtype(dtype))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return cls(model, load_tree(source, model.abstract_params(), dtype), where if where.is_dir() else None)

    def pixels(self, images: Sequence[AnyArray]) -> np.ndarray:
        """Return pictures, uint8 (h, w, 3) each, as the encoder reads them, float32 (n, size, size, 3)."""
        size = self.model.config.image_size
        return np.stack([pictures.clip_pixels(np.asarray(image), size) for image in images])

    def __call__(self, pixels: AnyArray) -> VisionStates:
        """Encode what `pixels` returns, (n, size, size, 3), into arrays of NumPy.

        Each picture by itself: what is seen in one does not depend, to the bit, on those beside it.
        """
        made: list[VisionStates] = []
        for start in range(0, len(pixels), _AT_ONCE):
            stop = min(start + _AT_ONCE, len(pixels))
            made += jax.device_get(
                [_encode(self.model, self.params, np.asarray(pixels[i : i + 1])) for i in range(start, stop)]
            )
        return jax.tree.map(lambda *x: np.concatenate(x), *made)

    def at_once(self, pixels: AnyArray) -> VisionStates:
        """Encode a batch of what `pixels` returns in one call: faster, and the same up to rounding."""
        return jax.device_get(_encode(self.model, self.params, np.asarray(pixels)))

    @functools.cached_property
    def none(self) -> VisionStates:
        """What is seen in no picture: in a grey one, of zeros after CLIP's normalisation."""
        size = self.model.config.image_size
        return self(np.zeros((1, size, size, 3), np.float32))

    def texts(self, phrases: Sequence[str]) -> np.ndarray:
        """Return what the text encoder of the same CLIP says of phrases, its projection (n, p), not normalised.

        It is read at the first call. Raises `InputError` if the encoder is not from the folder of a whole CLIP.
        """
        model, params, tokenizer = self._text
        return np.asarray(encode(tokenizer, model, params, phrases).projected, np.float32)

    @functools.cached_property
    def has_texts(self) -> bool:
        """Whether the encoder is from the folder of a whole CLIP, whose texts are in the space of its pictures."""
        return self.folder is not None and open_text_tower(self.folder) is not None

    @functools.cached_property
    def _text(self) -> tuple[CLIPTextModel, Params, Any]:
        found = None if self.folder is None else open_text_tower(self.folder)
        if found is None or self.folder is None:
            raise InputError(
                f"{self.folder or 'image encoder'}: found no text encoder beside the image encoder, expected the "
                "folder of a whole CLIP (transformers' CLIPModel, with its tokenizer)"
            )
        config, source = found
        try:
            model = CLIPTextModel(CLIPTextConfig.from_dict(config), dtype=self.model.dtype)
        except InputError as error:
            raise InputError(f"{self.folder}: {error}") from None
        params = load_tree(source, model.abstract_params(), self.model.dtype)
        return model, params, open_tokenizer(self.folder)


@functools.partial(jax.jit, static_argnames=("model",))
def _encode(model: CLIPVisionModel, params: Params, pixels: AnyArray) -> VisionStates:
    return model.apply({"params": params}, pixels)


def as_picture(value: Any, where: str) -> np.ndarray:
    """Return a picture as uint8 (h, w, 3): an array uint8 or float in [0, 1], a picture of PIL, or a path.

    Raises `InputError` starting with ``where`` for anything else.
    """
    if isinstance(value, (str, Path)):
        path = user_path(value)
        if not exists(path):
            raise InputError(f"{where}: {value}: no such file, expected a picture")
        try:
            return pictures.read(path)
        except pictures.UnreadableError as error:
            raise InputError(f"{where}: {value}: {error}") from None
    array = np.asarray(value.convert("RGB") if hasattr(value, "convert") else value)
    if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
        raise InputError(f"{where}: found {shown(array.shape)}, expected a picture (height, width, 3)")
    if array.dtype == np.uint8:
        return array
    if not (np.issubdtype(array.dtype, np.floating) and array.min() >= 0 and array.max() <= 1):  # nan is neither
        raise InputError(f"{where}: found {array.dtype} values, expected uint8, or numbers from 0 to 1")
    return np.round(array * 255).astype(np.uint8)


def as_hint(given: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """Return a picture as float32 in [0, 1] at the size of an image (h, w, 3), resized with PIL's Lanczos filter.

    ``given`` is one as for `as_picture`; floats keep their precision. Raises `InputError` for another shape of more
    than two pixels at that size.
    """
    from PIL import Image

    floats = hasattr(given, "dtype") and np.issubdtype(np.asarray(given).dtype, np.floating)
    picture = as_picture(given, where)
    (h, w), (high, wide) = picture.shape[:2], size
    if min(abs(w * high / h - wide), abs(h * wide / w - high)) > 2:
        raise InputError(f"{where}: found {h} x {w} pixels, expected the shape of the image, {high} x {wide}")
    if floats:
        made = np.asarray(given, np.float32)
        if (h, w) == size:
            return made
        bands = [Image.fromarray(made[..., i]) for i in range(3)]
        resized = [np.asarray(band.resize((wide, high), Image.Resampling.LANCZOS)) for band in bands]
        return np.stack(resized, -1).clip(0.0, 1.0)
    if (h, w) != size:
        picture = np.asarray(Image.fromarray(picture).resize((wide, high), Image.Resampling.LANCZOS))
    return picture.astype(np.float32) / 255


def as_mask(given: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """Return a mask of 0 and 1 at the size of an image; raises `InputError` for one of another shape."""
    from PIL import Image

    if isinstance(given, (str, Path)):
        given = as_picture(given, where)[..., 0]
    mask = np.asarray(given.convert("L") if hasattr(given, "convert") else given)
    if mask.ndim != 2 or 0 in mask.shape:
        raise InputError(f"{where}: found shape {mask.shape}, expected (height, width)")
    if abs(mask.shape[0] * size[1] - mask.shape[1] * size[0]) > max(mask.shape) * 2:
        raise InputError(
            f"{where}: found {mask.shape[0]} x {mask.shape[1]}, expected the shape of {size[0]} x {size[1]}"
        )
    grey = mask if mask.dtype == np.uint8 and mask.max() > 1 else np.asarray(mask, np.float32) * 255
    if not (np.min(grey) >= 0 and np.max(grey) <= 255):
        raise InputError(f"{where}: found values from {np.min(mask)} to {np.max(mask)}, expected 0 to 1")
    if mask.shape != size:
        resized = Image.fromarray(np.asarray(grey, np.uint8)).resize((size[1], size[0]), Image.Resampling.LANCZOS)
        grey = np.asarray(resized)
    return (np.asarray(grey, np.float32) / 255 >= 0.5).astype(np.float32)


def shuffled(pixels: np.ndarray, patch: int, rng: np.random.Generator) -> np.ndarray:
    """Return pixels (size, size, c) with their patches in a random order: what an encoder sees without a layout."""
    size, _, c = pixels.shape
    k = size // patch
    patches = pixels.reshape(k, patch, k, patch, c).swapaxes(1, 2).reshape(k * k, patch, patch, c)
    mixed = patches[rng.permutation(k * k)].reshape(k, k, patch, patch, c)
    return mixed.swapaxes(1, 2).reshape(size, size, c)
