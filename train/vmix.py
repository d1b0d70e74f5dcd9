"""Train a VMix adapter (arXiv 2412.20800) for a frozen Stable Diffusion 1.x, 2.x or XL base.

What learns: the token projection F with its norm, the zero layer Z, one value matrix W_V^a per attn2, and a LoRA on the
modules of the UNet that `lora_targets` matches. The base is an argument of the step and is held once.

    python -m train.vmix --config configs/vmix_mini.yaml --output_dir runs/vmix
    python -m train.vmix --config configs/vmix_sd15.yaml --output_dir runs/vmix --train_data_dir pictures
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.controls import vmix
from jaxmix.models import AddedCond
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.tuning import lora
from jaxmix.types import InputError
from train.adapters import (
    AdapterConfig,
    check_scenes,
    freeze,
    make_captioned,
    on_host,
    open_base,
    open_pictures,
)
from train.diffusion import make_tokenize, train_denoiser
from train.grid import make_grid
from train.scenes import DIMENSIONS as SCENE_DIMENSIONS
from train.scenes import Scenes


@dataclasses.dataclass
class Config(AdapterConfig):
    """The VMix trainer's keys, after those of every trainer of an adapter.

    Attributes:
        labels: each aesthetic dimension with its label and the rare token that stands for its absence.
        label_dropout_rate: chance that a positive label of a row is treated as absent.
        value_mixing: false trains the LoRA alone (an ablation).
        rank: rank of the LoRA; 0 for none.
        lora_alpha: the LoRA is scaled by lora_alpha / rank; null for rank.
        lora_targets: regular expression searched for in the names of the UNet's modules.
        validation_scales: strengths at which validation pictures are drawn with all labels.
    """

    labels: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    label_dropout_rate: float = 0.0
    value_mixing: bool = True
    rank: int = 16
    lora_alpha: float | None = None
    lora_targets: str = r"attn[12]\.to_(q|k|v|out\.0)$"
    validation_scales: list[float] = dataclasses.field(default_factory=lambda: [0.5, 1.0, 1.5])

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        super().__post_init__()
        if not self.value_mixing and self.rank < 1:
            raise InputError("value_mixing: found false with rank 0, expected one of them to learn")


def make_rows(
    tokenize: Callable[[str], dict[str, np.ndarray]], dimensions: tuple[str, ...], cfg: Config
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, Any]]:
    """Return the transform from a source's row to `make_captioned`'s arrays and the labels, "present" (N,) float32."""
    captioned = make_captioned(tokenize)

    def row(source: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        dropped = rng.random() < cfg.caption_dropout_rate
        kept = rng.random(len(dimensions)) >= cfg.label_dropout_rate
        present = np.asarray([name in source["labels"] for name in dimensions]) & kept
        return {**captioned(source, dropped), "present": present.astype(np.float32)}

    return row


class LabelledScenes:
    """Scenes as rows of captioned pictures with their positive labels."""

    def __init__(self, scenes: Scenes):
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scenes[index]
        labels = tuple(name for name, sign in scene["labels"].items() if sign > 0)
        return {"image": scene["image"], "text": scene["text"], "labels": labels, "id": f"scene {index}"}


def open_rows(cfg: Config, pipe: Pipeline, dimensions: Sequence[str]) -> Any:
    """Return the source of rows that the config names."""
    if not cfg.scenes:
        return open_pictures(cfg, pipe, dimensions)
    check_scenes(pipe)
    if unknown := [name for name in dimensions if name not in SCENE_DIMENSIONS]:
        raise InputError(f"labels: found {unknown[0]!r}, expected some of {', '.join(SCENE_DIMENSIONS)} for scenes")
    return LabelledScenes(Scenes(**cfg.scenes))


def split_adapter(adapter: jaxmix.VMix, cfg: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (what learns, what is frozen) of an adapter; the label embeddings are frozen."""
    learns: dict[str, Any] = {}
    if cfg.value_mixing:
        learns["vmix"] = {name: p for name, p in adapter.params.items() if name != "aes_emb"}
    if adapter.lora is not None:
        learns["lora"] = lora.without_alpha(adapter.lora.parts["unet"])
    return learns, {"aes_emb": adapter.params["aes_emb"]}


def make_adapter(pipe: Pipeline, cfg: Config) -> jaxmix.VMix:
    """Return the adapter before training: it changes nothing."""
    key_vmix, key_lora = jax.random.split(jax.random.key(cfg.seed))
    made = jaxmix.VMix.init(key_vmix, pipe, cfg.labels or None)
    if not cfg.rank:
        return made
    factors = lora.init(key_lora, pipe.params["unet"], cfg.lora_targets, cfg.rank, cfg.lora_alpha)
    return dataclasses.replace(made, lora=jaxmix.LoRA({"unet": factors}))


def join_adapter(fresh: jaxmix.VMix, learnt: Mapping[str, Any], cfg: Config) -> jaxmix.VMix:
    """Return the adapter with what it has `learnt`: the inverse of `split_adapter`."""
    params = {**fresh.params, **learnt.get("vmix", {})}
    if "lora" not in learnt:
        return jaxmix.VMix(fresh.config, params)
    factors = lora.with_alpha(learnt["lora"], cfg.lora_alpha)
    return jaxmix.VMix(fresh.config, params, jaxmix.LoRA({"unet": factors}))


def make_predict(pipe: Pipeline, cfg: Config) -> Callable[..., jax.Array]:
    """Return the prediction under an adapter: the base with factors beside its kernels, and values mixed in.

    Rows without a caption are the unconditional branch, which the adapter's values leave alone, as in sampling.
    """
    unet = pipe.unet.clone(dtype=cfg.dtype, remat=cfg.gradient_checkpointing)

    def predict(
        params: Any,
        frozen: Any,
        batch: Any,
        noisy: jax.Array,
        t: jax.Array,
        context: jax.Array,
        added: AddedCond | None,
    ) -> jax.Array:
        weights = frozen["unet"]
        if "lora" in params:
            weights = lora.attach(weights, lora.with_alpha(params["lora"], cfg.lora_alpha))
        controls = ()
        if "vmix" in params:
            adapter = {**params["vmix"], "aes_emb": frozen["aes_emb"]}
            controls = (vmix.bind(adapter, batch["present"], 1.0 - batch["dropped"]),)
        return unet.apply({"params": weights}, noisy, t, context, controls, added)

    return predict


def draw_grid(pipe: Pipeline, adapter: jaxmix.VMix, cfg: Config) -> np.ndarray:
    """Return a sheet with one row per prompt: base, each strength with all labels, each label alone at strength 1."""
    columns = [("all", scale) for scale in cfg.validation_scales] + [(name, 1.0) for name in adapter.config.dimensions]
    prompts, width = cfg.validation_prompts, len(columns) + 1
    guidance, batch = cfg.validation_guidance_scale, cfg.validation_batch_size
    base = pipe.generate(prompts, range(len(prompts)), None, guidance, batch_size=batch)
    control = adapter.bind(pipe, [c[0] for _ in prompts for c in columns], [c[1] for _ in prompts for c in columns])
    mixed = adapter.apply_lora(pipe).generate(
        [prompt for prompt in prompts for _ in columns],
        [seed for seed in range(len(prompts)) for _ in columns],
        None,
        guidance,
        (control,),
        batch_size=batch,
    )
    whole = np.concatenate([base[:, None], mixed.reshape(len(prompts), width - 1, *base.shape[1:])], 1)
    titles = ["base"] + [f"all x{scale:g}" for scale in cfg.validation_scales] + list(adapter.config.dimensions)
    enlarge = max(1, 128 // base.shape[1])
    return make_grid(whole.reshape(-1, *base.shape[1:]), width, enlarge, titles)


def main(cfg: Config) -> int:
    """Train, draw on the way, export."""
    pipe = open_base(cfg)
    fresh = make_adapter(pipe, cfg)
    pipe = on_host(pipe)
    learns, constants = split_adapter(fresh, cfg)
    rows = open_rows(cfg, pipe, fresh.config.dimensions)

    def save(params: Any, folder: Path) -> None:
        join_adapter(fresh, params, cfg).save(folder / "adapter.safetensors")

    return train_denoiser(
        cfg,
        pipe,
        learns,
        {**freeze(pipe, rows), **constants},
        rows,
        make_rows(make_tokenize(pipe), fresh.config.dimensions, cfg),
        make_predict(pipe, cfg),
        save,
        lambda params: draw_grid(pipe, join_adapter(fresh, params, cfg), cfg),
        "adapter.safetensors",
    )


if __name__ == "__main__":
    command.run(main)
