"""StyleAdapter (arXiv 2309.01770) as a method: an adapter file, and any number of pictures of one style per image."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.cards import Card, weights
from jaxmix.controls import style_adapter as maths
from jaxmix.models.unet import subtree
from jaxmix.pipeline.blocks import Blocks, at_sites, attn2_names
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.references import One, name_of, per_image, remember, several
from jaxmix.pipeline.request import Method, Request
from jaxmix.pipeline.vision import ImageEncoder, as_picture, shuffled
from jaxmix.rows import numbers, tile
from jaxmix.types import AnyArray, Array, InputError, Params
from jaxmix.weights import SafetensorsFile, load_tree, save_tree
from jaxmix.weights.files import ASSETS, path_here, user_path
from jaxmix.weights.single_file_kinds import kind_of

PLACES = {"mini-style": ASSETS / "mini-style" / "style_adapter.safetensors"}
EMBEDDED = {name: path for name, path in PLACES.items() if path.is_file()}
"""Adapters that come with the package, by name; their image encoder is "mini-clip"."""

_KEY = "jaxmix"  # of the safetensors metadata, under which the config is stored


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StyleAdapter(Card):
    """A StyleAdapter: ``style_emb`` makes the tokens, ``layers`` maps each attn2 to {"to_k", "to_v", "strength"}.

    ``strength`` () is the learnt lambda of a layer.
    """

    style_emb: Params
    layers: Mapping[str, Params]
    image_encoder: ImageEncoder | None = None
    where: str = "StyleAdapter"

    def _facts(self) -> Iterator[tuple[str, str]]:
        seen, context = maths.widths(self.style_emb)
        yield "kind", f"{self.style_emb['style_embedding'].shape[1]} tokens, {maths.depth(self.style_emb)} blocks"
        yield "for", f"{len(self.layers)} attn2 of {context} text channels, CLIP's states of {seen}"
        yield "weights", weights({"style_emb": self.style_emb, "layers": self.layers})

    @classmethod
    def init(
        cls, key: jax.Array, pipe: Pipeline, image_encoder: ImageEncoder, tokens: int = 8, blocks: int = 3
    ) -> StyleAdapter:
        """Make an untrained adapter, which changes nothing: lambda is 0, keys and values are copies of the text's."""
        context = pipe.unet.config.cross_attention_dim
        layers: dict[str, Params] = {}
        for name in attn2_names(pipe):
            base = subtree(pipe.params["unet"], name)
            kernels = {x: {"kernel": jnp.array(base[x]["kernel"], jnp.float32)} for x in ("to_k", "to_v")}
            layers[name] = {**kernels, "strength": jnp.zeros((), jnp.float32)}
        width = image_encoder.model.config.hidden_size
        return cls(maths.init_style_tokens(key, width, context, tokens, blocks), layers, image_encoder)

    def save(self, path: str | Path, dtype: Any = None) -> None:
        """Write the adapter as one safetensors file: style_emb.*, and layers.NAME.* of every attn2."""
        config = {
            "class": "StyleAdapter",
            "version": 1,
            "layers": list(self.layers),
            "blocks": maths.depth(self.style_emb),
        }
        tree = {"style_emb": self.style_emb, "layers": dict(self.layers)}
        save_tree(tree, path_here(path), dtype, {_KEY: json.dumps(config)})

    @classmethod
    def load(
        cls, path: str | Path, pipe: Pipeline, image_encoder: ImageEncoder | str | Path | None = None
    ) -> StyleAdapter:
        """Read a file that `save` wrote, or one of `EMBEDDED`, which come with their image encoder.

        ``image_encoder`` is one, or the folder or file of one. Raises `InputError` for any other file, and for an
        adapter or encoder for another base.
        """
        where = EMBEDDED.get(str(path)) or user_path(path)
        if image_encoder is None and str(path) in EMBEDDED:
            image_encoder = "mini-clip"
        file = SafetensorsFile(where)
        names, blocks = _read_config(where, file)
        found = {key: entry.shape for key, entry in file.entries.items()}
        try:
            _, tokens, width = found["style_emb.style_embedding"]
            context = found["style_emb.proj.weight"][0]
            inner = {name: found[f"layers.{name}.to_k.weight"][0] for name in names}
        except (KeyError, ValueError) as error:
            raise InputError(f"{where}: found no {error}, expected all tensors of a StyleAdapter") from None
        emb = jax.eval_shape(lambda: maths.init_style_tokens(jax.random.key(0), width, context, tokens, blocks))

        def layer(size: int) -> dict[str, Any]:
            kernel = {"kernel": jax.ShapeDtypeStruct((context, size), jnp.float32)}
            return {"to_k": kernel, "to_v": kernel, "strength": jax.ShapeDtypeStruct((), jnp.float32)}

        tree = load_tree(file, {"style_emb": emb, "layers": {name: layer(size) for name, size in inner.items()}})
        if isinstance(image_encoder, (str, Path)):
            image_encoder = ImageEncoder.load(image_encoder, pipe.unet.dtype)
        made = cls(tree["style_emb"], tree["layers"], image_encoder, str(where))
        made.check(pipe)
        return made

    def check(self, pipe: Pipeline) -> None:
        """Raise `InputError` if the adapter does not fit the pipeline, or its encoder not the adapter."""
        expected = {n: subtree(pipe.params["unet"], n)["to_k"]["kernel"].shape for n in attn2_names(pipe)}
        found = {name: tuple(layer["to_k"]["kernel"].shape) for name, layer in self.layers.items()}
        if found != expected:
            odd = next((name for name in expected if found.get(name) != expected[name]), next(iter(expected)))
            raise InputError(
                f"{self.where}: its {odd} has {found.get(odd, 'no layer')}, expected {expected[odd]}; an adapter for "
                "another base?"
            )
        if self.image_encoder is not None:
            self.needs_encoder()

    def needs_encoder(self) -> ImageEncoder:
        """Return the image encoder; raises `InputError` if there is none, or one of another width."""
        seen, _ = maths.widths(self.style_emb)
        told = {1024: "ViT-L/14", 1280: "ViT-H/14", 1664: "ViT-bigG/14"}.get(seen, "an image encoder")
        if self.image_encoder is None:
            raise InputError(
                f"{self.where}: an adapter file holds no image encoder, expected {told} (its states of {seen}): "
                "image_encoder= (--image-encoder) names its folder or file"
            )
        if (found := self.image_encoder.model.config.hidden_size) != seen:
            raise InputError(
                f"{self.where}: needs states of {seen} ({told}), found an image encoder that gives {found}"
            )
        return self.image_encoder

    def see(
        self, pictures: Sequence[Any], *, shuffle: bool = True, class_token: bool = False, seed: int = 0
    ) -> np.ndarray:
        """Return CLIP's last states of the patches of pictures, joined, (pictures * patches, d) float32.

        ``shuffle`` permutes the patches of each picture before they get their positions, by ``seed`` and the picture's
        number; ``class_token`` keeps the state of the whole picture (both for ablations).
        """
        encoder = self.needs_encoder()
        pixels = encoder.pixels([as_picture(x, f"references[{i}]") for i, x in enumerate(pictures)])
        if shuffle:
            size = encoder.model.config.patch_size
            pixels = np.stack([shuffled(x, size, np.random.default_rng((seed, i))) for i, x in enumerate(pixels)])
        states = np.asarray(encoder(pixels).last_hidden_state, np.float32)[:, 0 if class_token else 1 :]
        return states.reshape(-1, states.shape[-1])

    def on(
        self,
        references: Any,
        scale: float | Sequence[float] = 1.0,
        *,
        blocks: Blocks = None,
        shuffle: bool = True,
        class_token: bool = False,
        seed: int = 0,
        window: tuple[float, float] = (0.0, 1.0),
    ) -> Styled:
        """Return the method that gives images a style.

        ``references`` is a picture for all images, or a list of one entry per image, each a picture or a list of any
        number of pictures of one style. ``scale`` (1 as trained, 0 is the base, bit for bit) is a number or one per
        image and multiplies the learnt lambda of each layer; ``blocks`` as for `IPAdapter.on`; ``window`` is the share
        of the steps with the style. ``shuffle``, ``class_token`` and ``seed`` as for `see`.
        """
        references = One(references) if getattr(references, "ndim", 0) == 3 else references
        return Styled(self, references, scale, blocks, shuffle, class_token, seed, window)


@dataclasses.dataclass(frozen=True, eq=False)
class Styled(Method):
    """A StyleAdapter with the references of the images; see `StyleAdapter.on`."""

    adapter: StyleAdapter
    references: Any
    scale: float | Sequence[float] = 1.0
    blocks: Blocks = None
    shuffle: bool = True
    class_token: bool = False
    seed: int = 0
    window: tuple[float, float] = (0.0, 1.0)

    title: ClassVar[str] = "StyleAdapter"
    per_image: ClassVar[tuple[str, ...]] = ("references", "scale")

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Refuse another model's adapter, pictures that cannot be read, and lists of other lengths."""
        super().check(pipe, request)
        self.adapter.check(pipe)
        self.adapter.needs_encoder()
        numbers("StyleAdapter: scale", self.scale, request.n, "prompts")
        try:
            self._at_site(pipe)
        except InputError as error:
            raise InputError(f"StyleAdapter: {error}") from None
        for i, some in enumerate(per_image(self.references, request.n)):
            if not len(several(some)):
                raise InputError(f"StyleAdapter: references[{i}]: found none, expected one picture or more")
            for j, one in enumerate(several(some)):
                as_picture(one, f"StyleAdapter: references[{i}][{j}]")

    def sketch(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control with tokens of zeros."""
        shape = (1, self.adapter.style_emb["style_embedding"].shape[1], pipe.unet.config.cross_attention_dim)
        return request.add(controls=(tile(self._bind(pipe, np.zeros(shape), np.zeros(1)), request.n),))

    def apply(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control with the tokens of the references."""
        tokens = jnp.stack([self._tokens(x) for x in per_image(self.references, request.n)]).astype(pipe.unet.dtype)
        scale = numbers("StyleAdapter: scale", self.scale, request.n, "prompts")
        return request.add(controls=(self._bind(pipe, tokens, np.asarray(scale)),))

    def _at_site(self, pipe: Pipeline) -> dict[str, Any]:
        return {
            name: share * self.adapter.layers[name]["strength"] for name, share in at_sites(pipe, self.blocks).items()
        }

    def _bind(self, pipe: Pipeline, tokens: AnyArray, scale: np.ndarray) -> Any:
        return maths.bind(self.adapter.layers, tokens, scale=scale, at_site=self._at_site(pipe), window=self.window)

    def _tokens(self, given: Any) -> Array:
        """Return the tokens of one image's references (t, c), each set made once."""
        some = list(several(given))
        kept = self.adapter.__dict__.setdefault("_kept", {})
        key = (*(name_of(x) for x in some), self.shuffle, self.class_token, self.seed)
        if None in key or key not in kept:
            states = self.adapter.see(some, shuffle=self.shuffle, class_token=self.class_token, seed=self.seed)
            made = _style_tokens(self.adapter.style_emb, states[None])[0]
            return made if None in key else remember(kept, key, made)
        return kept[key]


@functools.partial(jax.jit)
def _style_tokens(params: Params, states: AnyArray) -> Array:
    return maths.style_tokens(params, states)


def _read_config(where: Path, file: SafetensorsFile) -> tuple[list[str], int]:
    """Return the names of the layers and the number of blocks that a file's metadata tells."""
    try:
        config = json.loads(file.metadata.get(_KEY, "{}"))
        if config.get("class") != "StyleAdapter":
            found = config.get("class") or kind_of({key: entry.shape for key, entry in file.entries.items()})
            raise InputError(f"{where}: this is {found}, expected a StyleAdapter by train.style_adapter")
        return [str(name) for name in config["layers"]], int(config["blocks"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: the metadata {_KEY!r} is broken, expected what StyleAdapter.save writes") from None
