"""StyleID (arXiv 2312.09008) as a method: pictures in, controls and restyled images out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.controls.style_id import GAMMA, TEMPERATURE, StyleIDControl, StyleIDRowsControl, adain_latents
from jaxmix.models.unet import sites, up_blocks
from jaxmix.pipeline.inverted import Inverted, hold
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.request import Method, Request
from jaxmix.rows import numbers
from jaxmix.samplers import Unguided
from jaxmix.types import AnyArray, Array, InputError

_BESIDE = "StyleID: found controls together with rows of pictures, expected stored features"


def style_id_sites(pipe: Pipeline, pairing: str = "reference") -> str:
    """Return the pattern of the attn1 layers that StyleID edits: those of the last two up blocks with attention.

    In SD 1 and 2 these are the authors' (up_blocks.2 and 3); the port to diffusers leaves out the first layer.
    """
    names = [s.name for s in sites(pipe.unet.config, pipe.latent_shape[:2]) if s.name.endswith(".attn1")]
    blocks = up_blocks(names)[-2:]
    names = [name for name in names if any(name.startswith(block + ".") for block in blocks)]
    if pairing == "diffusers":
        names = names[1:]
    return "|".join(f"^{re.escape(name)}$" for name in names)


def style_id(
    content: Inverted,
    style: Inverted,
    pairs: Sequence[tuple[int, int]],
    *,
    gamma: float | Sequence[float] = GAMMA,
    temperature: float | Sequence[float] = TEMPERATURE,
    strength: float | Sequence[float] = 1.0,
) -> StyleIDControl:
    """Return StyleID's control for pairs (content image, style image) of two inversions that recorded features."""
    n = len(pairs)
    if not content.features or content.features.keys() != style.features.keys():
        raise InputError("StyleID: found inversions without the same recorded sites, expected record=... in both")

    def by_step(x: Array) -> Array:  # (n, steps, ...), ascending, to the order of sampling
        return jnp.swapaxes(x, 0, 1)[::-1]

    return StyleIDControl(
        q={site: by_step(x.q) for site, x in content.features.items()},
        k={site: by_step(x.k) for site, x in style.features.items()},
        v={site: by_step(x.v) for site, x in style.features.items()},
        content=jnp.asarray([c for c, _ in pairs], jnp.int32),
        style=jnp.asarray([s for _, s in pairs], jnp.int32),
        gamma=jnp.asarray(numbers("gamma", gamma, n, "pairs")),
        temperature=jnp.asarray(numbers("temperature", temperature, n, "pairs")),
        strength=jnp.asarray(numbers("strength", strength, n, "pairs")),
        sites="|".join(f"^{re.escape(site)}$" for site in content.features),
    )


def style_id_rows(
    pipe: Pipeline,
    pairs: Sequence[tuple[int, int]],
    *,
    gamma: float | Sequence[float] = GAMMA,
    temperature: float | Sequence[float] = TEMPERATURE,
    strength: float | Sequence[float] = 1.0,
    pairing: str = "reference",
) -> StyleIDRowsControl:
    """Return StyleID's control for rows (content, style, result) of each pair, the first two held to their courses."""
    n = len(pairs)

    def results(name: str, value: float | Sequence[float], beside: float) -> Array:
        found = numbers(name, value, n, "pairs")
        return jnp.asarray(np.stack([np.full((n,), beside), np.full((n,), beside), found], 1).reshape(-1), jnp.float32)

    return StyleIDRowsControl(
        content=jnp.asarray([0, 0, 2] * n, jnp.int32),
        style=jnp.asarray([0, 0, 1] * n, jnp.int32),
        gamma=results("gamma", gamma, 0.0),
        temperature=results("temperature", temperature, 1.0),
        strength=results("strength", strength, 0.0),
        sites=style_id_sites(pipe, pairing),
    )


@dataclasses.dataclass(frozen=True)
class StyleID(Method):
    """Draw each image as a content picture with the attention of a style picture.

    ``content`` and ``style`` are pictures (H, W, 3) of the images' size, one per image; or ``found`` is an `Inverted`
    of pictures, with ``record=style_id_sites(pipe)`` and label "own" ("next" for the pairing "diffusers"), and
    ``pairs`` are the indices (content, style) of each image in it. ``gamma``, ``temperature`` and ``strength`` are one
    number, or one per image. ``adain`` starts from the content's noise with the statistics of the style's.

    ``pairing`` "reference" is the authors' code: features come from the state at their own timestep, and the run skips
    its first step and gives the second the noise of the very last timestep; "diffusers" is its port, which skips
    nothing. ``stored`` keeps the features of the inversion; otherwise each image is three rows, which compute them.
    The prompt's branch runs alone, as in the paper, unless ``guided``, which MagicFusion needs.
    """

    content: Sequence[AnyArray] | None = None
    style: Sequence[AnyArray] | None = None
    found: Inverted | None = None
    pairs: Sequence[tuple[int, int]] | None = None
    gamma: float | Sequence[float] = GAMMA
    temperature: float | Sequence[float] = TEMPERATURE
    strength: float | Sequence[float] = 1.0
    adain: bool = True
    pairing: Literal["reference", "diffusers"] = "reference"
    stored: bool = True
    guided: bool = False

    per_image: ClassVar[tuple[str, ...]] = ("content", "style", "pairs", "gamma", "temperature", "strength")

    @property
    def adds_rows(self) -> bool:
        """Whether images bring rows of their own."""
        return not self.stored

    @property
    def starts(self) -> bool:
        """Always: at the noise of the content, with the statistics of that of the style."""
        return True

    @property
    def label(self) -> str:
        """The label of the inversions that the pairing needs."""
        return "own" if self.pairing == "reference" else "next"

    @property
    def inverts(self) -> bool:
        """Always."""
        return True

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Refuse pictures that are missing or of a wrong size, samplers other than ddim, and states of other runs."""
        super().check(pipe, request)
        if (self.found is None) != (self.pairs is None) or (self.found is None) == (self.content is None):
            raise InputError("StyleID: expected either content and style pictures, or found and pairs")
        if self.pairing not in ("reference", "diffusers"):
            raise InputError(f"StyleID: found pairing {self.pairing!r}, expected 'reference' or 'diffusers'")
        for name in ("gamma", "temperature", "strength"):
            numbers(name, getattr(self, name), request.n, "pairs")
        request.check_inverts(pipe, "StyleID", "which the method inverts")
        if request.images is not None or request.latents is not None:
            raise InputError("StyleID: found images or latents to start from, expected content and style alone")
        if self.found is not None:
            steps = self.found.states.shape[1] - 1
            if steps != request.steps:
                raise InputError(f"StyleID: found an inversion of {steps} steps, expected the run's {request.steps}")
            if self.found.label != self.label:
                raise InputError(
                    f"StyleID: found an inversion with the label {self.found.label!r}, expected {self.label!r} with "
                    f"the pairing {self.pairing!r}"
                )
            return
        for name in ("content", "style"):
            pictures = getattr(self, name)
            if pictures is None:
                raise InputError(f"StyleID: found no {name} pictures, expected one for each image")
            for i, picture in enumerate(pictures):
                if np.shape(picture) != (request.height, request.width, 3):
                    raise InputError(
                        f"StyleID: {name} {i} has shape {np.shape(picture)}, expected that of the image, "
                        f"({request.height}, {request.width}, 3)"
                    )

    def sketch(self, pipe: Pipeline, request: Request) -> Request:
        """Add a control of the same sites and claims, and the guidance."""
        if request.controls and not self.stored:
            raise InputError(_BESIDE)
        control = style_id_rows(pipe, [(0, 0)], pairing=self.pairing)
        return request.add(controls=(control,), guidance=() if self.guided else (Unguided(),))

    def apply(self, pipe: Pipeline, request: Request) -> Request:
        """Invert the pictures, start from the content's noise, and add the control."""
        found, pairs = self.inverted(pipe, request)
        c, s = (jnp.asarray([pair[i] for pair in pairs]) for i in (0, 1))
        start = style_id_start(found, found, pairs) if self.adain else found.noise[c]
        strengths = {"gamma": self.gamma, "temperature": self.temperature, "strength": self.strength}
        before = request.controls
        request = dataclasses.replace(request, span=(int(self.pairing == "reference"), request.span[1]))
        if not self.guided:
            request = request.add(guidance=(Unguided(),))
        if self.stored:
            control: Any = style_id(found, found, pairs, **strengths)
            return dataclasses.replace(request.add(controls=(control,)), latents=start)
        if before:
            raise InputError(_BESIDE)
        n, seen = request.n, found.seen()
        rows = jnp.stack([found.noise[c], found.noise[s], start], 1).reshape(3 * n, *start.shape[1:])
        courses = jnp.stack([seen[c], seen[s]], 1).reshape(2 * n, *seen.shape[1:])
        held = hold(courses, [3 * i + j for i in range(n) for j in (0, 1)], 3 * n)
        control = style_id_rows(pipe, pairs, pairing=self.pairing, **strengths)
        request = request.repeat(3).add(controls=(control,), edits=(held,))
        return dataclasses.replace(request, latents=rows, kept=np.arange(2, 3 * n, 3))

    def inverted(self, pipe: Pipeline, request: Request) -> tuple[Inverted, list[tuple[int, int]]]:
        """Return the inversion of the pictures, each once, and the indices (content, style) of each image in it."""
        if self.found is not None:
            assert self.pairs is not None
            return self.found, list(self.pairs)
        assert self.content is not None and self.style is not None and request.steps is not None
        pictures: dict[bytes, AnyArray] = {}
        keys = [[np.asarray(p).tobytes() for p in side] for side in (self.content, self.style)]
        for side, of_side in zip((self.content, self.style), keys, strict=True):
            pictures |= dict(zip(of_side, side, strict=True))
        # One by one: the number of pictures changes from batch to batch, and each number would be another program.
        found = [
            pipe.invert(
                np.asarray(picture)[None],
                steps=request.steps,
                label=self.label,
                record=style_id_sites(pipe, self.pairing) if self.stored else None,
            )
            for picture in pictures.values()
        ]
        order = {key: i for i, key in enumerate(pictures)}
        return together(found), [(order[c], order[s]) for c, s in zip(*keys, strict=True)]


def together(found: Sequence[Inverted]) -> Inverted:
    """Return several inversions of one label as one."""
    trees = [(one.states, one.features) for one in found]
    states, features = jax.tree.map(lambda *x: jnp.concatenate(x), *trees)
    return Inverted(states, features, found[0].label)


def style_id_start(content: Inverted, style: Inverted, pairs: Sequence[tuple[int, int]]) -> Array:
    """Return StyleID's start: the noise of each content with the statistics of that of its style."""
    c, s = (jnp.asarray([pair[i] for pair in pairs]) for i in (0, 1))
    return adain_latents(content.noise[c], style.noise[s])
