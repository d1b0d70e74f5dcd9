"""InstantStyle-Plus (arXiv 2407.00788) as one method: a content picture in the style of another.

The content is kept by three parts: the run starts from its latent, inverted by ReNoise under its caption and without
guidance; a tile ControlNet sees it; and so does an IP-Adapter in all blocks, weakly. The style comes from an
IP-Adapter in the block of style alone. The authors' further guidance by an image encoder is off by default, as in their
script. Each part may be missing. Where we differ from the authors' code is said in `jaxmix.samplers.renoise` and
`jaxmix.samplers.likeness`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxmix.methods.controlnet import ControlNet
from jaxmix.methods.ip_adapter import IPAdapter
from jaxmix.pipeline.blocks import Blocks
from jaxmix.pipeline.descriptors import CSD, described, eye_of
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.references import One, per_image
from jaxmix.pipeline.request import BLEND, Method, Request
from jaxmix.pipeline.vision import ImageEncoder, as_hint, as_picture
from jaxmix.preprocessors import preprocess
from jaxmix.rows import numbers
from jaxmix.samplers import Likeness, ReNoise
from jaxmix.types import Array, InputError, shown

NEGATIVE_PROMPT = "lowres, low quality, worst quality, deformed, noisy, blurry"
"""The authors' negative prompt; with it go 50 steps and a guidance scale of 5."""

Numbers = float | Sequence[float]


@dataclasses.dataclass(frozen=True, eq=False)
class InstantStylePlus(Method):
    """Draw content pictures in the style of style pictures (arXiv 2407.00788).

    ``content`` and ``style`` are each one picture for all images or a list of one per image: a path, a picture of PIL,
    or an array (H, W, 3), uint8 or float in [0, 1]. Contents are resized to the images, whose shape they must have. The
    prompts are captions of the contents. The authors draw with 50 steps of ddim, a guidance scale of 5 and
    ``NEGATIVE_PROMPT``, which are the request's.

    ``renoise`` says how contents are inverted to where the run starts (ddim alone); None starts from the noise of the
    seeds. ``tile`` follows the content at ``tile_scale``; ``tile_map`` names a preprocessor of `jaxmix.preprocessors`
    for it, such as "tile:8", None shows it the content itself, as the authors do. ``content_adapter`` sees the content
    in all blocks at ``content_scale``, ``style_adapter`` the style in ``style_blocks`` at ``style_scale``; they may be
    one adapter. ``guide``, an `ImageEncoder` or a `CSD`, moves the picture towards the style's and the content's
    descriptions by the weights ``style_guidance`` and ``content_guidance``, at the price of a second call of the UNet
    a step, with its gradient and that of the decoder; at weights 0 the program has none of it.

    All scales and weights are one number, or one per image, and data: they do not recompile, except that guidance
    comes and goes with the first weight that is not 0.
    """

    content: Any
    style: Any = None
    content_adapter: IPAdapter | None = None
    style_adapter: IPAdapter | None = None
    tile: ControlNet | None = None
    renoise: ReNoise | None = dataclasses.field(default_factory=ReNoise)
    content_scale: Numbers = 0.2
    style_scale: Numbers = 1.2
    style_blocks: Blocks = "style"
    tile_scale: Numbers = 0.4
    tile_map: str | None = None
    guide: ImageEncoder | CSD | None = None
    style_guidance: Numbers = 0.0
    content_guidance: Numbers = 0.0

    when: ClassVar[int] = BLEND  # its guidance may be built on composed prompts
    per_image: ClassVar[tuple[str, ...]] = (
        *("content", "style", "content_scale", "style_scale", "tile_scale", "style_guidance", "content_guidance"),
    )

    def __post_init__(self) -> None:
        """Mark arrays that are one picture for all, which are no lists of images."""
        for name in ("content", "style"):
            value = getattr(self, name)
            if getattr(value, "ndim", 0) == 4:
                object.__setattr__(self, name, list(value))
            elif hasattr(value, "ndim"):
                object.__setattr__(self, name, One(value))

    @property
    def starts(self) -> bool:
        """Where the contents are inverted; with renoise=None at noise, as any request."""
        return self.renoise is not None

    @property
    def inverts(self) -> bool:
        """Unless renoise=None."""
        return self.renoise is not None

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Refuse missing parts, captions and pictures, another sampler, and adapters or encoders that do not fit."""
        super().check(pipe, request)
        self._check_parts()
        size = (request.height, request.width)
        for i, picture in enumerate(per_image(self.content, request.n)):
            as_hint(_bare(picture), size, f"InstantStylePlus: content[{i}]")  # type: ignore[arg-type]
        if self.style is not None:
            for i, picture in enumerate(per_image(self.style, request.n)):
                as_picture(_bare(picture), f"InstantStylePlus: style[{i}]")
        if self.renoise is not None:
            self._check_inversion(pipe, request, self.renoise)
        for name in ("style_guidance", "content_guidance"):
            numbers(f"InstantStylePlus: {name}", getattr(self, name), request.n, "prompts")
        if self.guide is not None:
            eye_of(pipe, self.guide, "InstantStylePlus: guide")
            if self._guided() and pipe.schedule.alphas_cumprod[-1] == 0:
                raise InputError(
                    "InstantStylePlus: guide: found a schedule that ends without signal, expected one that keeps some"
                )
        for part in self._parts(request, sketched=True):
            part.check(pipe, request)

    def sketch(self, pipe: Pipeline, request: Request) -> Request:
        """Add the controls of all parts without what they see, and the guidance."""
        n = request.n
        for part in self._parts(request, sketched=True):
            request = part.sketch(pipe, request)
        if not self._guided():
            return request
        none = jnp.zeros((n,))
        return request.add(guidance=(Likeness(none[:, None], none[:, None], none, none),))

    def apply(self, pipe: Pipeline, request: Request) -> Request:
        """Invert the contents, and add the controls and the guidance."""
        contents = self._contents(request)
        for part in self._parts(request, sketched=False):
            request = part.apply(pipe, request)
        if self._guided():
            request = request.add(guidance=(self._likeness(pipe, request, contents),))
        if self.renoise is None:
            return request
        return dataclasses.replace(request, latents=self._start(pipe, request, contents, self.renoise))

    def _check_parts(self) -> None:
        """Refuse parts without their pictures and pictures without their parts."""
        weights = {x: bool(np.any(np.asarray(getattr(self, x)) != 0)) for x in ("style_guidance", "content_guidance")}
        if self.content is None:
            raise InputError("InstantStylePlus: content: found None, expected a picture for all images, or one each")
        if not any((self.renoise, self.tile, self.content_adapter, weights["content_guidance"])):
            raise InputError(
                "InstantStylePlus: content: found nothing that follows it, expected renoise, tile, content_adapter or "
                "content_guidance"
            )
        for name, kind in (("content_adapter", IPAdapter), ("style_adapter", IPAdapter), ("tile", ControlNet)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise InputError(f"InstantStylePlus: {name}: found {shown(value)}, expected a {kind.__name__}")
        if self.renoise is not None and not isinstance(self.renoise, ReNoise):
            raise InputError(f"InstantStylePlus: renoise: found {shown(self.renoise)}, expected a ReNoise or None")
        if self.guide is None and any(weights.values()):
            name = next(name for name in weights if weights[name])
            raise InputError(f"InstantStylePlus: guide: found none with {name}, expected an ImageEncoder or a CSD")
        follows = self.style_adapter is not None or weights["style_guidance"]
        if self.style is None and follows:
            raise InputError("InstantStylePlus: style: found None, expected a picture for the parts that follow it")
        if self.style is not None and not follows and self.guide is None:
            raise InputError(
                "InstantStylePlus: style: found a picture that nothing follows, expected style_adapter or guide"
            )

    def _check_inversion(self, pipe: Pipeline, request: Request, renoise: ReNoise) -> None:
        request.check_inverts(pipe, "InstantStylePlus", "which the contents are inverted for")
        for i, prompt in enumerate(request.prompts):
            if not prompt.strip():
                raise InputError(
                    f"InstantStylePlus: prompts[{i}]: found {prompt!r}, expected a caption of the content, under which "
                    "it is inverted"
                )
        if request.images is not None or request.latents is not None or request.span != (0, None):
            raise InputError(
                "InstantStylePlus: found images, latents or a span to start from, expected content alone, or "
                "renoise=None"
            )
        if not isinstance(renoise.seed, (int, np.integer)):
            raise InputError(f"InstantStylePlus: renoise: found the seeds {shown(renoise.seed)}, expected one for all")

    def _parts(self, request: Request, sketched: bool) -> list[Method]:
        """Return the methods that this one is made of; ``sketched`` with the pictures as they were given."""
        made: list[Method] = []
        n = request.n
        if self.tile is not None:
            # What is shown has the size of the image already, so nothing is resized twice.
            seen = self.content if sketched else [self._mapped(x) for x in self._contents(request)]
            made.append(self.tile.on(seen, _listed(self.tile_scale, n)))
        if self.content_adapter is not None:
            seen = self.content if sketched else self._contents(request)
            made.append(self.content_adapter.on(seen, _listed(self.content_scale, n)))
        if self.style_adapter is not None:
            made.append(self.style_adapter.on(self.style, _listed(self.style_scale, n), blocks=self.style_blocks))
        return made

    def _mapped(self, picture: np.ndarray) -> np.ndarray:
        if self.tile_map is None:
            return picture
        return preprocess(np.round(picture * 255).astype(np.uint8), self.tile_map)

    def _contents(self, request: Request) -> list[np.ndarray]:
        """Return the contents at the size of the images, (H, W, 3) float32 in [0, 1] each."""
        assert request.height is not None and request.width is not None
        size = (request.height, request.width)
        given = per_image(self.content, request.n)
        return [as_hint(_bare(x), size, f"InstantStylePlus: content[{i}]") for i, x in enumerate(given)]

    def _start(self, pipe: Pipeline, request: Request, contents: list[np.ndarray], renoise: ReNoise) -> Array:
        """Return the inverted latents of the contents (n, h, w, c); one with the same caption is inverted once."""
        assert request.steps is not None
        invert = functools.partial(pipe.invert, steps=request.steps, renoise=renoise, reading=request.reading)
        found: dict[Any, Array] = {}
        keys = [(x.tobytes(), prompt) for x, prompt in zip(contents, request.prompts, strict=True)]
        for key, picture in zip(keys, contents, strict=True):
            if key not in found:
                # One by one: how many differ changes from batch to batch, and each number would be another program.
                found[key] = invert(picture[None], [key[1]]).noise[0]
        return jnp.stack([found[key] for key in keys])

    def _guided(self) -> bool:
        return bool(np.any(np.asarray(self.style_guidance)) or np.any(np.asarray(self.content_guidance)))

    def _likeness(self, pipe: Pipeline, request: Request, contents: list[np.ndarray]) -> Likeness:
        n, encoder = request.n, self.guide.image_encoder if isinstance(self.guide, CSD) else self.guide
        assert encoder is not None
        eye = eye_of(pipe, self.guide, "InstantStylePlus: guide")
        bytes_of = [as_picture(x, "InstantStylePlus: content") for x in contents]
        _, content = described(eye, encoder.pixels(bytes_of))
        style = jnp.zeros_like(content)
        if self.style is not None:
            shown_to = [as_picture(_bare(x), "InstantStylePlus: style") for x in per_image(self.style, n)]
            style, _ = described(eye, encoder.pixels(shown_to))
        return Likeness(
            style=style,
            content=content,
            style_scale=jnp.asarray(numbers("style_guidance", self.style_guidance, n)),
            content_scale=jnp.asarray(numbers("content_guidance", self.content_guidance, n)),
            eye=eye,
        )


def _bare(given: Any) -> Any:
    return given.picture if isinstance(given, One) else given


def _listed(value: Numbers, n: int) -> list[float]:
    """Return a number for all, or one each, as a list."""
    return numbers("InstantStylePlus: scale", value, n, "prompts").tolist()
