"""StyleAligned (arXiv 2312.02133) and Visual Style Prompting (2402.12974) as methods: groups to controls."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxmix.controls import style_aligned as aligned
from jaxmix.models.unet import norm_sites, sites, up_blocks
from jaxmix.pipeline.batching import Batch
from jaxmix.pipeline.inverted import Inverted, hold
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.request import Method, Request
from jaxmix.types import AnyArray, Array, InputError

ATTN1 = r"\.attn1$"


def style_aligned(
    pipe: Pipeline,
    groups: Sequence[int],
    *,
    level: float = 0.0,
    share_group_norm: bool | None = None,
    sites: str | None = None,
    **options: Any,
) -> aligned.StyleAlignedControl:
    """Draw groups of images in one style, that of the first of each (arXiv 2312.02133).

    ``groups`` are the sizes of consecutive groups of prompts. ``level`` is about the share of attn1 layers that are not
    shared; ``sites`` picks the shared ones by a pattern instead. ``share_group_norm`` pools the statistics of every
    GroupNorm with the reference's: None is the authors' choice, on for SD 1 and 2 and off for SDXL. The other
    ``options`` (strength, scale, shift, adain, full, swap, window) are those of `jaxmix.controls.style_aligned.bind`.

    ``swap`` is Visual Style Prompting (arXiv 2402.12974): keys and values are the reference's alone, queries stay as
    they are, and by default it acts in the last up block with attention.
    """
    swap = bool(options.get("swap", False))
    cfg, hw = pipe.unet.config, pipe.latent_shape[:2]
    if swap:
        options.setdefault("adain", ())
    norms = (not swap and pipe.text_encoder_2 is None) if share_group_norm is None else share_group_norm
    names = [site.name for site in _sites(pipe, hw) if site.name.endswith(".attn1")]
    if sites is None:
        if swap:
            names = [name for name in names if name.startswith(up_blocks(names)[-1] + ".")]
        else:
            # In the order in which the authors' code counts them: the middle block comes last.
            names.sort(key=lambda name: name.startswith("mid_block"))
            names = [n for n, alone in zip(names, aligned.unshared(len(names), level), strict=True) if not alone]
        chosen = [f"^{re.escape(name)}$" for name in names]
        if level == 0 and not swap:
            chosen = [ATTN1]
        if not chosen and not norms:
            chosen, options["strength"] = [ATTN1], 0.0  # nothing is shared at all
    elif level:
        raise InputError("level and sites: found both, expected the one or the other")
    else:
        chosen = [sites]
    if norms:  # at level 1 only they are shared, as in the authors' code
        chosen += [f"^{re.escape(site.name)}$" for site in norm_sites(cfg, hw)]
    return aligned.bind(groups, sites="|".join(chosen), norms=norms, **options)


def _sites(pipe: Pipeline, hw: tuple[int, int]) -> Any:
    return sites(pipe.unet.config, hw)


@dataclasses.dataclass(frozen=True)
class StyleAligned(Method):
    """Draw groups of images in the style of the first of each; see `style_aligned` for the fields.

    ``groups`` are the sizes of consecutive groups of prompts; all are one group if None. ``strength``, ``scale`` and
    ``shift`` are one number, or one per image. ``adain`` None is queries and keys, or nothing with ``swap``.
    ``pictures`` maps the number of a group to the picture (H, W, 3) that is its first image, or to its `Inverted`: it
    is inverted under that image's prompt with a guidance of ``inversion_guidance`` and held to its course, ``offset``
    steps ahead; the sampler must then be ddim.
    """

    groups: Sequence[int] | None = None
    level: float = 0.0
    share_group_norm: bool | None = None
    sites: str | None = None
    strength: float | Sequence[float] = 1.0
    scale: float | Sequence[float] = 1.0
    shift: float | Sequence[float] = 0.0
    adain: Sequence[str] | None = None
    full: bool = False
    swap: bool = False
    window: tuple[float, float] = (0.0, 1.0)
    pictures: Mapping[int, AnyArray | Inverted] = dataclasses.field(default_factory=dict)
    offset: int = 5
    inversion_guidance: float = 2.0

    per_image: ClassVar[tuple[str, ...]] = ("strength", "scale", "shift")

    def groups_of(self, n: int) -> list[int]:
        """Return the sizes of the groups of ``n`` images."""
        return [n] if self.groups is None else list(self.groups)

    @property
    def inverts(self) -> bool:
        """Where there are pictures."""
        return bool(self.pictures)

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Refuse groups that do not add up to the images, and pictures that cannot be held to their inversion."""
        super().check(pipe, request)
        sizes = self.groups_of(request.n)
        if sum(sizes) != request.n:
            raise InputError(f"groups: found sizes {sizes}, expected sizes that add up to the {request.n} images")
        self._control(pipe, sizes)
        expected = (request.height, request.width, 3)
        for group, picture in self.pictures.items():
            if not 0 <= group < len(sizes):
                raise InputError(f"pictures: found group {group}, expected 0 to {len(sizes) - 1}")
            if not isinstance(picture, Inverted) and np.shape(picture) != expected:
                raise InputError(f"pictures: group {group} has shape {np.shape(picture)}, expected {expected}")
            if isinstance(picture, Inverted) and picture.states.shape[1] - 1 != request.steps:
                raise InputError(
                    f"pictures: group {group} was inverted in {picture.states.shape[1] - 1} steps, expected the run's "
                    f"{request.steps}"
                )
        if self.pictures:
            assert request.steps is not None
            request.check_inverts(pipe, "StyleAligned", "since a picture is held to its DDIM inversion")
            if not 0 <= self.offset < request.steps:
                raise InputError(f"offset: found {self.offset}, expected 0 to {request.steps - 1}")

    def together(self, n: int) -> list[int]:
        """Return the sizes of the groups."""
        return self.groups_of(n)

    def sketch(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control."""
        return request.add(controls=(self._control(pipe, self.groups_of(request.n)),))

    def take(self, batch: Batch, n: int) -> StyleAligned:
        """Return the method for a batch of whole groups, and of single rows that fill it up."""
        made = super().take(batch, n)
        starts = np.cumsum([0, *self.groups_of(n)])
        number = {int(start): group for group, start in enumerate(starts[:-1])}
        firsts = np.cumsum([0, *batch.groups[:-1]])
        held = {}
        for i, first in enumerate(firsts):
            group = number.get(int(batch.rows[first]))
            if group is not None and group in self.pictures:
                held[i] = self.pictures[group]
        return dataclasses.replace(made, groups=batch.groups, pictures=held)

    def apply(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control, and hold the pictures to their courses."""
        sizes = self.groups_of(request.n)
        request = request.add(controls=(self._control(pipe, sizes),))
        if not self.pictures:
            return request
        firsts = np.cumsum([0, *sizes[:-1]])
        rows = [int(firsts[group]) for group in self.pictures]
        pictures = self.pictures.values()
        found = [self._course(pipe, request, *one) for one in zip(rows, pictures, strict=True)]
        return request.add(edits=(hold(jnp.concatenate(found), rows, request.n),))

    def _course(self, pipe: Pipeline, request: Request, row: int, picture: AnyArray | Inverted) -> Array:
        if not isinstance(picture, Inverted):
            assert request.steps is not None
            # One by one: each number of pictures would be another program.
            picture = pipe.invert(
                np.asarray(picture)[None],
                [request.prompts[row]],
                steps=request.steps,
                guidance_scale=self.inversion_guidance,
                reading=request.reading,
            )
        return picture.course(self.offset)

    def _control(self, pipe: Pipeline, sizes: Sequence[int]) -> aligned.StyleAlignedControl:
        return style_aligned(
            pipe,
            sizes,
            level=self.level,
            share_group_norm=self.share_group_norm,
            sites=self.sites,
            strength=self.strength,
            scale=self.scale,
            shift=self.shift,
            **({} if self.adain is None else {"adain": self.adain}),
            full=self.full,
            swap=self.swap,
            window=self.window,
        )
