"""The flags of a job: general ones, and those of all methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from infer.checks import (
    Times,
    check_file,
    check_number,
    check_pixels,
    check_sampler,
    check_seed,
    check_share,
    check_spacing,
    check_steps,
    check_text,
    seed_ranges,
)
from infer.grid import read_axes
from infer.methods.method import Flags as Base
from infer.methods.registry import Flags
from infer.wording import check_embeddings, check_layers_skipped
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Plain(Base):
    """The flags of every job.

    Attributes:
        model: "mini" (embedded), a diffusers folder, a single .safetensors file, a hub id "owner/name", or any of these
            in gs://, s3:// or hf://, as all files and pictures may be
        prompt: one prompt to draw
        prompts: a .txt (one prompt per line), .jsonl (one object per line: prompt, and optionally negative_prompt,
            seed, steps, guidance_scale, guidance_rescale, sampler, spacing, eta, height, width, image, mask, strength,
            id, and the fields of methods), .csv or .parquet file, - for standard input, or "builtin"; without either
            flag the built-in prompts are drawn
        num_images: images of each prompt or row, with seeds that count up
        set: KEY=VALUE,VALUE,... draws each row with each of the values; the flag may be repeated: every combination, as
            a labelled sheet for each two keys. KEY is a field of rows, or a word that stands as __word__ in prompts;
            values are a list with commas (in quotes where they have some), a JSON list, or the lines of @FILE
        out: folder, also in gs:// or s3://, for the PNGs, manifest.jsonl, contact_sheet.png and gallery.html; the same
            command goes on with what it holds; default: the first of gallery, gallery-2, ... that is not there yet
        negative_prompt: what to steer away from, for rows without their own; "" is encoded, none at all is zeros for a
            model trained so (SDXL base)
        prompt_2: what SDXL's second text encoder reads instead of the prompt; default: the same
        negative_prompt_2: likewise instead of the negative prompt
        prompt_syntax: how prompts weigh words: a1111 is (word), [word], (word:1.2) and BREAK, comfy is (word) and
            (word:1.2), compel is word+, word- and (some words)1.2, plain takes every sign for text
        max_chunks: refuse prompts of more chunks of 75 tokens (30 for mini) than this; default: any length
        clip_skip: last layers of the text encoders that are left out for the prompt, as diffusers counts (one less
            than A1111)
        embedding: a learnt embedding (textual inversion) that prompts name, FILE[:TOKEN]; default TOKEN: the key in
            diffusers' files, the file's name in others; the flag may be repeated, or given a JSON list
        steps: denoising steps, from 1 to the 1000 with which models are usually trained; default: the model's own; for
            StyleID 50, or 20 with --pairing diffusers
        guidance_scale: classifier-free guidance, at most 1 for none (no unit); default: the model's own
        guidance_rescale: how far to reduce guided predictions to the unguided contrast, 0 to 1 (no unit)
        sampler: the solver: ddim, euler, euler_ancestral, heun, lms, dpmpp_2m, dpmpp_2m_sde, dpmpp_sde, unipc, pndm,
            lcm or tcd; euler to unipc also with a spacing, as in dpmpp_2m_karras; default: the model's own, or ddim for
            methods that invert pictures
        spacing: where the sampler steps: leading, trailing, linspace (of timesteps), karras, exponential, beta,
            sgm_uniform (of noise levels, for euler to unipc); default: the sampler's or the model's own
        eta: how much noise ddim (by default 0) or tcd (0.3) adds in each step, 0 to 1 (no unit)
        height: of the images in pixels, a multiple of 8; default: the model's own
        width: of the images in pixels, a multiple of 8; default: the model's own
        image: a picture to start from (image-to-image)
        mask: a picture, white where `image` is to be repainted (inpainting)
        strength: how much of `image` is drawn anew, above 0 and up to 1
        seed: seed of row 0, 0 to 2^64 - 1; row k draws with seed + k unless it has its own; -1 draws one at random for
            each row, once for a folder
        seeds: several seeds, as in 1-8,12: each prompt or row is drawn with each of them
        batch_size: images denoised together (more are faster, but need more memory); no image depends on it
        dtype: number format of weights and computation; auto is the widest in which the weights are stored
        vae: a VAE instead of the model's: its folder or .safetensors file, or a model that has it
        base: a model that gives everything but the UNet, where `model` is a UNet alone
        prediction_type: what the UNet predicts, epsilon, v_prediction or sample; default: as the model says
        zero_snr: whether the noise schedule ends without any signal, true or false; default: as the model says
        tile: decode large images in tiles of this many pixels, in the memory of one
        devices: number of accelerators (or CPU devices) that share a batch; default: all, up to one per image
        distributed: share the job with the other processes of a TPU pod or a cluster, under jax.distributed; each
            draws whole batches on its own devices, and all see the folder
        worker: which of the `workers` this process is, from 0; each draws its share, whenever it runs
        workers: number of processes that share the job without knowing of each other
        engine: ray draws on the machines of a Ray cluster (pip install 'jaxmix-diffusion[ray]')
        resources: with --engine ray what each of the processes there takes, as in TPU=4, GPU=1 or CPU=2; default: the
            chips of a TPU host, else a GPU, else a CPU core
        resume: keep the rows that the folder already holds with the same settings, even if another command drew them
        overwrite: remove what the folder holds of an earlier job, and start anew
        strict: draw nothing if any row is bad
        dry_run: check the rows, print the plan, draw nothing
    """

    model: str = "mini"
    prompt: str | None = None
    prompts: str | None = None
    num_images: int = 1
    set: list[str] | str | None = None
    out: str | None = None
    negative_prompt: str | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    prompt_syntax: Literal["a1111", "comfy", "compel", "plain"] = "a1111"
    max_chunks: int | None = None
    clip_skip: int = 0
    embedding: list[str] | str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    sampler: str | None = None
    spacing: str | None = None
    eta: float | None = None
    height: int | None = None
    width: int | None = None
    image: str | None = None
    mask: str | None = None
    strength: float = 0.8
    seed: int = 0
    seeds: str | None = None
    batch_size: int = 8
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    vae: str | None = None
    base: str | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    zero_snr: bool | None = None
    tile: int | None = None
    devices: int | None = None
    distributed: bool = False
    worker: int = 0
    workers: int = 1
    engine: Literal["local", "ray"] = "local"
    resources: str | None = None
    resume: bool = False
    overwrite: bool = False
    strict: bool = False
    dry_run: bool = False

    #: What other tools call these flags.
    aliases: ClassVar[Mapping[str, str]] = {
        "num_inference_steps": "steps",
        "ddim_steps": "steps",
        "scheduler": "sampler",
        "num_images_per_prompt": "num_images",
        "num_outputs": "num_images",
        "n_iter": "num_images",
        "n_samples": "num_images",
        "W": "width",
        "H": "height",
        "scale": "guidance_scale",
        "cfg": "guidance_scale",
        "cfg_scale": "guidance_scale",
        "negative": "negative_prompt",
        "init_image": "image",
        "init_img": "image",
        "mask_image": "mask",
        "from_file": "prompts",
        "outdir": "out",
        "output": "out",
        "output_dir": "out",
        "ckpt": "model",
        "pretrained_model_name_or_path": "model",
        "precision": "dtype",
        "rescale_betas_zero_snr": "zero_snr",
        "base_model": "base",
        "vae_path": "vae",
        "pretrained_vae_model_name_or_path": "vae",
    }

    def __post_init__(self) -> None:
        """Refuse flags out of range."""
        super().__post_init__()
        if self.prompt is not None and self.prompts is not None:
            raise InputError("--prompt and --prompts: found both, expected one of them")
        check_seed("--seed", self.seed)
        if self.seeds is not None and (self.seed or self.num_images > 1):
            other = "--seed" if self.seed else "--num-images"
            raise InputError(f"--seeds and {other}: found both, expected one of them")
        self.times  # noqa: B018  refuses what is no list of seeds
        if self.seeds is not None and "seed" in [axis.key for axis in read_axes(self.set)]:
            raise InputError("--seeds and --set seed: found both, expected one of them")
        if self.steps is not None:
            check_steps("--steps", self.steps)
        if self.guidance_scale is not None:
            check_number("--guidance-scale", self.guidance_scale)
        for flag, value, check in (
            ("--negative-prompt", self.negative_prompt, check_text),
            ("--prompt-2", self.prompt_2, check_text),
            ("--negative-prompt-2", self.negative_prompt_2, check_text),
            ("--clip-skip", self.clip_skip, check_layers_skipped),
            ("--embedding", self.embedding, check_embeddings),
            ("--sampler", self.sampler, check_sampler),
            ("--spacing", self.spacing, check_spacing),
            ("--eta", self.eta, check_share),
            ("--height", self.height, check_pixels),
            ("--width", self.width, check_pixels),
            ("--guidance-rescale", self.guidance_rescale, check_share),
            ("--strength", self.strength, check_share),
            ("--image", self.image, check_file),
            ("--mask", self.mask, check_file),
            ("--tile", self.tile, check_pixels),
        ):
            if value is not None:
                check(flag, value)
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite: found both, expected one of them")
        check_shares(self)
        counts = ("--batch-size", self.batch_size), ("--devices", self.devices), ("--num-images", self.num_images)
        for flag, value in (*counts, ("--max-chunks", self.max_chunks)):
            if value is not None and value < 1:
                raise InputError(f"{flag}: found {value}, expected at least 1")

    @property
    def on_ray(self) -> bool:
        """Whether a Ray cluster draws."""
        return self.engine == "ray"

    @property
    def times(self) -> Times:
        """How often each row is drawn, or the seeds with which it is."""
        return self.num_images if self.seeds is None else seed_ranges("--seeds", self.seeds)


def check_shares(flags: Plain) -> None:
    """Raise InputError for flags that split a job in two ways, or in none that works."""
    if flags.workers < 1 or not 0 <= flags.worker < flags.workers:
        most = f"0 to {flags.workers - 1} with --workers {flags.workers}" if flags.workers > 0 else "--workers above 0"
        raise InputError(f"--worker: found {flags.worker}, expected {most}")
    ways = [("--distributed", flags.distributed), ("--workers", flags.workers > 1), ("--engine ray", flags.on_ray)]
    if len(found := [flag for flag, there in ways if there]) > 1:
        raise InputError(f"{found[0]} and {found[1]}: found both, expected one of them")
    if flags.workers > 1 and (flags.out is None or flags.overwrite):
        found = "no --out" if flags.out is None else "--overwrite, with which each would remove what others draw"
        raise InputError(f"--workers: found {found}, expected one folder that all of them fill")
    if flags.resources is not None and not flags.on_ray:
        raise InputError(f"--resources: found {flags.resources!r} without --engine ray, which needs it")


@dataclasses.dataclass(frozen=True)
class Config(Flags, Plain):
    """What to draw, how, and where."""
