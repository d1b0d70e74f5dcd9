"""The user's side: a request for images, and the methods that extend it.

A `Method` is the public form of a paper: ``apply`` extends a `Request` through four seams, weights (`WeightEdit`),
attention and features (`jaxmix.control.Control`), noise (`jaxmix.samplers.Guidance`) and latents
(`jaxmix.samplers.LatentEdit`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmix import rows as over
from jaxmix.control import Control
from jaxmix.pipeline.batching import Batch, inside, shrink_masks
from jaxmix.pipeline.chunks import Reading
from jaxmix.pipeline.given import (
    check_words,
    control_tuple,
    fitting_masks,
    pictures,
    prompt_list,
    seed_list,
    text_list,
)
from jaxmix.pipeline.parts import Parts
from jaxmix.pipeline.text import check_skip, chunk_counts, encode_branches, join
from jaxmix.rows import Text
from jaxmix.samplers import Guidance, LatentEdit, Solver, image_to_image_start, make_solver, split_sampler
from jaxmix.types import AnyArray, Array, InputError, Params, shown, whole

T = TypeVar("T")


FURTHER = {name: name for name in ("eta", "spacing", "syntax", "max_chunks", "clip_skip", "prompts_2")}
FURTHER["negative_prompts_2"] = "negatives_2"
"""Further keywords of `Pipeline.generate`, and the fields of a `Request` that they are."""


class WeightEdit(Protocol):
    """An edit of a pipeline's weights, such as a LoRA at some strength. Equal edits (``==``, hash) are merged once."""

    def __call__(self, params: Params) -> Params:
        """Return the parameters of the whole pipeline with the edit merged in, sharing all others."""
        ...


class Sizes(NamedTuple):
    """SDXL's size conditioning of an image, in pixels: (height, width), (top, left), (height, width)."""

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]

    @property
    def ids(self) -> tuple[int, ...]:
        """The six numbers in the order that the model takes."""
        return (*self.original, *self.crop, *self.target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that ``n`` images depend on, one entry per image; None is the pipeline's default.

    Attributes:
        prompts: the text of each image.
        negatives: what to steer away from; None for no negative prompt at all.
        seeds: fix the start noise of each image alone, from 0 to 2^64 - 1; one number counts up; 0, 1, ... if None.
        guidance_scale: of classifier-free guidance, one number or one per image.
        guidance_rescale: arXiv 2305.08891, 0 to 1, one number or one per image.
        steps: of the solver.
        sampler: one of `jaxmix.samplers.SAMPLERS`, or with a spacing of noise levels after it, as in "euler_karras".
        eta: how much noise DDIM and TCD add, 0 to 1; None is 0 for DDIM, and 0.3 for TCD, whose gamma it is.
        spacing: one of `jaxmix.samplers.SPACINGS`; None is the sampler's own, or else the schedule's.
        height: in pixels.
        width: in pixels.
        span: the first step to run and the step to stop before (None: the end). With ``images`` leave the first at 0:
            it follows from ``strength``.
        sizes: SDXL's size conditioning; the images' own size if None.
        images: (n, H, W, 3), uint8 or float in [0, 1], to start from.
        strength: how much of them is drawn anew, above 0 and up to 1.
        masks: (n, H, W), 1 where they are to be repainted; the rest stays.
        latents: (n, h, w, c), the start noise itself, or with ``span`` the state before its first step.
        text: ready-made states of all branches (n, 2 + len(branches), ...) in place of those of the prompts.
        branches: further conditional prompts, each a list of one per image, for guidances that need more than two.
        weights: edits of the weights, in order, for all images.
        controls: inside the UNet, with one row for all images or one per image.
        guidance: in addition to classifier-free guidance, which acts in all steps that none of these covers.
        edits: of the latents, after those that ``images`` and ``masks`` imply.
        kept: rows to return once methods have added some; all if None.
        prompts_2: what SDXL's second text encoder reads instead of ``prompts``; None for the same.
        negatives_2: likewise instead of ``negatives``.
        syntax: how prompts say weights, one of `jaxmix.pipeline.prompt_syntax.SYNTAXES`.
        max_chunks: how many chunks of tokens (75 of CLIP's 77) are read of a prompt; None for all of it.
        clip_skip: how many of the text encoders' last layers are left out, of the conditional branches as in diffusers.
        chunks: to which all prompts are filled up; as many as the longest needs if None. `Pipeline.draw` says it.
    """

    prompts: Sequence[str]
    negatives: Sequence[str | None] | None = None
    seeds: Sequence[int] | None = None
    guidance_scale: float | Sequence[float] | np.ndarray | None = None
    guidance_rescale: float | Sequence[float] | np.ndarray = 0.0
    steps: int | None = None
    sampler: str | None = None
    eta: float | None = None
    spacing: str | None = None
    height: int | None = None
    width: int | None = None
    span: tuple[int, int | None] = (0, None)
    sizes: Sizes | None = None
    images: AnyArray | None = None
    strength: float = 0.8
    masks: AnyArray | None = None
    latents: Float[AnyArray, "n h w c"] | None = None
    text: Text | None = None
    branches: tuple[Sequence[str | None], ...] = ()
    weights: tuple[WeightEdit, ...] = ()
    controls: tuple[Control, ...] = ()
    guidance: tuple[Guidance, ...] = ()
    edits: tuple[LatentEdit, ...] = ()
    kept: np.ndarray | None = None
    prompts_2: Sequence[str | None] | None = None
    negatives_2: Sequence[str | None] | None = None
    syntax: str = "plain"
    max_chunks: int | None = 1
    clip_skip: int = 0
    chunks: int | None = None

    @property
    def n(self) -> int:
        """The number of rows."""
        return 1 if isinstance(self.prompts, str) else len(self.prompts)

    def checked(self, parts: Parts) -> Request:
        """Return the request with everything filled in for a model, one row per image.

        Raises `InputError` for lists of different lengths, and steps, sizes or numbers out of range.
        """
        prompts = prompt_list(self.prompts)
        n = len(prompts)
        reading = self.reading.checked()
        steps = parts.default_steps if self.steps is None else whole("steps", self.steps, 1)
        # A spacing alone stands above that of the model's sampler.
        own = parts.sampler if self.spacing is None else split_sampler(parts.sampler)[0]
        solver = make_solver(self.sampler or own, parts.schedule, steps, self.eta, self.spacing)
        seeds = seed_list(self.seeds, n)
        negatives = text_list("negative_prompts", self.negatives, n)
        branches = tuple(text_list(f"branches[{i}]", branch, n) for i, branch in enumerate(self.branches))
        seconds = [
            None if value is None else text_list(name, value, n)
            for name, value in (("prompts_2", self.prompts_2), ("negative_prompts_2", self.negatives_2))
        ]
        check_skip(parts, reading.clip_skip)
        named: Mapping[str, Sequence[str | None]] = {"prompts": prompts, "negative_prompts": negatives}
        check_words(parts.text_encoder_2 is not None, reading.syntax, named, seconds)
        scale = parts.default_guidance_scale if self.guidance_scale is None else self.guidance_scale
        rescale = over.numbers("guidance_rescale", self.guidance_rescale, n, "prompts", least=0.0)
        if rescale.max() > 1:
            raise InputError(f"guidance_rescale: found {shown(self.guidance_rescale)}, expected numbers from 0 to 1")
        first, last = self.span
        height = None if self.height is None else whole("height", self.height, 1)
        width = None if self.width is None else whole("width", self.width, 1)
        latents = None if self.latents is None else jnp.asarray(self.latents, jnp.float32)
        images = None if self.images is None else pictures("images", self.images, n)
        masks = None if self.masks is None else inside(self.masks)
        if images is not None:
            if first:
                raise InputError(f"start: found step {first} with images, expected strength to say where they start")
            first = image_to_image_start(solver.steps, self.strength)
            masks = fitting_masks(images, masks, height, width)
            height, width = images.shape[1:3]
        elif masks is not None:
            raise InputError("masks: found masks alone, expected also the images to repaint")
        if not 0 <= first < solver.steps:
            raise InputError(f"start: found step {first}, expected 0 to {solver.steps - 1}")
        if last is not None and not first < last <= solver.steps:
            raise InputError(f"stop: found step {last}, expected {first + 1} to {solver.steps}")
        if latents is not None and not bool(jnp.isfinite(latents).all()):
            raise InputError("latents: found numbers that are not finite")
        hw, factor, channels = parts.latent_hw(height, width), parts.vae.config.factor, parts.latent_shape[-1]
        if latents is not None:
            if latents.ndim != 4 or latents.shape[0] != n or latents.shape[-1] != channels:
                raise InputError(f"latents: found shape {latents.shape}, expected ({n}, h, w, {channels})")
            if self.images is not None and latents.shape[1:3] != hw:
                raise InputError(f"latents: found shape {latents.shape}, expected {(n, *hw, channels)} of the images")
            hw = (latents.shape[1], latents.shape[2])
        size = (hw[0] * factor, hw[1] * factor)
        return dataclasses.replace(
            self,
            prompts=prompts,
            negatives=negatives,
            seeds=seeds,
            branches=branches,
            images=images,
            masks=masks,
            guidance_scale=over.numbers("guidance_scale", scale, n, "prompts"),
            guidance_rescale=rescale,
            steps=solver.steps,
            sampler=self.sampler or own,
            height=size[0],
            width=size[1],
            span=(first, last),
            sizes=self.sizes or Sizes(size, (0, 0), size),
            latents=latents,
            controls=over.tile(control_tuple(self.controls), n),
            edits=over.tile(tuple(self.edits), n),
            guidance=over.tile(tuple(self.guidance), n),
            prompts_2=seconds[0],
            negatives_2=seconds[1],
            max_chunks=reading.max_chunks,
            clip_skip=reading.clip_skip,
        )

    def hw(self, parts: Parts) -> tuple[int, int]:
        """Return the size of the latents of a checked request."""
        return parts.latent_hw(self.height, self.width)

    def solver(self, parts: Parts) -> Solver:
        """Return the solver of a checked request."""
        assert self.sampler is not None and self.steps is not None, "check the request first"
        return make_solver(self.sampler, parts.schedule, self.steps, self.eta, self.spacing)

    def check_inverts(self, parts: Parts, title: str, why: str) -> None:
        """Raise `InputError` unless a checked request draws by the DDIM that `Pipeline.invert` runs backwards."""
        if self.sampler != "ddim":
            raise InputError(f"{title}: found the sampler {self.sampler}, expected ddim, {why}")
        if self.eta:
            raise InputError(f"{title}: found eta {self.eta:g}, expected 0: an inversion knows of no noise")
        if self.spacing not in (None, parts.schedule.timestep_spacing or "leading"):
            raise InputError(
                f"{title}: found the spacing {self.spacing}, expected the model's own, in which pictures are inverted"
            )

    def take(self, rows: Sequence[int] | np.ndarray) -> Request:
        """Return the request for some of its images, in that order; an index may be repeated."""
        rows = np.asarray(rows)
        changed: dict[str, Any] = {}
        for name in ("prompts", "negatives", "seeds", "prompts_2", "negatives_2"):
            value = getattr(self, name)
            changed[name] = None if value is None else [value[i] for i in rows]
        changed["branches"] = tuple([branch[i] for i in rows] for branch in self.branches)
        for name in ("guidance_scale", "guidance_rescale", "images", "masks", "latents"):
            value = getattr(self, name)
            changed[name] = value[rows] if hasattr(value, "ndim") and value.ndim else value
        if self.text is not None:
            changed["text"] = over.take(self.text, rows)
        for name in ("controls", "guidance", "edits"):
            changed[name] = over.take(getattr(self, name), rows)
        return dataclasses.replace(self, **changed)

    def repeat(self, k: int) -> Request:
        """Return the request with each image repeated ``k`` times in a row."""
        return self.take(np.repeat(np.arange(self.n), k))

    def add(self, **more: tuple[Any, ...]) -> Request:
        """Return the request with further ``weights``, ``controls``, ``guidance``, ``edits`` or ``branches``."""
        changed: dict[str, Any] = {name: (*getattr(self, name), *value) for name, value in more.items()}
        return dataclasses.replace(self, **changed)

    @property
    def reading(self) -> Reading:
        """How the prompts are read."""
        return Reading(self.syntax, self.max_chunks, self.clip_skip)

    def chunk_counts(self, parts: Parts, further: Sequence[Sequence[str]] | None = None) -> np.ndarray:
        """Return how many chunks the longest text of each image takes, ``further`` ones (n lists) included."""
        if self.chunks is not None or self.text is not None:
            tokens = 0 if self.text is None else self.text.context.shape[2]
            return np.full(self.n, self.chunks or max(tokens // parts.text_length, 1))
        found = np.ones(self.n, int)
        if self.max_chunks == 1:
            return found
        read = [(self.prompts, self.prompts_2), (self.negatives or [None] * self.n, self.negatives_2)]
        for branch, second in [*read, *((branch, None) for branch in self.branches)]:
            texts = [text or "" for text in branch]
            found = np.maximum(found, chunk_counts(parts, texts, second, self.reading))
        for i, texts in enumerate(further or ()):
            if texts:
                found[i] = max(found[i], *chunk_counts(parts, list(texts), None, self.reading))
        return found

    def tokens(self, parts: Parts) -> int:
        """Return the number of tokens of the text of each branch."""
        return int(self.chunk_counts(parts).max()) * parts.text_length

    def states(self, parts: Parts) -> Text:
        """Return the text of all branches of the images, (n, branches, ...)."""
        if self.text is not None:
            shape = self.text.context.shape
            expected = (self.n, 2 + len(self.branches), parts.text_length, parts.unet.config.cross_attention_dim)
            whole_chunks = len(shape) == 4 and shape[2] > 0 and shape[2] % parts.text_length == 0
            if not whole_chunks or (*shape[:2], shape[3]) != (*expected[:2], expected[3]):
                raise InputError(f"text.context: found shape {shape}, expected {expected}, or several times the tokens")
            return self.text
        assert self.negatives is not None and self.sizes is not None, "check the request first"
        seconds = [self.negatives_2, self.prompts_2, *[None] * len(self.branches)]
        branches = [self.negatives, self.prompts, *self.branches]
        return encode_branches(
            parts, branches, self.sizes.ids, self.reading, seconds=seconds, chunks=int(self.chunk_counts(parts).max())
        )

    def with_branch(self, parts: Parts, prompts: Sequence[str | None]) -> tuple[Request, int]:
        """Return the request with one more conditional prompt per image, and the number of its branch."""
        made = self.add(branches=(list(prompts),))
        if self.text is not None:
            made = dataclasses.replace(made, text=join(self.text, self.encoded(parts, [prompts], first=2)))
        return made, 1 + len(made.branches)

    def encoded(self, parts: Parts, branches: Sequence[Sequence[str | None]], first: int = 0) -> Text:
        """Return the text of other branches, read as the request's own; ``first`` is the number of their first."""
        assert self.sizes is not None, "check the request first"
        chunks = int(self.chunk_counts(parts).max())
        return encode_branches(parts, branches, self.sizes.ids, self.reading, chunks=chunks, first=first)

    def latent_masks(self, parts: Parts) -> Array | None:
        """Return the masks at the size of the latents (n, h, w, 1), None if there are none."""
        if self.masks is None or self.images is None:
            return None
        return shrink_masks(self.masks, np.shape(self.images)[:3], parts.vae.config.factor)


WEIGHTS, ATTENTION, NOISE, BLEND = 0, 1, 2, 3
"""When a method is applied: changes of weights come before text is encoded with them, then guidance, and last what is
built on another's guidance."""


class Method:
    """The public form of a paper. Subclasses are frozen dataclasses; they compose in any tuple.

    Fields named in ``per_image`` are one value for all images, or a sequence of one per image, which `take` cuts.
    """

    #: Methods are applied by this number (`WEIGHTS`, `ATTENTION`, `NOISE`, `BLEND`), equal ones in their given order.
    when: ClassVar[int] = ATTENTION
    #: What messages call the method; the name of its class if empty.
    title: ClassVar[str] = ""
    #: Names of fields with one entry per image.
    per_image: ClassVar[tuple[str, ...]] = ()

    @property
    def adds_rows(self) -> bool:
        """Whether `apply` adds rows beside the images, which later methods would not know of."""
        return False

    @property
    def starts(self) -> bool:
        """Whether `apply` says where the images start, which only one method can."""
        return False

    @property
    def inverts(self) -> bool:
        """Whether it needs the DDIM that pictures are inverted by, which is then the sampler where none is named."""
        return False

    def check(self, pipe: Any, request: Request) -> None:
        """Raise `InputError` for a mistake, before anything is compiled; ``request`` is the whole one, checked."""
        for name in self.per_image:
            value = getattr(self, name)
            if is_list(value) and len(value) != request.n:
                where = f"{self.title or type(self).__name__}.{name}"
                raise InputError(
                    f"{where}: found {len(value)} values, expected 1 or one for each of the {request.n} prompts"
                )

    def sketch(self, pipe: Any, request: Request) -> Request:
        """Return the request with as much of what `apply` adds as is free and decides which methods exclude others."""
        return request

    def together(self, n: int) -> Sequence[int] | None:
        """Return the sizes of the groups of the ``n`` images that must be drawn together, None without groups."""
        return None

    def further_prompts(self, n: int) -> Sequence[Sequence[str]]:
        """Return for each of the ``n`` images the prompts that it is drawn with beside its own, if there are any."""
        return ()

    def take(self: T, batch: Batch, n: int) -> T:
        """Return the method for a batch of the ``n`` images."""
        cut = {
            name: [value[i] for i in batch.rows]
            for name in self.per_image  # type: ignore[attr-defined]
            if is_list(value := getattr(self, name))
        }
        return dataclasses.replace(self, **cut) if cut else self  # type: ignore[type-var]

    def apply(self, pipe: Any, request: Request) -> Request:
        """Return the extended request of a batch; ``pipe`` is the `Pipeline` that will draw it."""
        raise NotImplementedError


def is_list(value: Any) -> bool:
    """Return whether a value has one entry per image: a sequence or an array, neither text nor a mapping."""
    return not isinstance(value, (str, bytes, Mapping)) and hasattr(value, "__len__")
