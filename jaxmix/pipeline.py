"""The roof: a Stable Diffusion pipeline as one frozen object, from prompts to pixels on any number of devices."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxmix import control as seam
from jaxmix import prompts as text
from jaxmix.batches import batches, of_shape, per_image, shrink_masks, to_uint8
from jaxmix.control import Control
from jaxmix.fusing import MagicFusion
from jaxmix.inverted import Inverted
from jaxmix.models import AddedCond, AutoencoderKL, CLIPTextModel, UNet2DConditionModel
from jaxmix.models.clip import TextStates
from jaxmix.models.unet import norm_sites, sites
from jaxmix.programs import Job, Pinned, decode, denoise, draw_noise, encode_images, invert_rows
from jaxmix.samplers import DDIMInversion, image_to_image_start, make_solver, seed_array
from jaxmix.saving import save_pipeline
from jaxmix.schedule import NoiseSchedule
from jaxmix.types import AnyArray, Array, InputError, Params


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Stable Diffusion 1.x, 2.x or XL: modules, their parameters, the noise schedule and the tokenizers.

    ``params`` has the trees "unet", "vae", "text_encoder" and, for SDXL, "text_encoder_2". ``tokenizer`` and
    ``tokenizer_2`` are transformers CLIPTokenizers, or the folders of them, which are opened when the first prompt
    comes. ``sampler``, ``default_steps`` and ``default_guidance_scale`` are what `generate` takes if told nothing.
    ``zeros_for_empty_prompt`` (SDXL base) makes the text states all zero where there is no negative prompt. ``extras``
    are the tensors of a single-file checkpoint that belong to no part; `save` writes them back.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    params: Params
    schedule: NoiseSchedule
    tokenizer: Any
    text_encoder_2: CLIPTextModel | None = None
    tokenizer_2: Any = None
    default_steps: int = 25
    default_guidance_scale: float = 7.5
    sampler: str = "ddim"
    zeros_for_empty_prompt: bool = False
    extras: Any = None

    def __post_init__(self) -> None:
        """Refuse parts that do not fit each other."""
        unet, vae = self.unet.config, self.vae.config
        width, second = self.text_encoder.config.hidden_size, self.text_encoder_2
        if second is not None:
            width += second.config.hidden_size
        if width != unet.cross_attention_dim:
            names = "text_encoder hidden_size is" if second is None else "the hidden sizes of both text encoders are"
            raise InputError(
                f"pipeline: {names} {width}, unet cross_attention_dim is {unet.cross_attention_dim}: expected the same"
            )
        if (unet.addition_embed_type is None) != (second is None):
            raise InputError(
                f"pipeline: unet addition_embed_type is {unet.addition_embed_type!r} with "
                f"{1 if second is None else 2} text encoder(s), expected 'text_time' and two (SDXL), or none and one"
            )
        if unet.in_channels != vae.latent_channels:
            known = {9: ": this is an inpainting UNet", 8: ": this is an image-editing or upscaling UNet"}
            raise InputError(
                f"pipeline: unet in_channels is {unet.in_channels}, expected the {vae.latent_channels} latent channels "
                f"of the vae (text-to-image){known.get(unet.in_channels, '')}"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image's latents."""
        size = self.unet.config.sample_size
        h, w = size if isinstance(size, tuple) else (size, size)
        return (h, w, self.unet.config.in_channels)

    @property
    def text_length(self) -> int:
        """Number of tokens of every encoded prompt."""
        return self.text_encoder.config.max_position_embeddings

    # Text --------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _tokenizers(self) -> tuple[Any, Any]:
        return text.open_tokenizer(self.tokenizer), text.open_tokenizer(self.tokenizer_2)

    def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """Return token ids (b, text_length) int32, and for each prompt the words that did not fit ("" if all did)."""
        return text.tokenize(self._tokenizers[0], self.text_length, prompts)

    def token_ids(self, phrase: str) -> list[int]:
        """Return the ids of a phrase alone, without start and end."""
        return list(self._tokenizers[0](phrase, verbose=False)["input_ids"][1:-1])

    def encode_text(self, prompts: Sequence[str]) -> TextStates:
        """Return what the (first) text encoder makes of each prompt."""
        return text.encode(self._tokenizers[0], self.text_encoder, self.params["text_encoder"], prompts)

    def encode_prompt(self, prompts: Sequence[str]) -> Any:
        """Return what the UNet attends to for each prompt, (b, s, d).

        SDXL: the pair of that, from the layer before the last of both encoders, and the pooled text (b, p).
        """
        first = self.encode_text(prompts)
        if self.text_encoder_2 is None:
            return first.last_hidden_state
        second = text.encode(self._tokenizers[1], self.text_encoder_2, self.params["text_encoder_2"], prompts)
        return jnp.concatenate([first.penultimate, second.penultimate], -1), second.projected

    def condition(
        self, prompts: Sequence[str], negatives: Sequence[str | None], sizes: Sequence[int]
    ) -> tuple[Float[Array, "n 2 s d"], AddedCond | None]:
        """Return what both branches of each image are conditioned on: unconditional, conditional.

        ``sizes`` are the six numbers that SDXL is told. All are encoded in one call, so that equal prompts are encoded
        equally.
        """
        n = len(prompts)
        encoded = self.encode_prompt([p for no, yes in zip(negatives, prompts, strict=True) for p in (no or "", yes)])
        context, pooled = (encoded, None) if self.text_encoder_2 is None else encoded
        if self.zeros_for_empty_prompt:
            keep = np.asarray([[negative is not None, True] for negative in negatives]).reshape(-1)
            context = jnp.where(keep[:, None, None], context, 0)
            pooled = None if pooled is None else jnp.where(keep[:, None], pooled, 0)
        context = context.reshape(n, 2, *context.shape[1:])
        if pooled is None:
            return context, None
        time_ids = jnp.broadcast_to(jnp.asarray(sizes, jnp.float32), (n, 2, 6))
        return context, AddedCond(pooled.reshape(n, 2, -1), time_ids)

    # Pictures ----------------------------------------------------------------------------------------------------

    def initial_latents(self, seeds: Sequence[int], hw: tuple[int, int] | None = None) -> Float[Array, "n h w c"]:
        """Return the start noise of each seed: row i depends on ``seeds[i]`` alone. ``hw`` is in latent cells."""
        h, w, c = self.latent_shape
        return draw_noise(jnp.asarray(seed_array(seeds)), shape=(*(hw or (h, w)), c))

    def encode_images(self, images: AnyArray) -> Float[Array, "n h w c"]:
        """Encode images (n, H, W, 3), uint8 or float in [0, 1], to scaled latents: the mean of their posterior.

        Raises `InputError` for another shape, or sides that are not a multiple of the autoencoder's factor.
        """
        if np.ndim(images) != 4 or np.shape(images)[-1] != 3:
            raise InputError(f"images: found shape {np.shape(images)}, expected (n, H, W, 3)")
        self._latent_hw(*np.shape(images)[1:3])
        x = jnp.asarray(images)
        x = x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x
        return encode_images(self.vae, self.params["vae"], x)

    def _latent_hw(self, height: int | None, width: int | None) -> tuple[int, int]:
        factor = self.vae.config.factor
        default = self.latent_shape
        for name, value in (("height", height), ("width", width)):
            if value is not None and (value % factor or value < factor):
                raise InputError(f"{name}: found {value} pixels, expected a multiple of {factor}")
        return (height // factor if height else default[0], width // factor if width else default[1])

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        controls: Sequence[Control] = (),
        *,
        negative_prompts: Sequence[str | None] | None = None,
        height: int | None = None,
        width: int | None = None,
        sampler: str | None = None,
        guidance_rescale: float | Sequence[float] = 0.0,
        images: AnyArray | None = None,
        strength: float = 0.8,
        masks: AnyArray | None = None,
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        latents: Float[AnyArray, "n h w c"] | None = None,
        start: int = 0,
        context: Float[AnyArray, "n s d"] | None = None,
        guided: bool = True,
        pinned: Pinned | None = None,
        fusion: MagicFusion | None = None,
        mesh: Mesh | None = None,
        output: str = "uint8",
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> np.ndarray:
        """Draw one image a prompt.

        ``seeds`` (0, 1, ... if None) fix the noise of each image alone, whatever the batch, the order or the number of
        devices; ``latents`` (n, h, w, c) give the start noise itself. ``height`` and ``width`` are in pixels, the
        model's own if None. ``sampler`` is one of `jaxmix.samplers.SAMPLERS`. ``guidance_scale`` and
        ``guidance_rescale`` (arXiv 2305.08891, 0 to 1) are a number or one an image. ``mesh`` (see `jaxmix.data_mesh`)
        splits the rows over devices. Rows are drawn ``batch_size`` at a time, all at once if None; the last batch is
        padded to the same size, so each (steps, size, batch size) compiles once.

        ``images`` (n, H, W, 3), uint8 or float in [0, 1], start image-to-image with ``strength`` from 0 (keep) to 1;
        ``masks`` (n, H, W), 1 where the image is to be repainted, make it inpainting. SDXL is also told the
        ``original_size`` and ``target_size`` (height, width) and the ``crop`` (top, left) of the image, in pixels; the
        sizes are the image's own if None. ``tile`` (latent cells) decodes in tiles, for large images.

        ``latents`` with ``start`` are the state before that step. ``context`` (n, s, d) replaces the text states of the
        prompts (as `jaxmix.dense_diffusion` makes them); SDXL's pooled text stays that of the prompts. Without
        ``guided`` the prompt's branch runs alone, at half the cost, and the guidance scale has no meaning. ``pinned``
        holds images to a course (`jaxmix.hold`). ``fusion`` blends in a second model or prompt.

        Returns (n, H, W, 3) uint8, "float" in [0, 1], or "latent" (n, h, w, c) as the UNet sees them. Raises
        `InputError` for lists of different lengths, steps or sizes out of range, and controls that do not fit.
        """
        n = len(prompts)
        if isinstance(prompts, str) or n == 0:
            raise InputError(f"prompts: found {prompts!r}, expected a list of at least one prompt")
        if output not in ("uint8", "float", "latent"):
            raise InputError(f"output={output!r}: expected 'uint8', 'float' or 'latent'")
        solver = make_solver(sampler or self.sampler, self.schedule, self.default_steps if steps is None else steps)
        seeds = list(range(n)) if seeds is None else seeds
        negatives = [None] * n if negative_prompts is None else negative_prompts
        for name, found in (("seeds", seeds), ("negative_prompts", negatives)):
            if isinstance(found, str) or len(found) != n:
                raise InputError(f"{name}: found {len(found)}, expected one for each of the {n} prompts")
        scale = per_image(
            "guidance_scale", self.default_guidance_scale if guidance_scale is None else guidance_scale, n
        )
        rescale = per_image("guidance_rescale", guidance_rescale, n)

        image, mask = None, None
        if images is not None:
            if start:
                raise InputError("start: found it with images, expected strength, which says where their run starts")
            start = image_to_image_start(solver.steps, strength)
            image = self.encode_images(images)
            height, width = np.shape(images)[1:3]
            if masks is not None:
                mask = shrink_masks(masks, np.shape(images)[:3], self.vae.config.factor)
        elif masks is not None:
            raise InputError("masks: found masks without images, expected the images to repaint")
        if not 0 <= start < solver.steps:
            raise InputError(f"start: found step {start}, expected 0 to {solver.steps - 1}")
        hw = self._latent_hw(height, width)
        noise = self.initial_latents(seeds, hw) if latents is None else jnp.asarray(latents, jnp.float32)
        if noise.ndim != 4 or noise.shape[0] != n or noise.shape[-1] != self.latent_shape[-1]:
            raise InputError(f"latents: found shape {noise.shape}, expected ({n}, h, w, {self.latent_shape[-1]})")
        if image is not None and image.shape != noise.shape:
            raise InputError(f"images: found latents of shape {image.shape}, expected {noise.shape}")
        hw = (noise.shape[1], noise.shape[2])
        size = (hw[0] * self.vae.config.factor, hw[1] * self.vae.config.factor)
        cfg = self.unet.config
        seam.validate(controls, sites(cfg, hw), norm_sites(cfg, hw))
        sizes = (*(original_size or size), *crop, *(target_size or size))
        states, added = self.condition(prompts, negatives, sizes)
        if context is not None:
            states = states.at[:, 1].set(of_shape("context", context, states[:, 1].shape))
        bound = None
        if fusion is not None:
            if not guided or rescale.any():
                raise InputError("fusion: blends guided predictions, expected guided=True and no guidance_rescale")
            bound = fusion.bind(self, controls, negatives, sizes, solver, hw)
        if bound is not None and bound.third is not None:
            states = jnp.concatenate([states, bound.third[0]], 1)
            if added is not None and bound.third[1] is not None:
                added = AddedCond(*(jnp.concatenate(pair, 1) for pair in zip(added, bound.third[1], strict=True)))
        if not guided:
            states, added = states[:, 1:], None if added is None else AddedCond(*(x[:, 1:] for x in added))
        if pinned is not None:
            of_shape("pinned.states", pinned.states, (n, solver.steps + 1, *noise.shape[1:]))
        job = Job(
            noise=noise,
            context=states,
            guidance_scale=jnp.asarray(scale),
            seeds=jnp.asarray(seed_array(seeds)) if solver.stochastic else None,
            guidance_rescale=jnp.asarray(rescale) if rescale.any() else None,
            added=added,
            image=image,
            mask=mask,
            pinned=pinned,
            blend=None if bound is None else bound.blend,
        )
        run = functools.partial(denoise, self.unet, start, mesh, self.params["unet"], solver)
        plan, expert = (None, None) if bound is None else (bound.fusion, bound.expert)
        parts = []
        for rows, kept in batches(n, batch_size, mesh, (*controls, *(() if expert is None else expert.controls))):
            live = tuple(seam.take_rows(seam.tile_rows(c, n), rows) for c in controls)
            second = None
            if expert is not None:
                second = expert._replace(controls=tuple(seam.take_rows(c, rows) for c in expert.controls))
            x = run(job.take(rows), live, plan, second)
            if output != "latent":
                x = decode(self.vae, mesh, tile, self.params["vae"], x)
            parts.append((to_uint8(x) if output == "uint8" else np.asarray(x))[:kept])
        return np.concatenate(parts)

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
        mesh: Mesh | None = None,
        batch_size: int | None = None,
    ) -> Inverted:
        """Find the noise that draws given images, by DDIM inversion, and the states on the way.

        ``images`` (n, H, W, 3) as for `generate`, or clean scaled ``latents``. ``prompts`` describe them (empty if
        None). Without a ``guidance_scale`` the prompt's branch runs alone. ``label`` says which timestep the model is
        told, see `jaxmix.samplers.DDIMInversion`. ``record`` is a pattern over attention sites whose projected queries,
        keys and values are kept for every step. Raises `InputError` as `generate` does.
        """
        if (images is None) == (latents is None):
            raise InputError("invert: expected either images or latents")
        x0 = self.encode_images(images) if images is not None else jnp.asarray(latents, jnp.float32)
        if x0.ndim != 4 or x0.shape[-1] != self.latent_shape[-1]:
            raise InputError(f"latents: found shape {x0.shape}, expected (n, h, w, {self.latent_shape[-1]})")
        n, hw, factor = x0.shape[0], (x0.shape[1], x0.shape[2]), self.vae.config.factor
        prompts = [""] * n if prompts is None else prompts
        if isinstance(prompts, str) or len(prompts) != n:
            raise InputError(f"prompts: found {len(prompts)}, expected one for each of the {n} images")
        cfg = self.unet.config
        there = sites(cfg, hw)
        seam.validate(controls, there, norm_sites(cfg, hw))
        recorded = frozenset(s.name for s in there if record is not None and re.search(record, s.name))
        if record is not None and not recorded:
            raise InputError(f"record={record!r}: matches none of the {len(there)} attention sites")
        size = (hw[0] * factor, hw[1] * factor)
        states, added = self.condition(prompts, [None] * n, (*size, 0, 0, *size))
        if guidance_scale is None:
            states, added = states[:, 1:], None if added is None else AddedCond(*(x[:, 1:] for x in added))
        scale = per_image("guidance_scale", 1.0 if guidance_scale is None else guidance_scale, n)
        job = Job(noise=x0, context=states, guidance_scale=jnp.asarray(scale), added=added)
        inversion = DDIMInversion.create(self.schedule, steps, label)
        parts = []
        for rows, kept in batches(n, batch_size, mesh, controls):
            live = tuple(seam.take_rows(seam.tile_rows(c, n), rows) for c in controls)
            found = invert_rows(self.unet, mesh, recorded, self.params["unet"], inversion, job.take(rows), live)
            parts.append(jax.tree.map(lambda y, kept=kept: y[:kept], found))
        found_states, features = jax.tree.map(lambda *x: jnp.concatenate(x) if len(x) > 1 else x[0], *parts)
        return Inverted(found_states, features, label)

    def decode(
        self, latents: Float[AnyArray, "n h w c"], mesh: Mesh | None = None, tile: int | None = None
    ) -> np.ndarray:
        """Decode latents, as `generate` gives them, to images (n, H, W, 3) uint8. Rows must divide by the devices.

        ``tile`` (latent cells) decodes in overlapping tiles of that side, in the memory of one.
        """
        return to_uint8(decode(self.vae, mesh, tile, self.params["vae"], jnp.asarray(latents)))

    # Files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, dtype: Any = None) -> None:
        """Write a diffusers folder, or a single file if ``path`` ends in .safetensors; torch diffusers opens both.

        ``dtype`` (such as ``jnp.float16``) casts the weights on the way.
        """
        save_pipeline(self, path, dtype)
