"""DreamBooth (arXiv 2208.12242): teach a model one subject from a few pictures, and keep what it knows of the class.

    L = mean over instance rows of |pred(x_t, "a [V] class") - target|^2
        + prior_loss_weight * mean over class rows of |pred(x'_t', "a class") - target'|^2       (equation 2)

Class pictures are drawn once, before any update, by the model as it is. All weights of the UNet learn, with
train_text_encoder those of the text encoders, too; or with `rank` a LoRA of them. min-SNR weights, if asked for, are
those of each row, in both halves (diffusers' script weights the first half by the timesteps of both).

    python -m train.dreambooth --config configs/dreambooth_mini.yaml --output_dir runs/duck
    python -m train.dreambooth --config configs/dreambooth_sd15.yaml --output_dir runs/dog --instance_data_dir dog \
        --instance_prompt "a photo of sks dog" --class_prompt "a photo of a dog"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.methods.lora import PARTS
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.types import InputError
from train.adapters import freeze, on_host
from train.class_pictures import class_pictures
from train.data import ImageFolder, Pictures
from train.data.joined import told
from train.diffusion import make_predict, make_tokenize, on_host_if_split, train_denoiser
from train.grid import make_grid
from train.low_rank import (
    FILE,
    LowRankConfig,
    Trained,
    beside_base,
    make_plan,
    make_weigh,
    note_ordinary,
    start_lora,
    text_rates,
)
from train.scenes import Scenes
from train.subjects import InTurn, SubjectConfig, open_instances, words_of
from train.subjects import make_rows as rows_under_prompts

FOLDER = "pipeline"
MODELS = ("vae", *PARTS)
"""The parts of a step whose layers gather their weights if these are split over devices."""


@dataclasses.dataclass
class Config(LowRankConfig, SubjectConfig):
    """The DreamBooth trainer's keys, after those of every trainer of a subject, named as in diffusers' script.

    train_batch_size counts all rows: with prior preservation every second one is a class picture.

    Attributes:
        rank: rank of a LoRA that learns; null trains the weights themselves.
        instance_prompt: what the pictures are told to be, with a rare word for the subject: "a photo of sks dog"; their
            own captions are not read.
        with_prior_preservation: also train on class pictures, so that the class stays what it is.
        prior_loss_weight: weight of the mean over their rows.
        class_data_dir: where they are; OUTPUT_DIR/class if empty.
        class_prompt: what they are told to be: "a photo of a dog".
        num_class_images: how many there are to be; what lacks is drawn by the model as it is.
        class_guidance_scale: guidance of those that are drawn; null for the base's own.
        sample_batch_size: class pictures drawn together.
        export_steps: write the diffusers folder every this many steps, 0: only at the end; a LoRA is written with every
            checkpoint.
        save_precision: dtype of the weights in that folder.
    """

    rank: int | None = None
    instance_prompt: str = ""
    with_prior_preservation: bool = False
    prior_loss_weight: float = 1.0
    class_data_dir: str = ""
    class_prompt: str = ""
    num_class_images: int = 100
    class_guidance_scale: float | None = None
    sample_batch_size: int = 4
    export_steps: int = 0
    save_precision: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        super().__post_init__()
        self.check_low_rank()
        if not self.instance_prompt.strip():
            raise InputError('instance_prompt: not given, expected one with a rare word, "a photo of sks dog"')
        for name in ("num_class_images", "sample_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: found {getattr(self, name)}, expected 1 or more")
        if self.prior_loss_weight < 0:
            raise InputError(f"prior_loss_weight: found {self.prior_loss_weight}, expected 0 or more")
        if self.with_prior_preservation:
            self._check_prior()
        elif self.class_data_dir or self.class_prompt:
            key = "class_data_dir" if self.class_data_dir else "class_prompt"
            raise InputError(f"{key}: found it without with_prior_preservation, expected both or neither")

    def _check_prior(self) -> None:
        if not self.class_prompt.strip():
            raise InputError('class_prompt: not given with with_prior_preservation, expected one, "a photo of a dog"')
        if words_of(self.class_prompt) == words_of(self.instance_prompt):
            raise InputError(
                f"class_prompt: found that of the instance, {self.instance_prompt!r}, expected it without the word for "
                "the subject: the class would be taught to be the subject"
            )
        if self.train_batch_size % 2:
            raise InputError(
                f"train_batch_size: found {self.train_batch_size} with with_prior_preservation, expected an even "
                "number: half of the rows are class pictures"
            )
        if self.enable_bucket:
            raise InputError("enable_bucket: found it with class pictures, which are squares, expected false")


def open_rows(cfg: Config, instances: Any, folder: Path) -> InTurn:
    """Return instance pictures under their prompt, and with prior preservation class pictures under theirs."""
    if not cfg.with_prior_preservation:
        return InTurn((instances, cfg.instance_prompt))
    source = ImageFolder(folder, cfg.text_column, cfg.image_column)
    source.entries = [told(entry, cfg.class_prompt) for entry in source.entries]
    classes = Pictures(source, dataclasses.replace(cfg, resolution=picture_size(cfg)))
    return InTurn((instances, cfg.instance_prompt), (classes, cfg.class_prompt))


def picture_size(cfg: Config) -> int:
    """Return the side of the pictures that are trained on, in pixels."""
    return Scenes(**cfg.scenes).size if cfg.scenes else cfg.resolution


def make_rows(
    tokenize: Callable[[str], dict[str, np.ndarray]], cfg: Config
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, Any]]:
    """Return the transform from a source's row to `make_captioned`'s arrays, and "loss_weight" () float32.

    The loss is one mean over all rows; the weights 2 and 2 * prior_loss_weight make it the sum of the means over the
    halves, for any split of the batch into micro-batches and devices.
    """
    weights = (2.0, 2.0 * cfg.prior_loss_weight) if cfg.with_prior_preservation else (1.0,)
    return rows_under_prompts(tokenize, cfg.caption_dropout_rate, weights)


def open_base(cfg: Config) -> Pipeline:
    """Return the base, computing in the config's dtype; what learns is float32, the rest in that dtype."""
    command.start(cfg.distributed)
    if cfg.rank is not None or cfg.dtype == jnp.float32:
        return jaxmix.load(cfg.pretrained_model_name_or_path, dtype=cfg.dtype)
    with on_host_if_split():
        pipe = jaxmix.load(cfg.pretrained_model_name_or_path, dtype=jnp.float32)
        learns = full_parts(pipe, cfg)
        params = {
            name: tree if name in learns else jax.tree.map(lambda x: x.astype(cfg.dtype), tree)
            for name, tree in pipe.params.items()
        }
    modules = {
        name: getattr(pipe, name).clone(dtype=cfg.dtype)
        for name in ("unet", "vae", *PARTS[1:])
        if getattr(pipe, name) is not None
    }
    return dataclasses.replace(pipe, params=params, **modules)


def full_parts(pipe: Pipeline, cfg: Config) -> list[str]:
    """Return the parts of which all weights learn."""
    return [part for part in PARTS if part == "unet" or (cfg.train_text_encoder and part in pipe.params)]


def draw_grid(base: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return a sheet with one row per prompt: the base, and what has been learnt."""
    return make_grid(beside_base(base, [images]), 2, max(1, 128 // base.shape[1]), ["base", "trained"])


def main(cfg: Config) -> int:
    """Draw the class, train, draw on the way, export."""
    pipe = open_base(cfg)
    out = Path(cfg.output_dir)
    known = words_of(cfg.class_prompt)
    note_ordinary(pipe, "instance_prompt", [word for word in words_of(cfg.instance_prompt) if word not in known])
    trained = None if cfg.rank is None else start_lora(pipe, cfg, cfg.seed)
    plan, instances = make_plan(pipe, cfg), open_instances(cfg, pipe, cfg.instance_prompt)
    folder = Path(cfg.class_data_dir or out / "class").expanduser()
    if cfg.with_prior_preservation:
        how: dict[str, Any] = {"seed": cfg.seed, "batch_size": cfg.sample_batch_size}
        how["guidance_scale"] = cfg.class_guidance_scale
        if not class_pictures(pipe, folder, cfg.class_prompt, cfg.num_class_images, picture_size(cfg), **how):
            return 0
    prompts = cfg.validation_prompts
    options: dict[str, Any] = {"guidance_scale": cfg.validation_guidance_scale}
    options["batch_size"] = cfg.validation_batch_size
    base: list[np.ndarray] = []
    if prompts and cfg.validation_steps and jax.process_index() == 0:
        base.append(pipe.generate(prompts, range(len(prompts)), **options))  # now: later there are no such weights
    pipe = on_host(pipe)
    rows = open_rows(cfg, instances, folder)
    tokenize = make_tokenize(pipe)
    if trained is None:
        learns: Any = {name: jax.tree.map(_copy, pipe.params[name]) for name in full_parts(pipe, cfg)}
        frozen = {name: tree for name, tree in freeze(pipe, rows).items() if name not in learns}
        # What learns is in the state alone; the rest is held for validation.
        rest = {name: tree for name, tree in pipe.params.items() if name not in learns}
        pipe = dataclasses.replace(pipe, params=rest)
    else:
        learns, frozen = trained.learns, freeze(pipe, rows)

    def apply(params: Any) -> Pipeline:
        return dataclasses.replace(pipe, params={**pipe.params, **params})

    def save(params: Any, folder: Path) -> None:
        if trained is not None:
            trained.save(params, folder, pipe, cfg.lora_format)
        else:
            apply(params).save(folder / FOLDER, dtype=jnp.dtype(cfg.save_precision))

    def draw(params: Any) -> np.ndarray:
        return draw_grid(base[0], generate(pipe, trained, params, apply, prompts, options, cfg))

    return train_denoiser(
        cfg,
        pipe,
        learns,
        frozen,
        rows,
        make_rows(tokenize, cfg),
        make_predict(pipe, cfg),
        save,
        draw,
        FILE if trained is not None else FOLDER,
        save_steps=cfg.export_steps if trained is None else None,
        weigh=None if trained is None else make_weigh(trained, cfg),
        rates=text_rates(cfg),
        plan=plan,
        by_layer=() if trained is not None else MODELS,
    )


def generate(
    pipe: Pipeline,
    trained: Trained | None,
    params: Any,
    apply: Callable[[Any], Pipeline],
    prompts: list[str],
    options: dict[str, Any],
    cfg: Config,
) -> np.ndarray:
    """Return what has been learnt draws from the validation prompts, (n, H, W, 3) uint8."""
    seeds = range(len(prompts))
    if trained is not None:
        return pipe.generate(prompts, seeds, methods=(trained.lora(params).on(1.0),), **options)
    drawn = jax.tree.map(lambda x: jnp.asarray(x, cfg.dtype), params)
    return apply(drawn).generate(prompts, seeds, **options)


def _copy(leaf: Any) -> Any:
    # The step gives its state's buffers away; on the host they are copied to the devices anyway.
    return leaf if isinstance(leaf, np.ndarray) else jnp.array(leaf, jnp.float32)


if __name__ == "__main__":
    command.run(main)
