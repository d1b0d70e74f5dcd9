"""ControlNet (arXiv 2302.05543) as a method: a net from a file or folder, and a picture per image to follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from jaxmix.cards import Card, weights
from jaxmix.controls import controlnet as maths
from jaxmix.models.controlnet import ControlNetConfig, ControlNetModel
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.references import One
from jaxmix.pipeline.request import Method, Request, is_list
from jaxmix.pipeline.vision import as_hint
from jaxmix.rows import numbers
from jaxmix.types import InputError, Params, note, shown
from jaxmix.weights import load_tree
from jaxmix.weights.controlnet_files import open_controlnet, write_controlnet
from jaxmix.weights.files import ASSETS, path_here, user_path

PLACES = {name: ASSETS / name for name in ("mini-edges", "mini-tile", "mini-masks")}
EMBEDDED = {name: path for name, path in PLACES.items() if (path / "config.json").is_file()}
"""Nets that come with the package, by name: what they follow is `canny`, `tile`, and masks by colour."""

_CHANNELS = (16, 32, 96, 256)  # of the encoder of pictures, at 1, 1/2, 1/4 and 1/8 of their size
_MUST_AGREE = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ControlNet(Card):
    """A ControlNet: its config and its parameters, `jaxmix.models.controlnet.ControlNetModel`'s."""

    config: ControlNetConfig
    params: Params
    where: str = "ControlNet"

    def _facts(self) -> Iterator[tuple[str, str]]:
        cfg = self.config
        yield "for", f"{cfg.outputs - 1} skips of {cfg.block_out_channels}, {cfg.cross_attention_dim} text channels"
        pooled = ", means over the picture" if cfg.global_pool_conditions else ""
        yield "pictures", f"{cfg.controlnet_conditioning_channel_order}, 1/{cfg.factor} of their size{pooled}"
        yield "weights", weights(self.params)

    @classmethod
    def init(cls, key: jax.Array, pipe: Pipeline, channels: Sequence[int] | None = None) -> ControlNet:
        """Make an untrained net for a pipeline, as the authors start theirs: it changes nothing.

        Its way down is a copy of the UNet's. ``channels`` are those of its encoder of pictures, which halves their size
        between two of them; the authors' if None, as many as the autoencoder's factor asks for.
        """
        levels = pipe.vae.config.factor.bit_length()
        if channels is None and levels > len(_CHANNELS):
            raise InputError(f"ControlNet: channels: found none, expected {levels} for this autoencoder")
        config = ControlNetConfig.of_unet(pipe.unet.config, tuple(channels or _CHANNELS[:levels]))
        made = cls(config, ControlNetModel(config).copy_params(key, pipe.params["unet"]))
        made.check(pipe)
        return made

    @classmethod
    def load(
        cls, path: str | Path, pipe: Pipeline | None = None, config: Mapping[str, Any] | None = None
    ) -> ControlNet:
        """Read a net: one of `EMBEDDED`, diffusers' folder, or a ``.safetensors`` file of its layout or the authors'.

        With ``pipe`` the weights get the precision of its UNet, and what a file alone does not say (heads, groups of
        norms) is as there. Without, they keep their own, that is as in the released models, and whether the net fits
        is checked when it is used. ``config`` has settings over the file's, for what no tensor shows:
        {"global_pool_conditions": True} for "shuffle" nets. Raises `InputError` for a pickle, with the command that
        converts it, for networks of other kinds, damaged files, and a net for another base.
        """
        where = EMBEDDED.get(str(path)) or user_path(path)
        told, source = open_controlnet(where, None if pipe is None else pipe.unet.config.to_dict())
        notes: list[str] = []
        try:
            found = ControlNetConfig.from_dict({**told, **(config or {})}, notes)
            target = ControlNetModel(found).abstract_params()
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        except (TypeError, ValueError, IndexError, ArithmeticError) as error:
            raise InputError(
                f"{where}: its config describes no net that can be built: {shown(str(error), 200)[1:-1]}"
            ) from None
        if notes:
            note("; ".join(notes), None, str(where))
        made = cls(found, target, str(where))
        if pipe is not None:
            made.check(pipe)
        params = load_tree(source, target, "auto" if pipe is None else pipe.unet.dtype)
        return dataclasses.replace(made, params=params)

    def save(self, folder: str | Path, dtype: Any = None) -> None:
        """Write diffusers' folder, which its `ControlNetModel.from_pretrained` opens; ``dtype`` casts the weights."""
        write_controlnet(path_here(folder), self.config.to_dict(), self.params, dtype)

    def check(self, pipe: Pipeline) -> None:
        """Raise `InputError` if the net is for another base."""
        for key in _MUST_AGREE:
            found, expected = getattr(self.config, key), getattr(pipe.unet.config, key)
            if found != expected:
                raise InputError(
                    f"{self.where}: its {key} is {found}, expected {expected}; a ControlNet for another base?"
                )
        if self.config.factor != pipe.vae.config.factor:
            raise InputError(
                f"{self.where}: it makes pictures {self.config.factor} times smaller, expected "
                f"{pipe.vae.config.factor} times, as this model's autoencoder does"
            )

    def on(
        self,
        pictures: Any,
        scale: float | Sequence[float] = 1.0,
        window: tuple[float, float] = (0.0, 1.0),
        guess: bool | Sequence[bool] = False,
    ) -> Controlled:
        """Return the method that makes images follow pictures, such as edges, depths or poses.

        ``pictures`` is one for all images, or a list of one per image: a path, a picture of PIL, or an array (H, W, 3),
        uint8 or float in [0, 1]. It is resized to the image, whose shape it must have. ``scale`` is a number or one per
        image: 0 is the base, bit for bit. The net is live in the steps that lie wholly in ``window``, a share of them.
        ``guess``, one or one per image, is for images without a prompt: weak outputs for the fine grids, and none in
        the unconditional branch; a guidance scale of 3 to 5 goes with it.
        """
        if getattr(pictures, "ndim", 0) == 4:
            pictures = list(pictures)
        elif hasattr(pictures, "ndim"):
            pictures = One(pictures)  # an array, which is no list of images
        return Controlled(self, pictures, scale, window, guess)


@dataclasses.dataclass(frozen=True, eq=False)
class Controlled(Method):
    """A ControlNet with the pictures of the images; see `ControlNet.on`."""

    net: ControlNet
    pictures: Any
    scale: float | Sequence[float] = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    guess: bool | Sequence[bool] = False

    title: ClassVar[str] = "ControlNet"
    per_image: ClassVar[tuple[str, ...]] = ("pictures", "scale", "guess")

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Refuse another model's net, pictures of another shape or that cannot be read, and lists of other lengths."""
        super().check(pipe, request)
        self.net.check(pipe)
        self._numbers(request.n)
        for _ in self._hints(request):  # one at a time: those of a large job need not fit into memory
            pass

    def sketch(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control with a picture of one pixel."""
        return self._add(pipe, request, np.zeros((request.n, 1, 1, 3), np.float32))

    def apply(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control with the pictures."""
        made = np.stack(list(self._hints(request)))
        return self._add(pipe, request, np.broadcast_to(made, (request.n, *made.shape[1:])))

    def _add(self, pipe: Pipeline, request: Request, hints: np.ndarray) -> Request:
        model = ControlNetModel(self.net.config, pipe.unet.dtype)
        scale, guess = self._numbers(request.n)
        control = maths.bind(model, self.net.params, hints, scale=scale, guess=guess, window=self.window)
        return request.add(controls=(control,))

    def _numbers(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the scale (n,) and whether each image is in guess mode (n,)."""
        guess = list(self.guess) if is_list(self.guess) else [self.guess] * n  # type: ignore[arg-type]
        if not all(isinstance(x, (bool, np.bool_)) for x in guess):
            raise InputError(f"ControlNet: guess: found {shown(self.guess)}, expected True or False, or one per image")
        return numbers("ControlNet: scale", self.scale, n, "prompts"), np.asarray(guess, bool)

    def _hints(self, request: Request) -> Iterator[np.ndarray]:
        """Yield each picture, or the one for all, at the size of the images, (H, W, 3) float32 in [0, 1]."""
        assert request.height is not None and request.width is not None
        one_each = isinstance(self.pictures, (list, tuple))
        for i, given in enumerate(self.pictures if one_each else [self.pictures]):
            where = f"ControlNet: pictures[{i}]" if one_each else "ControlNet: pictures"
            picture = given.picture if isinstance(given, One) else given
            yield as_hint(picture, (request.height, request.width), where)
