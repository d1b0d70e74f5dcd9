"""Give pictures the style of others: StyleID (arXiv 2312.09008). Every content with every style, no prompt.

Examples: python -m infer.style_transfer --content photos/ --style paintings/ --out gallery
          python -m infer.style_transfer --prompts rows.jsonl      (rows with "content" and "style" instead of a prompt)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infer.gallery import Picture
from infer.generate import Config as Plain
from infer.generate import job
from infer.method import Method
from infer.pictures import open_cropped, pictures_in, write_picture
from infer.rows import Field, Row, check_file, check_number, check_share, check_text
from jaxmix.command import run
from jaxmix.types import InputError

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Config(Plain):
    """What to restyle, how, and where to; the flags of infer.generate, of which prompts and guidance mean nothing here.

    Attributes:
        content: a picture or a folder of them
        style: a picture or a folder of them
        gamma: share of the content's queries, from 0 (more style) to 1 (more content)
        temperature: factor of the attention scores at the edited layers (no unit)
        style_strength: 0 is the inverted content drawn again, 1 the method (no unit)
        adain: whether the start takes the mean and deviation of the style's noise
        inject: whether attention takes the style's keys and values
        pairing: reference follows the authors' code (50 steps, the first of them skipped), diffusers its port (20)
        features: stored keeps the inversions' queries, keys and values in memory, rows computes them again beside the
            result, in three rows an image
        steps: denoising steps, and those of the inversion; default: 50, or 20 for the port
    """

    content: str | None = None
    style: str | None = None
    gamma: float = 0.75
    temperature: float = 1.5
    style_strength: float = 1.0
    adain: bool = True
    inject: bool = True
    pairing: Literal["reference", "diffusers"] = "reference"
    features: Literal["stored", "rows"] = "stored"

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, value in (("--gamma", self.gamma), ("--style-strength", self.style_strength)):
            check_share(flag, value)
        check_number("--temperature", self.temperature)
        if (self.content is None) != (self.style is None):
            raise InputError("--content and --style: found one of them, expected both")


class StyleTransfer(Method):
    """Rows of a content and a style picture."""

    needs_rows = "no rows: expected --content and --style, or --prompts FILE.jsonl whose rows have both"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.fields = {
            "prompt": Field(check_text, ""),
            "content": Field(check_file),
            "style": Field(check_file),
            "gamma": Field(check_share, config.gamma),
            "temperature": Field(check_number, config.temperature),
            "style_strength": Field(check_share, config.style_strength),
        }
        self._inverted: dict[Hashable, Any] = {}

    def objects(self) -> Iterable[tuple[str, Mapping[str, Any]]] | None:
        """Return every content with every style."""
        if self.config.content is None or self.config.style is None:
            return None
        contents, styles = pictures_in(self.config.content), pictures_in(self.config.style)
        return [(f"{c} in the style of {s}", {"content": c, "style": s}) for c in contents for s in styles]

    def settings(self) -> dict[str, Any]:
        """Return the flags that no row can change."""
        names = ("adain", "inject", "pairing", "features")
        return {"method": "style_transfer"} | {name: getattr(self.config, name) for name in names}

    def complete(self, row: Row, pipe: Any) -> Row:
        """Refuse a row without two pictures, or for another sampler than DDIM."""
        for key in ("content", "style"):
            if row[key] is None:
                raise InputError(f"no field '{key}', expected a picture")
            open_cropped(row[key], row.height, row.width)  # type: ignore[arg-type]
        if row.sampler != "ddim":
            raise InputError(f"sampler: the method inverts DDIM, expected ddim, found {row.sampler}")
        if row.image is not None:
            raise InputError("image: expected 'content' and 'style'")
        return row

    def note(self, pipe: Any, bucket: Sequence[Row], size: int) -> str:
        """Say what the features of a batch take, and what they would take the other way."""
        stored, beside = self.memory(pipe, bucket[0], size, size)
        ours, other = (stored, beside) if self.config.features == "stored" else (beside, stored)
        names = ("stored", "rows") if self.config.features == "stored" else ("rows", "stored")
        return f"; features at most {ours / MIB:.0f} MiB ({names[0]}; {names[1]} would take {other / MIB:.0f})"

    def memory(self, pipe: Any, row: Row, contents: int, styles: int) -> tuple[int, int]:
        """Return the bytes that a batch needs beyond its own: of stored features, and of rows beside the result.

        Stored: q of each content, k and v of each style, every step and site. Rows: the courses, and the q, k and v of
        two more rows an image at one site at a time.
        """
        from jaxmix.methods.style_id import style_id_sites
        from jaxmix.models.unet import sites, subtree

        assert row.height is not None and row.width is not None and row.steps is not None
        hw = (row.height // pipe.vae.config.factor, row.width // pipe.vae.config.factor)
        edited = [
            s for s in sites(pipe.unet.config, hw) if re.search(style_id_sites(pipe, self.config.pairing), s.name)
        ]
        item = np.dtype(pipe.unet.dtype).itemsize
        one = [
            s.hw[0] * s.hw[1] * subtree(pipe.params["unet"], s.name)["to_q"]["kernel"].shape[-1] * item for s in edited
        ]
        stored = sum(one) * row.steps * (contents + 2 * styles)
        courses = 2 * contents * (row.steps + 1) * hw[0] * hw[1] * pipe.latent_shape[2] * 4
        return stored, courses + 2 * contents * 3 * max(one)

    def draw(self, pipe: Any, rows: Sequence[Row], arguments: dict[str, Any]) -> np.ndarray:
        """Invert the pictures of a batch, and draw each content with the attention of its style."""
        contents, styles = ([(row[key], row.height, row.width) for row in rows] for key in ("content", "style"))
        names = list(dict.fromkeys([*contents, *styles]))
        found = self._invert(pipe, names, rows[0])
        pairs = [(names.index(c), names.index(s)) for c, s in zip(contents, styles, strict=True)]
        numbers = {key: [row[key] for row in rows] for key in ("gamma", "temperature")}
        strength = [row["style_strength"] * self.config.inject for row in rows]
        from jaxmix.methods.style_id import draw_pairs

        arguments["prompts"] = [row.prompt for row in rows]
        return draw_pairs(
            pipe,
            found,
            pairs,
            arguments,
            strength=strength,
            adain=self.config.adain,
            pairing=self.config.pairing,
            stored=self.config.features == "stored",
            **numbers,
        )

    def _invert(self, pipe: Any, names: Sequence[Any], row: Row) -> Any:
        """Return the inversion of pictures, keeping those that the next batch needs again."""
        import jax
        import jax.numpy as jnp

        from jaxmix.methods.style_id import style_id_sites
        from jaxmix.pipeline.inverted import Inverted

        missing = [name for name in names if name not in self._inverted]
        self._inverted = {name: one for name, one in self._inverted.items() if name in names}
        label = "own" if self.config.pairing == "reference" else "next"
        record = style_id_sites(pipe, self.config.pairing) if self.config.features == "stored" else None
        for name in missing:  # one by one: what is new changes from batch to batch, and each number would be a program
            picture = open_cropped(*name)[None]
            self._inverted[name] = pipe.invert(picture, steps=row.steps, label=label, record=record)
        trees = [(self._inverted[name].states, self._inverted[name].features) for name in names]
        states, features = jax.tree.map(lambda *x: jnp.concatenate(x), *trees)
        return Inverted(states, features, label)

    def write_inputs(self, row: Row, out: Path) -> None:
        """Write both pictures as they went in."""
        for key in ("content", "style"):
            image = open_cropped(row[key], row.height, row.width)  # type: ignore[arg-type]
            write_picture(image, out / _input_name(row, key))

    def inputs(self, row: Row, out: Path) -> list[Picture]:
        """Show both pictures."""
        assert row.height is not None and row.width is not None
        return [Picture(_input_name(row, key), row.width, row.height, key) for key in ("content", "style")]

    def caption(self, row: Row) -> str:
        """Name both pictures."""
        return row.prompt or f"{Path(row['content']).stem} in the style of {Path(row['style']).stem}"

    def shown(self, row: Row) -> dict[str, str]:
        """Say the numbers."""
        return {"gamma, T": f"{row['gamma']:g}, {row['temperature']:g}"}


def _input_name(row: Row, key: str) -> str:
    return row.file_name.replace(".png", f"_{key}.png")


def main(config: Config) -> int:
    """Read the rows, load the model, invert the pictures, draw every pair."""
    if config.steps is None:
        config = dataclasses.replace(config, steps=50 if config.pairing == "reference" else 20)
    if config.sampler is None:
        config = dataclasses.replace(config, sampler="ddim")
    return job(config, StyleTransfer(config))


if __name__ == "__main__":
    run(main)
