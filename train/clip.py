"""Train a small CLIP on captioned scenes: image and text encoder side by side, contrastively (arXiv 2103.00020).

It is what image prompts of the embedded model are read with, and a judge of pictures beside it: how near two pictures
are (CLIP-I), or a picture and a text (CLIP-T). So it is trained on all scenes, held-out combinations included, and
never sees a generated picture. The result is a folder that transformers opens as a CLIPModel.

    python -m train.clip --config configs/mini_clip.yaml --output_dir runs/clip
    python -m train.clip --config configs/mini_clip.yaml --output_dir runs/clip --evaluate mini-clip
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.models import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from jaxmix.pictures import CLIP_MEAN, CLIP_STD
from jaxmix.pipeline.tokens import open_tokenizer
from jaxmix.tuning.data import iterate, make_dataset
from jaxmix.tuning.fit import FitConfig, Hook, fit
from jaxmix.tuning.update import TrainState, make_optimizer, make_update
from jaxmix.types import InputError
from jaxmix.weights.store import save_tree, write_config
from train.scenes import BACKGROUNDS, HELD_OUT_STYLE, STYLES, Scenes
from train.scenes.captions import caption
from train.scorer import augment

LARGEST = float(np.log(100.0))  # of the logarithm of the scale of similarities, as in the paper
KINDS = ("object", "style", "background")


@dataclasses.dataclass
class Config(FitConfig):
    """The CLIP trainer's keys, after those of every trainer.

    Attributes:
        vision: the image encoder, as in a transformers vision_config; scenes are drawn at its image_size.
        text_encoder: the text encoder, as in a text_config; the vocabulary's size comes from the tokenizer.
        projection_dim: width of the space that both project into.
        logit_scale: logarithm of the factor of the similarities at the start; it is trained, up to log 100.
        tokenizer: folder of the CLIP tokenizer.
        scenes: arguments of train.scenes.Scenes.
        arrangements: arrangements of the scenes, which take turns.
        backgrounds_per_batch: number of backgrounds that the scenes of a batch share; 0: each has its own.
        blur: share of the training pictures that are blurred a little, as a decoder blurs.
        noise: largest standard deviation of the noise added to training pictures, in [0, 1].
        evaluate: do not train; print how well this encoder ("mini-clip", or a folder) tells fresh real scenes.
        eval_scenes: fresh scenes of one object for that.
    """

    vision: dict[str, Any] = dataclasses.field(default_factory=dict)
    text_encoder: dict[str, Any] = dataclasses.field(default_factory=dict)
    projection_dim: int = 192
    logit_scale: float = 2.6592
    tokenizer: str = ""
    scenes: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrangements: list[str] = dataclasses.field(default_factory=lambda: ["centred"])
    backgrounds_per_batch: int = 0
    blur: float = 0.5
    noise: float = 0.03
    evaluate: str = ""
    eval_scenes: int = 1000

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        super().__post_init__()
        if not self.arrangements:
            raise InputError("arrangements: found none, expected some of centred, anywhere")
        if self.backgrounds_per_batch < 0:
            raise InputError(f"backgrounds_per_batch: found {self.backgrounds_per_batch}, expected 0 or more")
        if self.gradient_accumulation_steps > 1:
            raise InputError(
                f"gradient_accumulation_steps: found {self.gradient_accumulation_steps}, expected 1: every picture is "
                "compared with all texts of its batch"
            )


class InTurns:
    """The scenes of several arrangements in turn, a `BatchSource` in which each batch has but a few backgrounds.

    A background is told at a glance; where most of a batch shares one, object and style must be told as well.
    """

    def __init__(self, cfg: Config, seed: int, **shares: float) -> None:
        settings = {"styles": (*STYLES, HELD_OUT_STYLE), "split": "all", **cfg.scenes, "seed": seed, **shares}
        size = make_configs(cfg)[0].image_size
        self.parts = [Scenes(**{**settings, "size": size, "arrangement": a}) for a in cfg.arrangements]
        self.backgrounds = cfg.backgrounds_per_batch

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.scene(index)

    def scene(self, index: int, background: str = "") -> dict[str, Any]:
        """Return a scene, before another background if one is named."""
        return self.parts[index % len(self.parts)].scene(index // len(self.parts), background)

    def in_batches(self, batch_size: int, seed: int) -> Batches:
        """Return the endless rows, every `batch_size` of them a batch; see `jaxmix.tuning.data.BatchSource`."""
        return Batches(self, batch_size, seed)


@dataclasses.dataclass(frozen=True)
class Batches:
    """The rows of `InTurns` in the order of batches, each of few backgrounds."""

    scenes: InTurns
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        count = self.scenes.backgrounds
        if not count:
            return self.scenes[index]
        batch = np.random.Generator(np.random.Philox(key=[self.seed, index // self.batch_size]))
        chosen = batch.choice(len(BACKGROUNDS), min(count, len(BACKGROUNDS)), replace=False)
        return self.scenes.scene(index, BACKGROUNDS[chosen[index % len(chosen)]])


def make_configs(cfg: Config) -> tuple[CLIPVisionConfig, CLIPTextConfig]:
    """Return the configs of both encoders, with their projections."""
    tokenizer = open_tokenizer(cfg.tokenizer)
    vision = {"architectures": ["CLIPVisionModelWithProjection"], **cfg.vision, "projection_dim": cfg.projection_dim}
    text = {"architectures": ["CLIPTextModelWithProjection"], **cfg.text_encoder, "projection_dim": cfg.projection_dim}
    text |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPVisionConfig.from_dict(vision), CLIPTextConfig.from_dict(text)


def make_rows(cfg: Config, length: int) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, np.ndarray]]:
    """Return the transform from a scene to {"image" (H, W, 3) uint8, "input_ids" (s,) int32}."""
    tokenizer = open_tokenizer(cfg.tokenizer)

    def row(scene: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        ids = tokenizer(scene["text"], padding="max_length", max_length=length, truncation=True)["input_ids"]
        return {"image": scene["image"], "input_ids": np.asarray(ids, np.int32)}

    return row


def similarities(images: jax.Array, texts: jax.Array, scale: jax.Array) -> jax.Array:
    """Return the scaled cosines of all pictures (b, p) with all texts (n, p), (b, n)."""
    images, texts = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
    return jnp.exp(jnp.minimum(scale, LARGEST)) * images @ texts.T


def contrast(logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the loss of similarities (b, b) of pictures and texts with token ids (b, s), and the share told right.

    The mean cross entropy of each picture among the texts, and of each text among the pictures. Pairs with the same
    text are no mistakes of each other: they share what is right.
    """
    same = (ids[:, None] == ids[None]).all(-1)
    wanted = same / same.sum(-1, keepdims=True)
    loss = -0.5 * sum((wanted * jax.nn.log_softmax(x, -1)).sum(-1).mean() for x in (logits, logits.T))
    return jnp.asarray(loss), jnp.take_along_axis(same, logits.argmax(-1)[:, None], -1).mean()


def make_loss(
    vision: CLIPVisionModel, text: CLIPTextModel, cfg: Config
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Return loss_fn(params, frozen, batch, key) for rows of `make_rows`, see `contrast`."""

    def loss_fn(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        pixels = augment(batch["image"].astype(jnp.float32) / 255.0, key, cfg.blur, cfg.noise)
        pixels = (pixels - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)
        images = vision.apply({"params": params["vision"]}, pixels.astype(cfg.dtype)).projected
        texts = text.apply({"params": params["text"]}, batch["input_ids"]).projected
        logits = similarities(images.astype(jnp.float32), texts.astype(jnp.float32), params["logit_scale"])
        loss, right = contrast(logits, batch["input_ids"])
        return loss, {"accuracy": right, "scale": jnp.exp(params["logit_scale"])}

    return loss_fn


def export(folder: Path, params: Any, configs: tuple[CLIPVisionConfig, CLIPTextConfig], tokenizer: str) -> None:
    """Write transformers' folder of a CLIPModel, with its tokenizer and preprocessor, in float16."""
    vision, text = configs
    tree = {**params["vision"], **params["text"], "logit_scale": params["logit_scale"]}
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    tokens = folder / "tokenizer_config.json"
    found = json.loads(tokens.read_text(encoding="utf-8")) if tokens.is_file() else {}
    write_config({**found, "model_max_length": text.max_position_embeddings}, tokens)
    size = vision.image_size
    write_config(
        {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": vision.projection_dim,
            "logit_scale_init_value": 2.6592,
            "vision_config": vision.to_dict() | {"architectures": None},
            "text_config": text.to_dict() | {"architectures": None},
        },
        folder / "config.json",
    )
    write_config(
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
            "do_resize": True,
            "do_center_crop": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
        },
        folder / "preprocessor_config.json",
    )
    save_tree(tree, folder / "model.safetensors", jnp.float16)


def tell(encoder: jaxmix.ImageEncoder, scenes: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return for what share of the scenes of one object the right caption is the nearest, (n,) bool by what is wrong.

    Each picture is compared with its own caption and those that name another object, style or background.
    """
    objects = sorted({name for scene in scenes for name in scene["object_names"]})
    choices = {"object": objects, "style": [*STYLES, HELD_OUT_STYLE], "background": list(BACKGROUNDS)}
    pictures = np.asarray(encoder(encoder.pixels([scene["image"] for scene in scenes])).projected)
    pictures = pictures / np.linalg.norm(pictures, axis=-1, keepdims=True)
    kept: dict[str, np.ndarray] = {}

    def facts(scene: Mapping[str, Any]) -> dict[str, str]:
        return {**{kind: scene[f"{kind}_name"] for kind in KINDS[1:]}, "object": scene["object_names"][0]}

    def say(scene: Mapping[str, Any], kind: str, name: str) -> str:
        told = {**facts(scene), kind: name}
        return caption(told["style"], [told["object"]], told["background"], scene["size_word"], "", scene["places"])

    said = {kind: [[say(scene, kind, name) for name in names] for scene in scenes] for kind, names in choices.items()}
    phrases = list(dict.fromkeys(x for rows in said.values() for row in rows for x in row))
    with command.progress(len(phrases), "reading captions", "captions") as bar:
        for start in range(0, len(phrases), 256):
            some = phrases[start : start + 256]
            found = encoder.texts(some + some[-1:] * (256 - len(some)))
            kept |= dict(zip(some, found / np.linalg.norm(found, axis=-1, keepdims=True), strict=False))
            bar.update(len(some))
    right = {}
    for kind, names in choices.items():
        texts = np.stack([[kept[x] for x in row] for row in said[kind]])  # (n, names, p)
        nearest = np.einsum("np,nkp->nk", pictures, texts).argmax(-1)
        right[kind] = np.asarray([names[i] == facts(scene)[kind] for i, scene in zip(nearest, scenes, strict=True)])
    return right


def evaluate(cfg: Config, encoder: jaxmix.ImageEncoder) -> dict[str, float]:
    """Print and return the shares of fresh real scenes of one object that the encoder tells, see `tell`."""
    shares = {"two_objects": 0.0, "three_objects": 0.0, "labelled": 0.0}
    result: dict[str, float] = {}
    for arrangement in cfg.arrangements:
        fresh = InTurns(dataclasses.replace(cfg, arrangements=[arrangement]), cfg.seed + 990_001, **shares)
        right = tell(encoder, [fresh[i] for i in range(cfg.eval_scenes)])
        told = ", ".join(f"{kind} {100 * right[kind].mean():.1f} %" for kind in KINDS)
        print(f"{arrangement}, {cfg.eval_scenes} fresh real scenes of one object: {told}", flush=True)
        result |= {f"{arrangement}/{kind}": float(x.mean()) for kind, x in right.items()}
    return result


def main(cfg: Config) -> int:
    """Train, export, say what the encoder can tell."""
    command.start(False)
    if cfg.evaluate:
        evaluate(cfg, jaxmix.ImageEncoder.load(cfg.evaluate))
        return 0
    configs, out = make_configs(cfg), Path(cfg.output_dir)
    vision, text = CLIPVisionModel(configs[0], dtype=cfg.dtype), CLIPTextModel(configs[1], dtype=cfg.dtype)
    keys = jax.random.split(jax.random.key(cfg.seed))
    params = {
        "vision": vision.init_params(keys[0]),
        "text": text.init_params(keys[1]),
        "logit_scale": jnp.asarray(cfg.logit_scale, jnp.float32),
    }
    optimizer = make_optimizer(cfg)
    rows = make_rows(cfg, configs[1].max_position_embeddings)
    shard = (jax.process_index(), jax.process_count())
    dataset = make_dataset(InTurns(cfg, cfg.seed + 1), cfg.train_batch_size, cfg.seed, rows, shard=shard)

    def batches(step: int) -> Iterator[Any]:
        return iterate(dataset, step, cfg.dataloader_num_workers)

    def save(step: int, state: TrainState) -> None:
        export(out / "clip", state.averaged, configs, cfg.tokenizer)

    _, complete = fit(
        cfg,
        TrainState.create(params, optimizer, ema=cfg.ema_decay > 0),
        make_update(make_loss(vision, text, cfg), optimizer, cfg.ema_decay),
        {},
        batches,
        [Hook(0, save)],
        command.progress,
    )
    if complete and jax.process_index() == 0:
        print(f"wrote {out / 'clip'}")
        evaluate(cfg, jaxmix.ImageEncoder.load(out / "clip"))
    return 0


if __name__ == "__main__":
    command.run(main)
