"""What callers give in the forms that the pipeline takes: prompts, seeds, pictures, masks.

Whatever has one plain meaning is accepted; anything else is an `InputError` that names the argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmix.control import Control
from jaxmix.pipeline.prompt_syntax import parse
from jaxmix.samplers import seed_array
from jaxmix.types import InputError, shown, whole

_SLACK = 0.05  # by which a resized picture may overshoot its range


def prompt_list(value: Any) -> list[str]:
    """Return a prompt, or a sequence of them, as a list of at least one."""
    made = [value] if isinstance(value, str) else _listed(value)
    if not made:
        raise InputError(f"prompts: found {shown(value)}, expected a list of at least one prompt")
    return [_text(f"prompts[{i}]", text) for i, text in enumerate(made)]


def text_list(name: str, value: Any, n: int) -> list[str | None]:
    """Return a text for all images, or one each, in which None may stand for none at all, as a list of ``n``."""
    made = [value] * n if value is None or isinstance(value, str) else _listed(value)
    _one_each(name, made, value, n)
    return [None if text is None else _text(f"{name}[{i}]", text) for i, text in enumerate(made or [])]


def seed_list(value: Any, n: int) -> list[int]:
    """Return one seed per image, or one number from which they count up, as a list of ``n``; from 0 if None."""
    if value is None:
        return list(range(n))
    made = _listed(value)
    if made is None:
        first = whole("seeds", value, 0)
        made = list(range(first, first + n))
    _one_each("seeds", made, value, n)
    seed_array(made)
    return [whole("seeds", seed) for seed in made]


def check_words(
    two_encoders: bool,
    syntax: str,
    named: Mapping[str, Sequence[str | None]],
    seconds: Sequence[Sequence[str | None] | None],
) -> None:
    """Raise `InputError`, naming the image, for a prompt whose weights cannot be read, or that no encoder reads.

    ``seconds`` are the texts for a second text encoder in place of the ``named`` ones.
    """
    if not two_encoders and any(text is not None for texts in seconds for text in texts or ()):
        raise InputError("prompts_2: found some, but the model has one text encoder, expected none")
    for name, texts in (*named.items(), *zip((f"{name}_2" for name in named), seconds, strict=True)):
        for i, text in enumerate(texts or ()):
            check_prompt(text or "", syntax, f"{name}[{i}]")


def check_prompt(prompt: str, syntax: str, where: str) -> None:
    """Raise `InputError`, which says ``where``, for a prompt whose weights cannot be read."""
    try:
        parse(prompt, syntax)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def control_tuple(controls: Any) -> tuple[Control, ...]:
    """Return controls, or a single one, as a tuple."""
    for control in (controls,) if isinstance(controls, Control) or not hasattr(controls, "__iter__") else controls:
        if not isinstance(control, Control):
            raise InputError(f"controls: found {type(control).__name__}, expected Control objects")
    return (controls,) if isinstance(controls, Control) else tuple(controls)


def pictures(name: str, value: Any, n: int | None = None) -> np.ndarray:
    """Return pictures (n, H, W, 3) as uint8, or as float32 in [0, 1]; one picture alone may lack the first axis."""
    found = _numbers(name, value)
    if found.ndim == 3 and n in (None, 1):
        found = found[None]
    if found.ndim != 4 or found.shape[-1] != 3 or (n is not None and len(found) != n):
        raise InputError(f"{name}: found shape {np.shape(value)}, expected ({'n' if n is None else n}, H, W, 3)")
    return found


def mask_values(name: str, value: Any) -> np.ndarray:
    """Return masks of any shape as uint8, or as float32 in [0, 1]. Whole numbers up to 1 are 0 and 1, not bytes."""
    found = _numbers(name, value)
    return found.astype(np.float32) if found.dtype == np.uint8 and found.max(initial=0) <= 1 else found


def _numbers(name: str, value: Any) -> np.ndarray:
    """Return an array as uint8, or as float32 in [0, 1].

    uint8 are bytes, and so are other integers from 0 to 255; uint16 are scaled by their own range; truth values are 0
    and 1; floats overshoot [0, 1] a little at most, and are cut.
    """
    try:
        found = np.asarray(value)
    except ValueError:  # pictures of several sizes
        raise InputError(f"{name}: found {type(value).__name__} of several shapes, expected one array") from None
    if found.dtype == np.uint8:
        return found
    if found.dtype == np.bool_:
        return found.astype(np.float32)
    if found.dtype == np.uint16:
        return found.astype(np.float32) / 65535
    if np.issubdtype(found.dtype, np.integer):
        if found.size and not (found.min() >= 0 and found.max() <= 255):
            raise InputError(f"{name}: found {found.dtype} from {found.min()} to {found.max()}, expected 0 to 255")
        return found.astype(np.uint8)
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise InputError(f"{name}: found {found.dtype}, expected numbers: uint8, or floats from 0 to 1")
    found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise InputError(f"{name}: found numbers that are not finite, expected floats from 0 to 1")
    if found.size and not (found.min() >= -_SLACK and found.max() <= 1 + _SLACK):
        raise InputError(
            f"{name}: found floats from {found.min():g} to {found.max():g}, expected them from 0 to 1, or uint8"
        )
    return found.clip(0.0, 1.0)


def _listed(value: Any) -> list[Any] | None:
    """Return a sequence or an array with an axis as a list, None for what is neither."""
    if isinstance(value, (str, bytes, dict)) or not hasattr(value, "__iter__"):
        return None
    return None if getattr(value, "ndim", 1) == 0 else list(value)


def _one_each(name: str, made: Sequence[Any] | None, value: Any, n: int) -> None:
    if made is None or len(made) != n:
        found = shown(value) if made is None else len(made)
        raise InputError(f"{name}: found {found}, expected one for each of the {n} prompts")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name}: found {shown(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name}: holds half a surrogate pair, which is not text") from None
    return str(value)


def fitting_masks(
    images: np.ndarray, masks: np.ndarray | None, height: int | None, width: int | None
) -> np.ndarray | None:
    """Return masks (n, H, W) for images (n, H, W, 3), which may have a channel of their own, or for one image no axis.

    Raises `InputError` for another shape, and for images of another size than ``height`` and ``width``.
    """
    shape = images.shape
    for name, side, own in (("height", height, shape[1]), ("width", width, shape[2])):
        if side not in (None, own):
            raise InputError(f"{name}: found {side} with images of {shape[1]} x {shape[2]} pixels, expected {own}")
    if masks is None:
        return None
    found = masks.shape
    if found in ((*shape[:3], 1), *([shape[1:3], (*shape[1:3], 1)] if shape[0] == 1 else [])):
        masks = masks.reshape(shape[:3])
    if masks.shape != shape[:3]:
        raise InputError(f"masks: found shape {found}, expected that of the images, {shape[:3]}")
    return masks
