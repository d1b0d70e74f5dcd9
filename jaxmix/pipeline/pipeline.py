"""The roof: a Stable Diffusion pipeline as one frozen object, from requests to pixels on any number of devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxmix import control as seam
from jaxmix.control import Control
from jaxmix.models.clip import TextStates
from jaxmix.models.unet import join_sites, norm_sites, sites
from jaxmix.pipeline import memory, previews, programs, showing
from jaxmix.pipeline import text as words
from jaxmix.pipeline.batching import of_shape, to_bytes, warn_of_broken
from jaxmix.pipeline.chunks import PLAIN, Reading
from jaxmix.pipeline.drawing import draw_rows
from jaxmix.pipeline.embeddings import with_learnt
from jaxmix.pipeline.given import pictures
from jaxmix.pipeline.inverted import Inverted, find_noise
from jaxmix.pipeline.job import Denoiser, Job
from jaxmix.pipeline.parts import Parts
from jaxmix.pipeline.renamed import translate
from jaxmix.pipeline.request import FURTHER, WEIGHTS, Method, Request, WeightEdit
from jaxmix.pipeline.saving import save_pipeline
from jaxmix.pipeline.stacking import ordered, several
from jaxmix.rows import Text
from jaxmix.samplers import (
    ClassifierFree,
    FromImage,
    Guidance,
    Inpaint,
    Pin,
    ReNoise,
    Unguided,
    seed_array,
    stack,
)
from jaxmix.types import AnyArray, Array, InputError, shown, whole

OUTPUTS = ("uint8", "float", "latent", "pil", "device")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pipeline(Parts):
    """Stable Diffusion 1.x, 2.x or XL, ready to draw; its fields are those of `jaxmix.pipeline.parts.Parts`."""

    # Text --------------------------------------------------------------------------------------------------------

    def encode_text(self, prompts: Sequence[str]) -> TextStates:
        """Return the (first) text encoder's states of each prompt."""
        return words.encode(self.tokenizers[0], self.text_encoder, self.params["text_encoder"], prompts)

    def encode_prompt(
        self,
        prompts: Sequence[str],
        prompts_2: Sequence[str | None] | None = None,
        *,
        syntax: str = "plain",
        max_chunks: int | None = 1,
        clip_skip: int = 0,
        chunks: int | None = None,
    ) -> Text:
        """Return what the UNet attends to for each prompt; see `jaxmix.pipeline.text.encode_prompts`."""
        return words.encode_prompts(self, prompts, prompts_2, Reading(syntax, max_chunks, clip_skip).checked(), chunks)

    def with_embedding(self, source: Any, token: str | None = None) -> Pipeline:
        """Return the pipeline with one more learnt embedding; see `jaxmix.pipeline.embeddings.with_learnt`."""
        return dataclasses.replace(self, embeddings=with_learnt(self, source, token))

    # Pictures ----------------------------------------------------------------------------------------------------

    def initial_latents(self, seeds: Sequence[int], hw: tuple[int, int] | None = None) -> Float[Array, "n h w c"]:
        """Return the start noise of each seed: row i depends on ``seeds[i]`` alone. ``hw`` is in latent cells."""
        h, w, c = self.latent_shape
        return programs.draw_noise(jnp.asarray(seed_array(seeds)), shape=(*(hw or (h, w)), c))

    def encode_images(self, images: AnyArray) -> Float[Array, "n h w c"]:
        """Encode images (n, H, W, 3), uint8 or float in [0, 1], to scaled latents: the mean of their posterior.

        Raises `InputError` for a wrong shape or range, or sides that are not multiples of the autoencoder's factor.
        """
        found = pictures("images", images)
        self.latent_hw(*found.shape[1:3])
        x = jnp.asarray(found)
        x = x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x
        return programs.encode_images(self.vae, self.params["vae"], x)

    def decode(
        self,
        latents: Float[AnyArray, "n h w c"],
        mesh: Mesh | None = None,
        tile: int | None = None,
        output: Literal["uint8", "float"] = "uint8",
    ) -> np.ndarray:
        """Decode latents, as `generate` returns them, to images (n, H, W, 3) uint8; the devices must divide the rows.

        ``tile`` (latent cells) decodes in overlapping tiles of that side, in the memory of one. ``output`` "float" is
        float32 in [0, 1], in which numbers that are not finite stay; bytes of them are black, with a warning.
        """
        made = programs.decode(self.vae, mesh, tile, self.params["vae"], jnp.asarray(latents))
        if output == "float":
            return np.asarray(made)
        images, finite = to_bytes(made)
        warn_of_broken(finite)
        return images

    def preview(self, latents: AnyArray) -> np.ndarray:
        """Return cheap pictures uint8 (n, h, w, 3) of latents (n, h, w, c), one pixel a cell, by a linear map."""
        return previews.preview(self._colours, latents)

    @functools.cached_property
    def _colours(self) -> np.ndarray:
        known = previews.known_map(self.vae.config)
        return previews.fit_map(self) if known is None else known

    # Drawing -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        controls: Control | Sequence[Control] = (),
        *,
        methods: Method | Sequence[Method] = (),
        negative_prompts: Sequence[str | None] | None = None,
        height: int | None = None,
        width: int | None = None,
        sampler: str | None = None,
        guidance_rescale: float | Sequence[float] = 0.0,
        images: AnyArray | None = None,
        strength: float = 0.8,
        masks: AnyArray | None = None,
        latents: Float[AnyArray, "n h w c"] | None = None,
        mesh: Mesh | None = None,
        output: str = "uint8",
        batch_size: int | None = None,
        tile: int | None = None,
        num_images: int = 1,
        callback: Callable[[int, np.ndarray], Any] | showing.Preview | None = None,
        progress: bool | Callable[[int, int], None] | None = None,
        **more: Any,
    ) -> Any:
        """Draw one image per prompt: `draw` of a `Request` with these fields, under ``methods``.

        ``seeds`` (0, 1, ... if None; one number counts up from it) fix the noise of each image, whatever the batch, the
        order or the number of devices; ``latents`` (n, h, w, c) are the start noise itself. ``height`` and ``width``
        are in pixels, the model's own if None. ``sampler`` is one of `jaxmix.samplers.SAMPLERS`. ``guidance_scale``
        and ``guidance_rescale`` (arXiv 2305.08891, 0 to 1) are one number, or one per image. A scale of at most 1 is
        the prompt's prediction alone; where that holds for a whole batch, the UNet runs on half the rows.

        ``images`` (n, H, W, 3), uint8 or float in [0, 1], start image-to-image with ``strength`` from 0 (keep) to 1;
        ``masks`` (n, H, W), 1 where the image is to be repainted, make it inpainting.

        Further keywords: ``spacing``, one of `jaxmix.samplers.SPACINGS`, and ``eta`` (0 to 1), the noise that DDIM and
        TCD add, both the model's own if None; and how prompts are read, ``syntax``, ``max_chunks``, ``clip_skip``,
        ``prompts_2`` and ``negative_prompts_2``, see `Request`.

        For the other arguments, the result and the errors see `draw`. The other fields of a `Request` need `draw`; the
        keywords of the last release for them (`pinned`, `fusion`, `context`, `start`, `guided`, `original_size`,
        `crop`, `target_size`) still work until the next one, with a warning.
        """
        request = Request(
            prompts=prompts,
            negatives=negative_prompts,
            seeds=seeds,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            steps=steps,
            sampler=sampler,
            height=height,
            width=width,
            images=images,
            strength=strength,
            masks=masks,
            latents=latents,
            controls=controls,  # type: ignore[arg-type]
            **{field: more.pop(key) for key, field in FURTHER.items() if key in more},
        )
        if more:
            request, methods = translate(self, request, methods, more)
        how: dict[str, Any] = {"mesh": mesh, "output": output, "batch_size": batch_size, "tile": tile}
        how |= {"num_images": num_images, "callback": callback, "progress": progress}
        return self.draw(request, methods, **how)

    def draw(
        self,
        request: Request,
        methods: Method | Sequence[Method] = (),
        *,
        mesh: Mesh | None = None,
        output: str = "uint8",
        batch_size: int | None = None,
        tile: int | None = None,
        num_images: int = 1,
        callback: Callable[[int, np.ndarray], Any] | showing.Preview | None = None,
        progress: bool | Callable[[int, int], None] | None = None,
    ) -> Any:
        """Draw the images of a request under methods, which are applied batch by batch.

        ``mesh`` (see `jaxmix.data_mesh`) splits the rows over devices. Rows are drawn ``batch_size`` at a time, all at
        once if None; every batch is padded to the same size, so each (steps, size, batch size) compiles once. Images
        whose prompts take different numbers of chunks are drawn in batches of their own. ``tile`` (latent cells)
        decodes in tiles, for large images.

        Each image is drawn ``num_images`` times, next to each other: seeds then count up from the given one, or from 0.
        ``progress`` shows a bar of images, by default in a terminal and a notebook; or ``progress(done, n)`` is called
        after each batch. ``callback(step, latents)`` is called after every step of a batch with its latents (k, h, w,
        c) on the host, where ``step.images`` are the numbers of its images; `Preview` shows cheap pictures instead. It
        must leave JAX alone, since it runs within the program; what it raises ends the drawing after that batch.
        Without one no step leaves the device.

        Returns (n, H, W, 3) uint8, "float" in [0, 1], "pil" for a list of PIL images, or "latent" (n, h, w, c) as the
        UNet sees them. "device" is float, too, but stays where it is made: a `jax.Array` that may be unfinished, so
        that the caller can prepare what comes next, and ask for it later. Raises `InputError`, before anything is
        compiled, for an invalid request, controls that do not fit, and methods that exclude each other.
        """
        if output not in OUTPUTS:
            raise InputError(f"output: found {shown(output)}, expected one of {', '.join(OUTPUTS)}")
        watcher = showing.make_watcher(callback, self.preview)
        batch_size = None if batch_size is None else whole("batch_size", batch_size, 1)
        tile = None if tile is None else whole("tile", tile, 1)
        methods, seeds = ordered(methods), getattr(request, "seeds", None)
        request = self.check(request, methods)
        request, methods = several(request, methods, whole("num_images", num_images, 1), seeds)
        if output != "latent":
            self.check_size(*request.hw(self), tile, *_size_of(request))
        how: dict[str, Any] = {"mesh": mesh, "output": output, "batch_size": batch_size, "tile": tile}
        return draw_rows(self, request, methods, **how, watcher=watcher, progress=progress)

    def check(self, request: Request, methods: Method | Sequence[Method] = ()) -> Request:
        """Return the request with everything filled in; raises `InputError` wherever `draw` would.

        Nothing is compiled: a job of many requests can find all mistakes before it draws the first.
        """
        methods = ordered(methods)
        if not isinstance(request, Request):
            raise InputError(f"request: found {type(request).__name__}, expected a Request; prompts go to generate")
        if request.sampler is None and any(method.inverts for method in methods):
            request = dataclasses.replace(request, sampler="ddim")
        request = sketch = request.checked(self)
        self.check_size(*request.hw(self), 1, *_size_of(request))
        wide = next((m for m in methods if m.adds_rows), None)
        beside = [type(m).__name__ for m in methods if m is not wide and m.when > WEIGHTS]
        if wide is not None and beside:
            raise InputError(
                f"{type(wide).__name__} and {beside[0]} exclude each other: the former adds rows to the batch"
            )
        starting = [type(m).__name__ for m in methods if m.starts]
        if len(starting) > 1:
            raise InputError(
                f"{starting[0]} and {starting[1]} exclude each other: both say where the images start (an inversion)"
            )
        for method in methods:
            method.check(self, request)
            sketch = method.sketch(self, sketch)
        self.check_controls(sketch.controls, request.hw(self))
        stack([ClassifierFree(jnp.zeros(())), *sketch.guidance])
        self._check_guidance(sketch)
        for edit in request.edits:
            if isinstance(edit, Pin):
                assert request.steps is not None
                shape = (request.n, request.steps + 1, *request.hw(self), self.latent_shape[-1])
                of_shape("pinned.states", edit.states, shape)
        return request

    def _check_guidance(self, request: Request) -> None:
        """Raise `InputError` for what needs a second branch, with a model whose guidance is in its weights."""
        asks = [type(g).__name__ for g in request.guidance if g.over]
        asks += ["guidance_rescale"] * bool(np.any(request.guidance_rescale))
        if asks and self.distilled_guidance:
            raise InputError(
                f"{asks[0]}: found it with a latent consistency model (time_cond_proj_dim "
                f"{self.unet.config.time_cond_proj_dim}), whose guidance has no second branch, expected another model"
            )

    def check_size(self, h: int, w: int, tile: int | None = None, encodes: bool = False, guided: bool = True) -> None:
        """Raise `InputError` if drawing one image with latents of (h, w) cells takes more memory than a device has.

        ``tile`` (latent cells) is that of the decoder; ``encodes`` says whether a picture is encoded first, ``guided``
        whether its scale is above 1. Nothing is compiled, and nothing of that size is made.
        """
        memory.check_size(self, self._least, (h, w), tile, encodes, 1 + (guided and not self.distilled_guidance))

    @functools.cached_property
    def _least(self) -> dict[Any, int]:
        return {}

    def check_controls(self, controls: Sequence[Control], hw: tuple[int, int]) -> None:
        """Raise `InputError` for controls that do not fit the UNet at latents of size ``hw``, or each other."""
        cfg = self.unet.config
        seam.validate(controls, sites(cfg, hw), norm_sites(cfg, hw), join_sites(cfg, hw))

    def job(self, request: Request, solver: Any) -> Job:
        """Return the job of a checked request whose weights are already merged, for `jaxmix.pipeline.job.denoise`."""
        image = None if request.images is None else self.encode_images(request.images)
        mask, hw = request.latent_masks(self), request.hw(self)
        edits: tuple[Any, ...] = ()
        if image is not None:
            edits = (FromImage(image) if mask is None else Inpaint(image, mask),)
        assert request.seeds is not None
        scale, rescale = np.asarray(request.guidance_scale), np.asarray(request.guidance_rescale)
        first: Guidance = Unguided()
        self._check_guidance(request)
        if not self.distilled_guidance and (scale.max() > 1 or any(g.over for g in request.guidance)):
            first = ClassifierFree(
                jnp.asarray(scale, jnp.float32), jnp.asarray(rescale, jnp.float32) if rescale.any() else None
            )
        told = jnp.asarray(scale, jnp.float32) if self.distilled_guidance else None
        return Job(
            noise=self.initial_latents(request.seeds, hw) if request.latents is None else jnp.asarray(request.latents),
            model=Denoiser(self.unet, self.params["unet"], request.states(self), request.controls, told),
            guidance=stack((first, *request.guidance)),
            edits=(*edits, *request.edits),
            seeds=jnp.asarray(seed_array(request.seeds)) if solver.stochastic else None,
        )

    # Weights -----------------------------------------------------------------------------------------------------

    def merged(self, weights: Sequence[WeightEdit]) -> Pipeline:
        """Return the pipeline with edits of the weights merged in, in order; the last set is cached."""
        key = tuple(weights)
        if not key:
            return self
        if key not in self._merged:
            params = self.params
            for edit in key:
                params = edit(params)
            self._merged.clear()  # one set at a time: each may be as large as the model
            self._merged[key] = dataclasses.replace(self, params=params)
        return self._merged[key]

    @functools.cached_property
    def _merged(self) -> dict[tuple[WeightEdit, ...], Pipeline]:
        return {}

    # Inversion ---------------------------------------------------------------------------------------------------

    def invert(
        self,
        images: AnyArray | None = None,
        prompts: Sequence[str] | None = None,
        steps: int = 50,
        guidance_scale: float | Sequence[float] | None = None,
        controls: Sequence[Control] = (),
        *,
        label: str = "next",
        record: str | None = None,
        latents: Float[AnyArray, "n h w c"] | None = None,
        renoise: ReNoise | None = None,
        mesh: Mesh | None = None,
        batch_size: int | None = None,
        reading: Reading = PLAIN,
    ) -> Inverted:
        """Find the noise that draws given images, by DDIM inversion, and the states on the way.

        ``images`` (n, H, W, 3) as for `generate`, or clean scaled ``latents``. ``prompts`` describe them (empty if
        None) and are read as ``reading`` says. Without a ``guidance_scale`` above 1 the prompt's branch runs alone.
        ``label`` picks the timestep given to the model, see `jaxmix.samplers.DDIMInversion`. ``record`` is a pattern
        over attention sites whose projected queries, keys and values are kept for every step. ``renoise`` refines every
        step (arXiv 2403.14602, `jaxmix.samplers.renoise`), with the label "next" and nothing recorded. Raises
        `InputError` as `generate` does.
        """
        how: dict[str, Any] = {"label": label, "record": record, "latents": latents, "renoise": renoise}
        how |= {"mesh": mesh, "batch_size": batch_size, "reading": reading}
        return find_noise(self, images, prompts, steps, guidance_scale, controls, **how)

    # Files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, dtype: Any = None) -> None:
        """Write a diffusers folder, or a single file if ``path`` ends in .safetensors; torch diffusers opens both.

        ``dtype`` (such as ``jnp.float16``) casts the weights on the way.
        """
        save_pipeline(self, path, dtype)


def _size_of(request: Request) -> tuple[bool, bool]:
    """Return whether a checked request encodes pictures, and whether any of its images is guided."""
    return request.images is not None, bool(np.max(request.guidance_scale) > 1)  # type: ignore[arg-type]
