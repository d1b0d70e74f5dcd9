"""Textual inversion (arXiv 2208.01618): a subject or a style as a word, of which nothing but its vectors is learnt.

    v* = argmin E |pred(x_t, t, c("a photo of a <word>")) - target|^2,    v (n, d) rows beside the text encoder's table

With `per_layer` it is P+'s inversion (arXiv 2303.09522): vectors of their own for each cross-attention l, which attends
to the states of the prompt with those. All other rows of the table stay what they are: they are no parameters here, so
neither gradients nor weight decay reach them. SDXL learns vectors for both text encoders.

    python -m train.textual_inversion --config configs/textual_inversion_mini.yaml --output_dir runs/word
    python -m train.textual_inversion --config configs/textual_inversion_sd15.yaml --output_dir runs/word \
        --instance_data_dir toy --placeholder_token "<toy>" --initializer_token toy
    python -m infer.generate --embedding runs/word/learned_embeds.safetensors --prompt "a <toy> on a beach" ...
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.controls import layer_prompts
from jaxmix.models import AddedCond
from jaxmix.pipeline.blocks import layer_names
from jaxmix.pipeline.embeddings import check_token
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.types import InputError, shown
from jaxmix.weights.embedding_write import embedding_tree, write_embedding
from jaxmix.weights.identity import weights_digest
from train.adapters import freeze, make_captioned, on_host, open_base
from train.diffusion import Predict, Weigh, encode_captions, train_denoiser
from train.grid import make_grid
from train.low_rank import beside_base
from train.subjects import SubjectConfig, open_instances

FILE = "learned_embeds.safetensors"

OBJECT_TEMPLATES = tuple(
    f"a {kind} of {which} {{}}"
    for kind, which in itertools.product(
        ("photo", "picture", "rendering", "close-up photo", "cropped photo", "bright photo", "dark photo", "good photo",
         "bad photo"),
        ("a", "the", "my"),
    )
)  # fmt: skip
STYLE_TEMPLATES = tuple(
    f"a {kind}{what} in the style of {{}}"
    for kind, what in itertools.product(
        ("", "small ", "large ", "bright ", "dark ", "close-up "), ("picture", "painting", "drawing")
    )
)
"""What pictures are told to be, the word standing at {}: 27 for objects and 18 for styles, as plain as the paper's."""


@dataclasses.dataclass
class Config(SubjectConfig):
    """The textual inversion trainer's keys, after those of every trainer of a subject, named as in diffusers' script.

    Attributes:
        placeholder_token: the word to learn, one that is no word yet: "<toy>".
        initializer_token: a word, or words, that say roughly what it is; the vectors start from those of its tokens, in
            turn.
        num_vectors: vectors of the word, which stand side by side in a prompt.
        per_layer: learn vectors of their own for each cross-attention (P+).
        learnable_property: what the pictures have in common: an object, a style; or captions, where each picture's own
            caption says where the word stands, before which it is put if it does not.
        templates: what pictures are told to be, with {} for the word; empty for those of learnable_property.
        num_instance_images: with scenes: how many of them are shown.
    """

    placeholder_token: str = ""
    initializer_token: str = ""
    num_vectors: int = 1
    per_layer: bool = False
    learnable_property: Literal["object", "style", "captions"] = "object"
    templates: list[str] = dataclasses.field(default_factory=list)
    num_instance_images: int = 4

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        super().__post_init__()
        for key in ("placeholder_token", "initializer_token"):
            if not getattr(self, key).strip():
                such = (
                    "a word that is none yet, <toy>" if key.startswith("p") else "a word that says roughly what it is"
                )
                raise InputError(f"{key}: not given, expected {such}")
        if self.num_vectors < 1:
            raise InputError(f"num_vectors: found {self.num_vectors}, expected 1 or more")
        if self.templates and self.learnable_property == "captions":
            raise InputError("templates: found some with learnable_property captions, expected one of them")
        for template in self.templates:
            if template.count("{}") != 1:
                raise InputError(f"templates: found {template!r}, expected one {{}} in it, where the word stands")

    @property
    def told(self) -> tuple[str, ...]:
        """The templates of the pictures, () for their captions."""
        usual = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES, "captions": ()}
        return tuple(self.templates) or usual[self.learnable_property]


@dataclasses.dataclass(frozen=True)
class Word:
    """What is being learnt: the token, and the names of the layers that have vectors of their own, () without any."""

    token: str
    layers: tuple[str, ...] = ()

    def _held(self, learns: Mapping[str, Any]) -> tuple[str, list[Any], dict[str, list[Any]]]:
        vectors = [np.asarray(x, np.float32) for x in learns.values()]
        return self.token, vectors, {name: [x[i] for x in vectors] for i, name in enumerate(self.layers)}

    def save(self, learns: Mapping[str, Any], folder: Path) -> None:
        """Write the file of what has been learnt, {part: (n, d)}, or (layers, n, d)."""
        write_embedding(folder / FILE, *self._held(learns))

    def add(self, pipe: Pipeline, learns: Mapping[str, Any]) -> Pipeline:
        """Return the pipeline with the word."""
        return pipe.with_embedding(embedding_tree(*self._held(learns)), self.token)

    def methods(self, prompts: list[str]) -> tuple[Any, ...]:
        """Return what prompts that name the word are drawn with."""
        return (jaxmix.LayerPrompts([{".": prompt} for prompt in prompts]),) if self.layers else ()


def start_word(pipe: Pipeline, cfg: Config) -> tuple[Word, dict[str, jax.Array]]:
    """Return the word and its vectors before training, those of the initializer's tokens.

    Raises `InputError` for a word that the tokenizer knows already, and for more vectors than a prompt has room for.
    """
    check_token(pipe, cfg.placeholder_token, "placeholder_token")
    if cfg.num_vectors > (room := pipe.text_length - 2):
        raise InputError(f"num_vectors: found {cfg.num_vectors}, expected at most {room}, a prompt")
    layers = tuple(layer_names(pipe)) if cfg.per_layer else ()
    learns = {}
    for (part, _), ids in zip(pipe.encoders, pipe.ids_of(cfg.initializer_token), strict=True):
        if not ids:
            raise InputError(f"initializer_token: found {shown(cfg.initializer_token)}, expected a word")
        if len(ids) > cfg.num_vectors and jax.process_index() == 0:
            print(
                f"initializer_token: {cfg.initializer_token!r} has {len(ids)} tokens in the {part}: the first "
                f"{cfg.num_vectors} are taken"
            )
        table = pipe.params[part]["text_model"]["embeddings.token_embedding"]["embedding"]
        chosen = jnp.asarray([ids[i % len(ids)] for i in range(cfg.num_vectors)])
        vectors = jnp.asarray(table[chosen], jnp.float32)
        learns[part] = jnp.tile(vectors, (len(layers), 1, 1)) if layers else vectors
    return Word(cfg.placeholder_token, layers), learns


def make_tokenize(pipe: Pipeline) -> Callable[[str], dict[str, np.ndarray]]:
    """Return text -> {"input_ids" (s,)[, "input_ids_2" (s,)]} int32; learnt words have ids beyond the vocabulary."""
    keys = ("input_ids", "input_ids_2")[: len(pipe.encoders)]
    alone = (
        threading.Lock()
    )  # rows are made by several threads, and a tokenizer that is told to pad serves one at a time

    @functools.lru_cache(maxsize=10_000)
    def tokenize(text: str) -> dict[str, np.ndarray]:
        with alone:
            return {key: pipe.chunks(i, [text])[0].ids[0].astype(np.int32) for i, key in enumerate(keys)}

    return tokenize


def make_rows(
    tokenize: Callable[[str], dict[str, np.ndarray]], cfg: Config
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, Any]]:
    """Return the transform from a picture's row to `make_captioned`'s arrays, under a template that is drawn."""
    captioned = make_captioned(tokenize)

    def row(source: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        templates = cfg.told or ((source["template"],) if "template" in source else ())
        text = templates[int(rng.integers(len(templates)))] if templates else source["text"]
        text = text.replace("{}", cfg.placeholder_token) if templates else text
        made = captioned({**source, "text": text}, rng.random() < cfg.caption_dropout_rate)
        if "input_ids_2" not in made:  # sizes are for SDXL alone, and scenes have none
            made.pop("time_ids", None)
        return made

    return row


def make_weigh(per_layer: bool) -> Weigh:
    """Return (params, frozen, key) -> the base's weights and the vectors of the word, the mean of those of layers."""

    def weigh(params: Any, frozen: Any, key: jax.Array) -> dict[str, Any]:
        return {**frozen, "learnt": {part: x.mean(0) if per_layer else x for part, x in params.items()}}

    return weigh


def layer_states(pipe: Pipeline, weights: Any, learns: Mapping[str, Any], batch: Mapping[str, Any]) -> jax.Array:
    """Return the text states (b, layers, s, d) of each layer, whose vectors are ``learns`` {part: (layers, n, d)}."""
    b, count = len(batch["input_ids"]), len(next(iter(learns.values())))
    rows = {name: jnp.tile(batch[name], (count, *[1] * (batch[name].ndim - 1))) for name in ("dropped", "time_ids")
            if name in batch}  # fmt: skip
    for (part, encoder), key in zip(pipe.encoders, ("input_ids", "input_ids_2"), strict=False):
        first, n = encoder.config.vocab_size, learns[part].shape[1]
        ids = jnp.asarray(batch[key])[None]
        moved = ids + n * jnp.arange(count)[:, None, None]
        rows[key] = jnp.where(ids >= first, moved, ids).reshape(count * b, -1)
    learnt = {part: x.reshape(-1, x.shape[-1]) for part, x in learns.items()}
    context, _ = encode_captions(pipe, {**weights, "learnt": learnt}, rows)
    return context.reshape(count, b, *context.shape[1:]).swapaxes(0, 1)


def make_predict(pipe: Pipeline, cfg: Config) -> Predict:
    """Return the prediction of the frozen UNet, whose layers attend to states of their own with `per_layer`."""
    unet = pipe.unet.clone(dtype=cfg.dtype, remat=cfg.gradient_checkpointing)
    names = tuple(layer_names(pipe).values()) if cfg.per_layer else ()

    def predict(
        params: Any,
        frozen: Any,
        batch: Mapping[str, jax.Array],
        noisy: jax.Array,
        t: jax.Array,
        context: jax.Array,
        added: AddedCond | None,
    ) -> jax.Array:
        controls: tuple[Any, ...] = ()
        if names:
            states = layer_states(pipe, frozen, params, batch).astype(cfg.dtype)
            which = {name: jnp.full(len(noisy), i + 1, jnp.int32) for i, name in enumerate(names)}
            controls = (layer_prompts.bind(states, which),)
        return unet.apply({"params": frozen["unet"]}, noisy, t, context, controls, added)

    return predict


def draw_grid(pipe: Pipeline, word: Word, start: Mapping[str, Any], learns: Any, cfg: Config) -> np.ndarray:
    """Return a sheet with one row per prompt: the word as it began, and as it is now."""
    prompts = cfg.validation_prompts
    options: dict[str, Any] = {
        "guidance_scale": cfg.validation_guidance_scale,
        "batch_size": cfg.validation_batch_size,
        "methods": word.methods(prompts),
    }
    before, now = (word.add(pipe, x).generate(prompts, range(len(prompts)), **options) for x in (start, learns))
    return make_grid(beside_base(before, [now]), 2, max(1, 128 // before.shape[1]), ["start", "learnt"])


def main(cfg: Config) -> int:
    """Train, draw on the way, export."""
    pipe = open_base(cfg)
    word, start = start_word(pipe, cfg)
    start = jax.device_get(start)
    keys = ("placeholder_token", "num_vectors", "per_layer")
    plan = {**{key: getattr(cfg, key) for key in keys}, "base": weights_digest(pipe.params["unet"])}
    pipe = on_host(pipe)
    captions = cfg.learnable_property == "captions"
    rows = open_instances(cfg, pipe, cfg.placeholder_token, cfg.placeholder_token if captions else "")
    return train_denoiser(
        cfg,
        pipe,
        jax.tree.map(jnp.asarray, start),
        freeze(pipe, rows),
        rows,
        make_rows(make_tokenize(word.add(pipe, start)), cfg),
        make_predict(pipe, cfg),
        word.save,
        lambda learns: draw_grid(pipe, word, start, learns, cfg),
        FILE,
        weigh=make_weigh(cfg.per_layer),
        plan=plan,
    )


if __name__ == "__main__":
    command.run(main)
