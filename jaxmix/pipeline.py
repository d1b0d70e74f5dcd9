"""The roof: a Stable Diffusion pipeline as one frozen object, from prompts to pixels on any number of devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from jaxmix import control as seam
from jaxmix.control import Control, Controls
from jaxmix.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel
from jaxmix.models.clip import TextStates
from jaxmix.models.unet import norm_sites, sites
from jaxmix.samplers import DDIM, Phase, classifier_free_guidance, initial_noise, sample, seed_array
from jaxmix.saving import save_folder
from jaxmix.schedule import NoiseSchedule
from jaxmix.sharding import DATA
from jaxmix.types import Array, InputError, ModelFn, Params


def _over_rows(fn: Callable[..., Any], mesh: Mesh | None, in_specs: Any) -> Callable[..., Any]:
    """Run ``fn`` on each device's rows.

    shard_map and not jit with shardings: every device then runs the one-device program on its own rows, so no
    partitioner can put a collective into the loop, and per-device kernels work unchanged.
    """
    if mesh is None:
        return fn
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(DATA))


@functools.partial(jax.jit, static_argnames=("unet", "schedule", "steps", "mesh"))
def denoise(
    unet: UNet2DConditionModel,
    schedule: NoiseSchedule,
    steps: int,
    mesh: Mesh | None,
    params: Params,
    latents: Float[Array, "n h w c"],
    context: Float[Array, "n 2 s d"],
    guidance_scale: Float[Array, " n"],
    controls: Controls,
) -> Float[Array, "n h w c"]:
    """Sample latents by DDIM under classifier-free guidance; the whole loop is one program.

    ``context`` holds the unconditional and the conditional text states of each image; ``controls`` have one row an
    image. Guidance scales, contexts, latents and controls are traced. The keys and values of every attn2 are computed
    once, before the loop.
    """
    hw = (latents.shape[1], latents.shape[2])

    def run(params: Params, latents: Array, context: Array, scale: Array, controls: Controls) -> Array:
        rows = context.reshape(-1, *context.shape[2:])  # branch minor: u0, c0, u1, c1, ...
        controls = tuple(seam.to_branches(c) for c in controls)

        def model(live: Controls) -> ModelFn:
            kv = unet.precompute(params, rows, hw, live)

            def predict(x: Array, t: Array, step: Array) -> Array:
                return unet.apply({"params": params}, x, t, kv, tuple(c.at(step) for c in live))

            return classifier_free_guidance(predict, scale)

        spans = seam.phases(controls, steps)
        return sample([Phase(model(live), a, b) for a, b, live in spans], DDIM.create(schedule, steps), latents)

    row = PartitionSpec(DATA)
    specs = (PartitionSpec(), row, row, row, tuple(seam.row_specs(c, DATA) for c in controls))
    return _over_rows(run, mesh, specs)(params, latents, context, guidance_scale, controls)


@functools.partial(jax.jit, static_argnames=("vae", "mesh"))
def decode(vae: AutoencoderKL, mesh: Mesh | None, params: Params, latents: Float[Array, "n h w c"]) -> Array:
    """Decode scaled latents to images (n, H, W, 3) in [0, 1], float32."""

    def run(params: Params, latents: Array) -> Array:
        x = vae.apply({"params": params}, latents / vae.config.scaling_factor, method="decode")
        return jnp.clip(x / 2 + 0.5, 0.0, 1.0)

    return _over_rows(run, mesh, (PartitionSpec(), PartitionSpec(DATA)))(params, latents)


@functools.partial(jax.jit, static_argnames=("text_encoder",))
def encode_ids(text_encoder: CLIPTextModel, params: Params, ids: Array) -> TextStates:
    """Encode token ids (b, s)."""
    return text_encoder.apply({"params": params}, ids)


_noise = jax.jit(initial_noise, static_argnames=("shape",))


def _to_uint8(images: Array) -> np.ndarray:
    return np.asarray(jnp.round(images * 255.0).astype(jnp.uint8))


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Stable Diffusion 1.x: modules, their parameters, the noise schedule and the tokenizer.

    ``params`` has the trees "unet", "vae" and "text_encoder". ``tokenizer`` is a transformers CLIPTokenizer, or the
    folder of one, which is opened when the first prompt comes.
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
        text, unet, vae = self.text_encoder.config, self.unet.config, self.vae.config
        if text.hidden_size != unet.cross_attention_dim:
            raise InputError(
                f"pipeline: text_encoder hidden_size is {text.hidden_size}, unet cross_attention_dim is "
                f"{unet.cross_attention_dim}: expected the same"
            )
        if unet.in_channels != vae.latent_channels:
            raise InputError(
                f"pipeline: unet in_channels is {unet.in_channels}, expected the {vae.latent_channels} latent channels "
                "of the vae (text-to-image)"
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
    def _tokenizer(self) -> Any:
        if not isinstance(self.tokenizer, (str, Path)):
            return self.tokenizer
        from transformers import CLIPTokenizer

        if not any((Path(self.tokenizer) / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            raise InputError(f"{self.tokenizer}: no vocab.json or tokenizer.json here, expected a CLIP tokenizer")
        return CLIPTokenizer.from_pretrained(str(self.tokenizer))

    def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """Return token ids (b, text_length) int32, and for each prompt the words that did not fit ("" if all did)."""
        tok, n = self._tokenizer, self.text_length
        ids, cut = [], []
        for prompt in prompts:
            whole = tok(prompt, verbose=False)["input_ids"]  # not verbose: the caller words the warning
            cut.append(tok.decode(whole[n - 1 : -1]).strip() if len(whole) > n else "")
            ids.append(tok(prompt, padding="max_length", max_length=n, truncation=True)["input_ids"])
        return np.asarray(ids, np.int32).reshape(-1, n), cut

    def encode_text(self, prompts: Sequence[str]) -> TextStates:
        """Return the text states (b, s, d) and the state at the end-of-text token (b, d) of each prompt."""
        ids, _ = self.tokenize(prompts)
        return encode_ids(self.text_encoder, self.params["text_encoder"], jnp.asarray(ids))

    def encode_prompt(self, prompts: Sequence[str]) -> Float[Array, "b s d"]:
        """Return what the UNet attends to for each prompt."""
        return self.encode_text(prompts).last_hidden_state

    # Pictures ----------------------------------------------------------------------------------------------------

    def initial_latents(self, seeds: Sequence[int]) -> Float[Array, "n h w c"]:
        """Return the start noise of each seed: row i depends on ``seeds[i]`` alone."""
        return _noise(jnp.asarray(seed_array(seeds)), shape=self.latent_shape)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        controls: Sequence[Control] = (),
        *,
        negative_prompts: Sequence[str] | None = None,
        latents: Float[Array, "n h w c"] | None = None,
        mesh: Mesh | None = None,
        output: str = "uint8",
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Draw one image a prompt.

        ``seeds`` (0, 1, ... if None) fix the noise of each image alone, whatever the batch, the order or the number of
        devices; ``latents`` (n, h, w, c) give the start noise itself. ``guidance_scale`` is a number or one an image.
        ``mesh`` (see `jaxmix.data_mesh`) splits the rows over devices. Rows are drawn ``batch_size`` at a time, all at
        once if None; the last batch is padded to the same size, so each (steps, batch size) compiles once.

        Returns (n, H, W, 3) uint8, "float" in [0, 1], or "latent" (n, h, w, c) as the UNet sees them. Raises
        `InputError` for lists of different lengths, steps out of range, and controls that do not fit.
        """
        n = len(prompts)
        if isinstance(prompts, str) or n == 0:
            raise InputError(f"prompts: found {prompts!r}, expected a list of at least one prompt")
        if output not in ("uint8", "float", "latent"):
            raise InputError(f"output={output!r}: expected 'uint8', 'float' or 'latent'")
        steps = self.default_steps if steps is None else steps
        self.schedule.timesteps(steps)  # raises for an impossible number before anything runs
        seeds = list(range(n)) if seeds is None else seeds
        negatives = [""] * n if negative_prompts is None else negative_prompts
        for name, found in (("seeds", seeds), ("negative_prompts", negatives)):
            if isinstance(found, str) or len(found) != n:
                raise InputError(f"{name}: found {len(found)}, expected one for each of the {n} prompts")
        scale = np.asarray(self.default_guidance_scale if guidance_scale is None else guidance_scale, np.float32)
        if scale.shape not in ((), (n,)):
            raise InputError(
                f"guidance_scale: found {len(scale)} values, expected 1 or one for each of the {n} prompts"
            )
        noise = self.initial_latents(seeds) if latents is None else jnp.asarray(latents, jnp.float32)
        if noise.shape[0] != n or noise.ndim != 4 or noise.shape[-1] != self.latent_shape[-1]:
            raise InputError(f"latents: found shape {noise.shape}, expected ({n}, h, w, {self.latent_shape[-1]})")
        hw = (noise.shape[1], noise.shape[2])
        cfg = self.unet.config
        seam.validate(controls, sites(cfg, hw), norm_sites(cfg, hw))
        tiled = tuple(seam.tile_rows(c, n) for c in controls)
        # One call for both branches of all images, so that equal prompts are encoded equally.
        context = self.encode_prompt([text for pair in zip(negatives, prompts, strict=True) for text in pair])
        context = context.reshape(n, 2, *context.shape[1:])
        scale = jnp.broadcast_to(jnp.asarray(scale), (n,))

        devices = 1 if mesh is None else mesh.shape[DATA]
        size = -(-(batch_size or n) // devices) * devices
        parts = []
        for start in range(0, n, size):
            rows = jnp.minimum(jnp.arange(start, start + size), n - 1)  # the tail repeats the last image
            batch_controls = tuple(seam.take_rows(c, rows) for c in tiled)
            x = denoise(
                self.unet,
                self.schedule,
                steps,
                mesh,
                self.params["unet"],
                noise[rows],
                context[rows],
                scale[rows],
                batch_controls,
            )
            if output != "latent":
                x = decode(self.vae, mesh, self.params["vae"], x)
            parts.append((_to_uint8(x) if output == "uint8" else np.asarray(x))[: n - start])
        return np.concatenate(parts)

    def decode(self, latents: Float[Array, "n h w c"], mesh: Mesh | None = None) -> np.ndarray:
        """Decode latents, as `generate` gives them, to images (n, H, W, 3) uint8. Rows must divide by the devices."""
        return _to_uint8(decode(self.vae, mesh, self.params["vae"], jnp.asarray(latents)))

    # Folders -----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, dtype: Any = None) -> None:
        """Write a diffusers folder, which torch diffusers opens as a StableDiffusionPipeline.

        ``dtype`` (such as ``jnp.float16``) casts the weights on the way.
        """
        save_folder(self, folder, dtype)
