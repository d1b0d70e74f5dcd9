"""Train a ControlNet (arXiv 2302.05543) for a frozen Stable Diffusion 1.x, 2.x or XL base.

What learns: a copy of the UNet's way down, a small encoder of hints, and the 1x1 convolutions, zero at first, through
which it reaches the base, which is an argument of the step and held once. Hints are a second picture of each row
(conditioning_image_column) or maps of the row's own (preprocess), cropped and mirrored with it.

    python -m train.controlnet --config configs/controlnet_mini.yaml --output_dir runs/edges
    python -m train.controlnet --config configs/controlnet_sd15.yaml --output_dir runs/edges --train_data_dir pictures
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmix
from jaxmix import ControlNet, command
from jaxmix.controls import controlnet as maths
from jaxmix.models import AddedCond
from jaxmix.models.controlnet import ControlNetModel
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.vision import as_picture
from jaxmix.preprocessors import preprocess
from jaxmix.rows import Text
from jaxmix.types import InputError
from train.adapters import (
    AdapterConfig,
    check_scenes,
    check_validation_images,
    freeze,
    make_captioned,
    on_host,
    open_base,
)
from train.data import LatentCache, hint_name, make_hint, open_batches
from train.diffusion import make_tokenize, train_denoiser
from train.grid import fitted, make_grid
from train.scenes import Scenes

FOLDER = "controlnet"
MASKS = "masks"
COLOURS = np.asarray([(0, 0, 0), (230, 60, 60), (60, 200, 80), (70, 110, 240)], np.uint8)
"""What maps of scenes show: the background, and the first to the third object."""

_HELD_OUT = 990_001  # added to the seed of the scenes that validation follows


@dataclasses.dataclass
class Config(AdapterConfig):
    """The ControlNet trainer's keys, after those of every trainer of an adapter.

    Attributes:
        conditioning_image_column: the metadata's column with the hint's file (of tars, KEY.COLUMN.png); none if empty.
        preprocess: what makes the hint of that picture, or of the row's own: see infer.preprocess; of scenes also
            masks, their objects by colour. Of a cache it is what the cache was made with.
        pretrained_controlnet: begin with this net instead of a copy of the base.
        conditioning_embedding_out_channels: channels of the encoder of hints, each after the first at half the size;
            null for the authors'.
        caption_dropout_rate: share of rows that do without the caption (the authors: 0.5, diffusers' default: 0).
        validation_images: hints that validation follows, one for each prompt; of scenes, unseen ones are taken.
        validation_scales: scales at which validation pictures follow their hints.
    """

    conditioning_image_column: str = ""
    preprocess: str = ""
    pretrained_controlnet: str = ""
    conditioning_embedding_out_channels: list[int] | None = None
    caption_dropout_rate: float = 0.0
    validation_images: list[str] = dataclasses.field(default_factory=list)
    validation_scales: list[float] = dataclasses.field(default_factory=lambda: [0.5, 1.0])

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        super().__post_init__()
        if self.scenes and self.conditioning_image_column:
            raise InputError("conditioning_image_column: found it with scenes, which have none, expected preprocess")
        if not (self.conditioning_image_column or self.preprocess not in ("", "none")):
            raise InputError(
                "conditioning_image_column, preprocess: found neither, expected what a hint is made of: a column of "
                "the metadata, canny, tile, ..."
            )
        if self.preprocess == MASKS and not self.scenes:
            raise InputError("preprocess: found masks without scenes, expected conditioning_image_column for them")
        if self.preprocess != MASKS:
            make_hint(self.conditioning_image_column, self.preprocess)
        check_validation_images(self)


def coloured(masks: np.ndarray) -> np.ndarray:
    """Return masks bool (k, H, W) of objects as a map uint8 (H, W, 3), see `COLOURS`."""
    held = np.zeros(masks.shape[1:], np.int64)
    for i, mask in enumerate(masks):
        held[mask] = i + 1
    return COLOURS[held]


def scene_hint(scene: Mapping[str, Any], how: str) -> np.ndarray:
    """Return the hint of a scene, uint8 (H, W, 3)."""
    return coloured(scene["masks"]) if how == MASKS else preprocess(scene["image"], how)


class HintedScenes:
    """Scenes as rows of captioned pictures with hints."""

    def __init__(self, cfg: Config) -> None:
        self.scenes, self.how = Scenes(**cfg.scenes), cfg.preprocess

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scenes[index]
        hint = scene_hint(scene, self.how)
        return {"image": scene["image"], "text": scene["text"], "id": f"scene {index}", "hint": hint}


def open_rows(cfg: Config, pipe: Pipeline) -> Any:
    """Return the source of rows that the config names; a cache must have hints of the same kind."""
    if cfg.scenes:
        check_scenes(pipe)
        return HintedScenes(cfg)
    column, how = cfg.conditioning_image_column, cfg.preprocess
    rows = open_batches(
        cfg.train_data_dir,
        cfg,
        pipe,
        None,
        cfg.text_column,
        cfg.image_column,
        hint_column=column,
        hint=make_hint(column, how),
    )
    wanted = hint_name(column, how)
    if isinstance(rows, LatentCache) and rows.index.hint != wanted:
        raise InputError(
            f"{rows.folder}: found a cache with {rows.index.hint or 'no'} hints, expected {wanted}: one made with "
            "the same conditioning_image_column and preprocess"
        )
    print(rows.describe(), flush=True)
    return rows


def make_rows(
    tokenize: Callable[[str], dict[str, np.ndarray]], cfg: Config
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, Any]]:
    """Return the transform from a source's row to arrays, see `make_captioned`, with "hint" uint8 (H, W, 3)."""
    captioned = make_captioned(tokenize)

    def row(source: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {**captioned(source, rng.random() < cfg.caption_dropout_rate), "hint": source["hint"]}

    return row


def make_net(pipe: Pipeline, cfg: Config) -> ControlNet:
    """Return the net before training, in float32."""
    if cfg.pretrained_controlnet:
        found = ControlNet.load(cfg.pretrained_controlnet, pipe)
    else:
        widths, factor = cfg.conditioning_embedding_out_channels, pipe.vae.config.factor
        if widths and (smaller := 2 ** (len(widths) - 1)) != factor:
            raise InputError(
                f"conditioning_embedding_out_channels: found {len(widths)}, which make hints {smaller} times smaller, "
                f"expected {factor.bit_length()}: {factor} times, as the model's autoencoder does"
            )
        found = ControlNet.init(jax.random.key(cfg.seed), pipe, widths)
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), found.params)
    return dataclasses.replace(found, params=params)


def make_predict(pipe: Pipeline, net: ControlNet, cfg: Config) -> Callable[..., jax.Array]:
    """Return the prediction of the base beside the net, which sees each row's hint."""
    unet = pipe.unet.clone(dtype=cfg.dtype, remat=cfg.gradient_checkpointing)
    model = ControlNetModel(net.config, cfg.dtype, remat=cfg.gradient_checkpointing)

    def predict(
        params: Any,
        frozen: Any,
        batch: Any,
        noisy: jax.Array,
        t: jax.Array,
        context: jax.Array,
        added: AddedCond | None,
    ) -> jax.Array:
        n = len(noisy)
        text = Text(context, *((None, None) if added is None else (added.text_embeds, added.time_ids)))
        hint = batch["hint"].astype(jnp.float32) / 255
        control = maths.bind(model, params, hint, scale=jnp.ones(n), guess=np.zeros(n, bool))
        seen = control.prepare(text, (noisy.shape[1], noisy.shape[2])).see(noisy, t, text)
        return unet.apply({"params": frozen["unet"]}, noisy, t, context, (seen,), added)

    return predict


def hints(cfg: Config) -> list[np.ndarray]:
    """Return the hints that validation follows, one for each prompt."""
    if not cfg.scenes:
        return [as_picture(path, f"validation_images[{i}]") for i, path in enumerate(cfg.validation_images)]
    plain = {"two_objects": 0.0, "three_objects": 0.0, "labelled": 0.0}
    scenes = Scenes(**{**cfg.scenes, **plain, "seed": cfg.seed + _HELD_OUT})
    return [scene_hint(scenes[i], cfg.preprocess) for i in range(len(cfg.validation_prompts))]


def draw_grid(pipe: Pipeline, net: ControlNet, cfg: Config, shown: list[np.ndarray]) -> np.ndarray:
    """Return a sheet with one row per prompt: the hint, the prompt alone, and the hint followed at each scale."""
    prompts, n = cfg.validation_prompts, len(cfg.validation_prompts)
    options: dict[str, Any] = {
        "guidance_scale": cfg.validation_guidance_scale,
        "batch_size": cfg.validation_batch_size,
    }
    columns = {"prompt": pipe.generate(prompts, range(n), **options)}
    for scale in cfg.validation_scales:
        columns[f"x{scale:g}"] = pipe.generate(prompts, range(n), methods=(net.on(shown, scale),), **options)
    side = columns["prompt"].shape[1:3]
    columns = {"hint": np.stack([fitted(x, side) for x in shown]), **columns}
    whole = np.stack(list(columns.values()), 1)
    return make_grid(whole.reshape(-1, *whole.shape[2:]), len(columns), max(1, 128 // side[0]), list(columns))


def main(cfg: Config) -> int:
    """Train, draw on the way, export."""
    pipe = open_base(cfg)
    fresh = make_net(pipe, cfg)
    pipe, rows = on_host(pipe), open_rows(cfg, pipe)
    shown = hints(cfg)

    def trained(params: Any) -> jaxmix.ControlNet:
        return dataclasses.replace(fresh, params=params)

    return train_denoiser(
        cfg,
        pipe,
        fresh.params,
        freeze(pipe, rows),
        rows,
        make_rows(make_tokenize(pipe), cfg),
        make_predict(pipe, fresh, cfg),
        lambda params, folder: trained(params).save(folder / FOLDER),
        lambda params: draw_grid(pipe, trained(params), cfg, shown),
        FOLDER,
    )


if __name__ == "__main__":
    command.run(main)
