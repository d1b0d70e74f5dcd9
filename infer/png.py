"""PNG files that carry their own settings, written so that a reader never sees half a file."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from infer.leftovers import temporary_name
from jaxmix import paths
from jaxmix.samplers import split_sampler


def write_png(path: Path, image: np.ndarray, texts: Mapping[str, str]) -> int:
    """Write `image` (H, W, 3) uint8 with `texts` as text chunks; return the file's size in bytes.

    The file appears under its name only when it is whole (temporary file, then rename).
    """
    content = png_bytes(image, texts)
    write_whole(path, content)
    return len(content)


def png_bytes(image: np.ndarray, texts: Mapping[str, str]) -> bytes:
    """Return `image` (H, W, 3) uint8 as a PNG with `texts` as text chunks."""
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_text(key, text)  # Latin-1 as tEXt, anything else as iTXt
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name beside `path`, then rename it; an object in a bucket by one request."""
    if paths.remote(path):
        paths.write(path, content)
        return
    temporary = path.with_name(temporary_name(path.name))
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:  # a full disk: leave nothing half-written, and say where
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _viewer_name(sampler: str) -> str:
    """Return the name by which image viewers and web UIs know a sampler."""
    solver, spacing = split_sampler(sampler)
    return _VIEWERS.get(solver, solver) + " Karras" * (spacing == "karras")


_VIEWERS = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "pndm": "PLMS",
    "lcm": "LCM",
    "tcd": "TCD",
}
_SCHEDULES = {"karras": "Karras", "exponential": "Exponential", "beta": "Beta", "sgm_uniform": "SGM Uniform"}


def setting_chunks(settings: Mapping[str, Any], size: tuple[int, int]) -> dict[str, str]:
    """Return the two text chunks: `jaxmix` (JSON, complete) and `parameters` (the form that image viewers show).

    `settings` needs prompt, negative_prompt, seed, steps, guidance_scale, model and sampler; `size` is (W, H).
    """
    lines = [settings["prompt"]]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    own = split_sampler(settings["sampler"])[1]
    spacing = settings.get("spacing") or (None if own == "karras" else own)  # Karras is in the sampler's name
    values = {
        "Steps": settings["steps"],
        "Sampler": _viewer_name(settings["sampler"]),
        "Schedule type": _SCHEDULES.get(spacing or ""),
        "Eta": settings.get("eta"),
        "CFG scale": f"{settings['guidance_scale']:g}",
        "Seed": settings["seed"],
        "Size": f"{size[0]}x{size[1]}",
        "Model": settings["model"],
    }
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in values.items() if value is not None))
    return {"parameters": "\n".join(lines), "jaxmix": json.dumps(settings, ensure_ascii=False)}


def read_settings(path: Path, chunk: str = "jaxmix") -> dict[str, Any] | None:
    """Return the settings in a chunk of a PNG, or None if the file is missing, damaged or not ours."""
    try:
        with warnings.catch_warnings(), _opened(path) as image:
            warnings.simplefilter("ignore")  # of decoders, about a file that may be anything
            image.load()  # the chunk may be anywhere, and a truncated file must not count as drawn
            held = json.loads(image.info[chunk])
    except Exception:  # whatever a decoder raises, and JSON that is nested too deeply
        return None
    return held if isinstance(held, dict) else None


def size_of_png(path: Path) -> tuple[int, int]:
    """Return the (width, height) of a PNG that `read_settings` could read."""
    with _opened(path) as image:
        return image.size


def _opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(paths.read(path) or b"") if paths.remote(path) else path)


def _quoted(value: str) -> str:
    # Viewers split this line at commas and colons.
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value
