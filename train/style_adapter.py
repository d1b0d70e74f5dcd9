"""Train a StyleAdapter (arXiv 2309.01770) for a frozen Stable Diffusion 1.x, 2.x or XL base.

What learns: StyEmb, which makes style tokens of what CLIP sees in several references, and in every attn2 the keys and
values of those tokens and a strength, which begins at 0. Patches of the references are shuffled, and CLIP's class token
is dropped, so that a style comes without its content.

    python -m train.style_adapter --config configs/style_adapter_mini.yaml --output_dir runs/style
    python -m train.style_adapter --config configs/style_adapter_sd15.yaml --output_dir runs/style --train_data_dir DIR
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxmix
from jaxmix import StyleAdapter, command
from jaxmix.controls import style_adapter as maths
from jaxmix.models import AddedCond
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.vision import as_picture, shuffled
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
from train.data import LatentCache
from train.diffusion import make_tokenize, train_denoiser
from train.grid import fitted, make_grid
from train.scenes import Scenes

FILE = "style_adapter.safetensors"
_HELD_OUT = 990_001  # added to the seed of the scenes that validation refers to
_LEAST = 0.5  # side of the smallest view, as a share of the picture's shorter one


@dataclasses.dataclass
class Config(AdapterConfig):
    """The StyleAdapter trainer's keys, after those of every trainer of an adapter.

    Of each row one number is drawn, which leaves out the style, the caption, or both.

    Attributes:
        image_encoder: folder or file of the CLIP image encoder, or "mini-clip".
        tokens: number of style tokens.
        blocks: number of blocks of StyEmb.
        references: number of references of a row.
        references_from: views (crops, mirrored and turned, of the picture itself), or style (of scenes: other scenes of
            its style).
        shuffle: shuffle the patches of references (false is an ablation).
        class_token: keep CLIP's state of the whole picture (true is an ablation).
        style_word_rate: share of the scenes whose caption names their style.
        style_dropout_rate: share of rows that do without the style.
        caption_dropout_rate: share of rows that do without the caption.
        both_dropout_rate: share of rows that do without either.
        validation_images: a picture whose style each validation prompt takes; of scenes, unseen ones are taken.
        validation_scales: scales at which validation pictures take the style.
    """

    image_encoder: str = ""
    tokens: int = 8
    blocks: int = 3
    references: int = 3
    references_from: Literal["views", "style"] = "views"
    shuffle: bool = True
    class_token: bool = False
    style_word_rate: float = 1.0
    style_dropout_rate: float = 0.05
    caption_dropout_rate: float = 0.05
    both_dropout_rate: float = 0.05
    validation_images: list[str] = dataclasses.field(default_factory=list)
    validation_scales: list[float] = dataclasses.field(default_factory=lambda: [0.5, 1.0])

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        super().__post_init__()
        if not self.image_encoder:
            raise InputError("image_encoder: not given, expected the CLIP that reads the references")
        for name in ("tokens", "blocks", "references"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: found {getattr(self, name)}, expected 1 or more")
        if self.style_dropout_rate + self.caption_dropout_rate + self.both_dropout_rate > 1:
            raise InputError("style_dropout_rate, caption_dropout_rate, both_dropout_rate: found a sum above 1")
        if self.references_from == "style" and not self.scenes:
            raise InputError("references_from: found style without scenes, expected views: pictures tell no style")
        check_validation_images(self)


def view(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a square part of a picture uint8 (H, W, 3), of a random place and size, turned and mirrored."""
    height, width = image.shape[:2]
    side = max(1, round(min(height, width) * rng.uniform(_LEAST, 1.0)))
    top, left = (int(rng.integers(extent - side + 1)) for extent in (height, width))
    cut = np.rot90(image[top : top + side, left : left + side], int(rng.integers(4)))
    return np.ascontiguousarray(cut[:, ::-1] if rng.random() < 0.5 else cut)


class StyledScenes:
    """Scenes as rows of captioned pictures: "whole" is the picture, "others" draws pictures of its style."""

    def __init__(self, cfg: Config) -> None:
        self.scenes, self.cfg = Scenes(**cfg.scenes), cfg
        self.by_style = {s: Scenes(**{**cfg.scenes, "styles": [s], "seed": cfg.seed + 1}) for s in self.scenes.styles}

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scenes[index]
        same = self.by_style[scene["style_name"]]

        def others(rng: np.random.Generator) -> list[np.ndarray]:
            return [same[int(i)]["image"] for i in rng.integers(len(same), size=self.cfg.references)]

        return {"image": scene["image"], "text": scene["text"], "id": f"scene {index}", "others": others}


def open_rows(cfg: Config, pipe: Pipeline) -> Any:
    """Return the source of rows that the config names."""
    if cfg.scenes:
        check_scenes(pipe)
        return StyledScenes(cfg)
    rows = open_pictures(cfg, pipe, None, lambda image: {"whole": image})
    if isinstance(rows, LatentCache):
        raise InputError(
            f"{rows.folder}: found a cache, which has no pictures to make views of, expected pictures: a folder with a "
            "metadata.jsonl, or WebDataset tars"
        )
    return rows


def make_rows(
    tokenize: Callable[[str], dict[str, np.ndarray]], encoder: jaxmix.ImageEncoder, cfg: Config
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, Any]]:
    """Return the transform from a source's row to arrays, see `make_captioned`.

    "references" (k, S, S, 3) float32 are pixels for the image encoder, with their patches shuffled; "unstyled" ()
    float32 is 1 if the style is left out.
    """
    captioned, patch = make_captioned(tokenize), encoder.model.config.patch_size

    def row(source: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        shares = (cfg.style_dropout_rate, cfg.caption_dropout_rate, cfg.both_dropout_rate)
        unstyled, dropped = left_out(rng.random(), *shares)
        if cfg.scenes and rng.random() >= cfg.style_word_rate:
            source = {**source, "text": source["text"].split(" of ", 1)[-1]}  # "a 3d render of a cat" of "a cat"
        whole = source.get("whole", source["image"])
        if cfg.references_from == "style":
            shown = source["others"](rng)
        else:
            shown = [view(whole, rng) for _ in range(cfg.references)]
        pixels = encoder.pixels(shown)
        if cfg.shuffle:
            pixels = np.stack([shuffled(x, patch, rng) for x in pixels])
        return {**captioned(source, dropped), "references": pixels, "unstyled": np.float32(unstyled)}

    return row


def make_tokens(encoder: jaxmix.ImageEncoder, cfg: Config) -> Callable[..., jax.Array]:
    """Return (params, frozen, batch) -> style tokens (b, t, c), of zeros where the style is left out."""

    def tokens(params: Any, frozen: Any, batch: Any) -> jax.Array:
        shown = batch["references"]
        flat = shown.reshape(-1, *shown.shape[2:])
        states = encoder.model.apply({"params": frozen["image_encoder"]}, flat).last_hidden_state
        states = states[:, 0 if cfg.class_token else 1 :].reshape(len(shown), -1, states.shape[-1]).astype(cfg.dtype)
        live = 1.0 - batch["unstyled"][:, None, None]
        return maths.style_tokens(params["style_emb"], states) * live.astype(cfg.dtype)

    return tokens


def make_predict(pipe: Pipeline, encoder: jaxmix.ImageEncoder, cfg: Config) -> Callable[..., jax.Array]:
    """Return the prediction under an adapter: the base, which also attends to the style tokens of each row."""
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
        tokens, layers = look(params, frozen, batch), params["layers"]
        at_site = {name: layer["strength"] for name, layer in layers.items()}
        control = maths.bind(layers, tokens, scale=jnp.ones(len(tokens)), at_site=at_site)
        return unet.apply({"params": frozen["unet"]}, noisy, t, context, (control,), added)

    return predict


def references(cfg: Config) -> list[list[np.ndarray]]:
    """Return the pictures whose style validation takes, for each prompt."""
    if not cfg.scenes:
        return [[as_picture(path, f"validation_images[{i}]")] for i, path in enumerate(cfg.validation_images)]
    plain = {"two_objects": 0.0, "three_objects": 0.0, "labelled": 0.0}
    styles = Scenes(**cfg.scenes).styles
    found = []
    for i in range(len(cfg.validation_prompts)):
        told = {**cfg.scenes, **plain, "styles": [styles[i % len(styles)]], "seed": cfg.seed + _HELD_OUT}
        found.append([Scenes(**told)[k]["image"] for k in range(cfg.references)])
    return found


def draw_grid(pipe: Pipeline, adapter: StyleAdapter, cfg: Config, shown: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Return a sheet with one row per prompt: the first reference, the prompt alone, and the style at each scale."""
    prompts, n = cfg.validation_prompts, len(cfg.validation_prompts)
    options: dict[str, Any] = {
        "guidance_scale": cfg.validation_guidance_scale,
        "batch_size": cfg.validation_batch_size,
    }
    columns = {"prompt": pipe.generate(prompts, range(n), **options)}
    for scale in cfg.validation_scales:
        look = adapter.on([list(x) for x in shown], scale, shuffle=cfg.shuffle, class_token=cfg.class_token)
        columns[f"style x{scale:g}"] = pipe.generate(prompts, range(n), methods=(look,), **options)
    side = columns["prompt"].shape[1:3]
    columns = {"reference": np.stack([fitted(x[0], side) for x in shown]), **columns}
    whole = np.stack(list(columns.values()), 1)
    return make_grid(whole.reshape(-1, *whole.shape[2:]), len(columns), max(1, 128 // side[0]), list(columns))


def main(cfg: Config) -> int:
    """Train, draw on the way, export."""
    pipe = open_base(cfg)
    encoder = jaxmix.ImageEncoder.load(cfg.image_encoder, cfg.dtype)
    fresh = StyleAdapter.init(jax.random.key(cfg.seed), pipe, encoder, cfg.tokens, cfg.blocks)
    pipe, rows = on_host(pipe), open_rows(cfg, pipe)
    shown = references(cfg)

    def trained(params: Any) -> StyleAdapter:
        return dataclasses.replace(fresh, **params)

    return train_denoiser(
        cfg,
        pipe,
        {"style_emb": fresh.style_emb, "layers": dict(fresh.layers)},
        {**freeze(pipe, rows), "image_encoder": encoder.params},
        rows,
        make_rows(make_tokenize(pipe), encoder, cfg),
        make_predict(pipe, encoder, cfg),
        lambda params, folder: trained(params).save(folder / FILE),
        lambda params: draw_grid(pipe, trained(params), cfg, shown),
        FILE,
    )


if __name__ == "__main__":
    command.run(main)
