"""Train an IP-Adapter (arXiv 2308.06721) for a frozen Stable Diffusion 1.x, 2.x or XL base.

What learns: the projection that makes tokens of what CLIP sees in the whole picture, and in every attn2 the keys and
values of those tokens, which begin as copies of the text's. Base and image encoder are arguments of the step and held
once; a cache (train.cache_latents --image_encoder) replaces autoencoder, text encoders and image encoder.

    python -m train.ip_adapter --config configs/ip_adapter_mini.yaml --output_dir runs/ip
    python -m train.ip_adapter --config configs/ip_adapter_sd15.yaml --output_dir runs/ip --train_data_dir pictures
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxmix
from jaxmix import IPAdapter, command
from jaxmix.controls import ip_adapter as maths
from jaxmix.models import AddedCond
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.vision import as_picture
from jaxmix.types import InputError
from train.adapters import (
    AdapterConfig,
    check_scenes,
    check_validation_images,
    freeze,
    left_out,
    make_captioned,
    on_host,
    open_base,
    open_pictures,
)
from train.data import LatentCache, make_look
from train.data.cache import SEEN
from train.diffusion import make_tokenize, train_denoiser
from train.grid import fitted, make_grid
from train.scenes import Scenes

FILE = "ip_adapter.safetensors"
_HELD_OUT = 990_001  # added to the seed of the scenes that validation refers to


@dataclasses.dataclass
class Config(AdapterConfig):
    """The IP-Adapter trainer's keys, after those of every trainer of an adapter.

    Of each row one number is drawn, which leaves out the picture, the caption, or both.

    Attributes:
        image_encoder: folder or file of the CLIP image encoder, or "mini-clip".
        kind: base (tokens of CLIP's projection), plus (a resampler of its states) or full (one of each state).
        tokens: number of tokens of a picture; null for the authors', 4 (base) or 16 (plus).
        pretrained_ip_adapter: begin with this adapter, of the same kind, instead of a fresh one.
        image_dropout_rate: share of rows that do without the picture.
        caption_dropout_rate: share of rows that do without the caption.
        both_dropout_rate: share of rows that do without either.
        validation_images: pictures to follow, one for each validation prompt; of scenes, unseen ones are taken.
        validation_scales: scales at which validation pictures follow picture and prompt.
    """

    image_encoder: str = ""
    kind: Literal["base", "plus", "full"] = "base"
    tokens: int | None = None
    pretrained_ip_adapter: str = ""
    image_dropout_rate: float = 0.05
    caption_dropout_rate: float = 0.05
    both_dropout_rate: float = 0.05
    validation_images: list[str] = dataclasses.field(default_factory=list)
    validation_scales: list[float] = dataclasses.field(default_factory=lambda: [0.5, 1.0])

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        super().__post_init__()
        if not self.image_encoder:
            raise InputError("image_encoder: not given, expected the CLIP that reads the pictures")
        if self.tokens is not None and (self.tokens < 1 or self.kind == "full"):
            raise InputError(f"tokens: found {self.tokens} for {self.kind}, expected null, or base or plus")
        if self.image_dropout_rate + self.caption_dropout_rate + self.both_dropout_rate > 1:
            raise InputError("image_dropout_rate, caption_dropout_rate, both_dropout_rate: found a sum above 1")
        check_validation_images(self)


class SeenScenes:
    """Scenes as rows of captioned pictures, with the pixels that the image encoder reads."""

    def __init__(self, scenes: Scenes, look: Callable[[np.ndarray], dict[str, np.ndarray]]):
        self.scenes, self.look = scenes, look

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scenes[index]
        return {"image": scene["image"], "text": scene["text"], "id": f"scene {index}", **self.look(scene["image"])}


def open_rows(cfg: Config, pipe: Pipeline, encoder: jaxmix.ImageEncoder) -> Any:
    """Return the source of rows that the config names; a cache must be one of this image encoder."""
    look = make_look(encoder)
    if cfg.scenes:
        check_scenes(pipe)
        return SeenScenes(Scenes(**cfg.scenes), look)
    rows = open_pictures(cfg, pipe, None, look)
    if isinstance(rows, LatentCache):
        rows.check(pipe, cfg, encoder)
        if cfg.kind != "base" and SEEN[1] not in rows.empty:
            raise InputError(
                f"{rows.folder}: found no states of the image encoder, which a {cfg.kind} adapter reads, expected a "
                "cache made with --image_states true"
            )
    return rows


def make_rows(
    tokenize: Callable[[str], dict[str, np.ndarray]], cfg: Config
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, Any]]:
    """Return the transform from a source's row to arrays, see `make_captioned`.

    "pixels" (S, S, 3) float32 is the picture for the image encoder, or "seen" what it sees in it, (p,) or (s, d); and
    "unseen" () float32 is 1 if the picture is left out.
    """
    captioned = make_captioned(tokenize)
    seen = SEEN[0] if cfg.kind == "base" else SEEN[1]

    def row(source: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        shares = (cfg.image_dropout_rate, cfg.caption_dropout_rate, cfg.both_dropout_rate)
        unseen, dropped = left_out(rng.random(), *shares)
        picture = {"seen": source[seen]} if seen in source else {"pixels": source["pixels"]}
        return {**captioned(source, dropped), **picture, "unseen": np.float32(unseen)}

    return row


def make_adapter(pipe: Pipeline, encoder: jaxmix.ImageEncoder, cfg: Config) -> IPAdapter:
    """Return the adapter before training."""
    if not cfg.pretrained_ip_adapter:
        return IPAdapter.init(jax.random.key(cfg.seed), pipe, encoder, cfg.kind, cfg.tokens)
    found = IPAdapter.load(cfg.pretrained_ip_adapter, pipe, encoder)
    if found.kind != cfg.kind:
        raise InputError(f"pretrained_ip_adapter: found a {found.kind} adapter, expected kind {cfg.kind}")
    return found


def freeze_encoder(encoder: jaxmix.ImageEncoder, rows: Any, cfg: Config) -> dict[str, Any]:
    """Return what a step needs of the image encoder, and "grey", its states of no picture, unless it is zeros."""
    cached = isinstance(rows, LatentCache)
    frozen: dict[str, Any] = {} if cached else {"image_encoder": encoder.params}
    if cfg.kind != "base":
        frozen["grey"] = jnp.asarray(rows.empty[SEEN[1]] if cached else encoder.none.penultimate[0])
    return frozen


def make_tokens(encoder: jaxmix.ImageEncoder, cfg: Config) -> Callable[..., jax.Array]:
    """Return (params, frozen, batch) -> tokens (b, t, c) of the rows' pictures, or of none where it is left out."""

    def tokens(params: Any, frozen: Any, batch: Any) -> jax.Array:
        if "seen" in batch:
            seen = batch["seen"]
        else:
            states = encoder.model.apply({"params": frozen["image_encoder"]}, batch["pixels"])
            seen = states.projected if cfg.kind == "base" else states.penultimate
        seen = seen.astype(cfg.dtype)
        unseen = batch["unseen"].astype(bool).reshape(-1, *(1,) * (seen.ndim - 1))
        seen = jnp.where(unseen, frozen.get("grey", jnp.zeros(())).astype(cfg.dtype), seen)
        return maths.project(cfg.kind, params["projection"], seen)

    return tokens


def make_predict(pipe: Pipeline, encoder: jaxmix.ImageEncoder, cfg: Config) -> Callable[..., jax.Array]:
    """Return the prediction under an adapter: the base, which also attends to the tokens of each row's picture."""
    unet = pipe.unet.clone(dtype=cfg.dtype, remat=cfg.gradient_checkpointing)
    look = make_tokens(encoder, cfg)

    def predict(
        params: Any,
        frozen: Any,
        batch: Any,
        noisy: jax.Array,
        t: jax.Array,
        context: jax.Array,
        added: AddedCond | None,
    ) -> jax.Array:
        tokens = look(params, frozen, batch)[:, None]
        layers = params["layers"]
        scale = jnp.ones(tokens.shape[:2])
        control = maths.bind(layers, tokens, tokens, scale=scale, at_site=dict.fromkeys(layers, 1.0))
        return unet.apply({"params": frozen["unet"]}, noisy, t, context, (control,), added)

    return predict


def references(cfg: Config) -> list[np.ndarray]:
    """Return the pictures that validation follows, one for each prompt."""
    if not cfg.scenes:
        return [as_picture(path, f"validation_images[{i}]") for i, path in enumerate(cfg.validation_images)]
    plain = {"two_objects": 0.0, "three_objects": 0.0, "labelled": 0.0}
    scenes = Scenes(**{**cfg.scenes, **plain, "seed": cfg.seed + _HELD_OUT})
    return [scenes[i]["image"] for i in range(len(cfg.validation_prompts))]


def draw_grid(pipe: Pipeline, adapter: IPAdapter, cfg: Config, shown: Sequence[np.ndarray]) -> np.ndarray:
    """Return a sheet with one row per prompt: the picture to follow, the prompt alone, the picture alone, and both."""
    prompts, n = cfg.validation_prompts, len(cfg.validation_prompts)
    options: dict[str, Any] = {
        "guidance_scale": cfg.validation_guidance_scale,
        "batch_size": cfg.validation_batch_size,
    }
    columns = {"prompt": pipe.generate(prompts, range(n), **options)}
    told = [("picture", [""] * n, 1.0), *((f"both x{scale:g}", prompts, scale) for scale in cfg.validation_scales)]
    for title, texts, scale in told:
        look = adapter.on([[x] for x in shown], scale)
        columns[title] = pipe.generate(list(texts), range(n), methods=(look,), **options)
    side = next(iter(columns.values())).shape[1:3]
    columns = {"follows": np.stack([fitted(x, side) for x in shown]), **columns}
    whole = np.stack(list(columns.values()), 1)
    return make_grid(whole.reshape(-1, *whole.shape[2:]), len(columns), max(1, 128 // side[0]), list(columns))


def main(cfg: Config) -> int:
    """Train, draw on the way, export."""
    pipe = open_base(cfg)
    encoder = jaxmix.ImageEncoder.load(cfg.image_encoder, cfg.dtype)
    fresh = make_adapter(pipe, encoder, cfg)
    pipe, rows = on_host(pipe), open_rows(cfg, pipe, encoder)
    learns = jax.tree.map(lambda x: jnp.array(x, jnp.float32), {"projection": fresh.projection, "layers": fresh.layers})
    shown = references(cfg)

    def trained(params: Any) -> IPAdapter:
        return dataclasses.replace(fresh, **params)

    return train_denoiser(
        cfg,
        pipe,
        learns,
        {**freeze(pipe, rows), **freeze_encoder(encoder, rows, cfg)},
        rows,
        make_rows(make_tokenize(pipe), cfg),
        make_predict(pipe, encoder, cfg),
        lambda params, folder: trained(params).save(folder / FILE),
        lambda params: draw_grid(pipe, trained(params), cfg, shown),
        FILE,
    )


if __name__ == "__main__":
    command.run(main)
