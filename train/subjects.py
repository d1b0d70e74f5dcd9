"""What trainers of a subject or a style from a few pictures share: their keys, the pictures, and rows under prompts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import jax
import numpy as np
from etils import epath

from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.types import InputError
from train.adapters import AdapterConfig, check_scenes, make_captioned
from train.data import PICTURES, BadRow, LatentCache, Pictures, check_sizes, open_source
from train.data.joined import told
from train.data.order import Stream
from train.data.rows import Entry, PictureSource
from train.scenes import Scenes
from train.scenes.captions import STYLE_WORDS

_MOST_SCENES = 10_000  # looked at for those that show the object


@dataclasses.dataclass
class SubjectConfig(AdapterConfig):
    """The keys of every trainer of a subject, after those of every trainer of an adapter.

    Attributes:
        instance_data_dir: pictures of the subject, or one picture; the same as train_data_dir.
        scene_object: with scenes: the object that they are to show alone; empty for any scene.
        num_instance_images: with scenes: how many of them are shown.
    """

    instance_data_dir: str = ""
    scene_object: str = ""
    num_instance_images: int = 5

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        if self.train_data_dir and self.instance_data_dir not in ("", self.train_data_dir):
            raise InputError("instance_data_dir, train_data_dir: found two folders, expected one: they mean the same")
        self.train_data_dir = self.train_data_dir or self.instance_data_dir
        super().__post_init__()
        if self.scene_object and not self.scenes:
            raise InputError("scene_object: found it without scenes, expected both: it is one of their objects")
        if self.num_instance_images < 1:
            raise InputError(f"num_instance_images: found {self.num_instance_images}, expected 1 or more")


class SubjectScenes:
    """The first scenes, or the first that show one object alone, as rows of pictures.

    Their "template" is the caption with {} where the object is named, or the style if no object is asked for.
    """

    def __init__(self, scenes: Scenes, name: str, count: int):
        if name and name not in scenes.object_names:
            raise InputError(f"scene_object: found {name!r}, expected one of {', '.join(scenes.object_names)}")
        found = (i for i in range(_MOST_SCENES) if not name or scenes[i]["object_names"] == (name,))
        self.rows = [
            {"image": scenes[i]["image"], "template": _template(scenes[i], name), "id": f"scene {i}"}
            for i, _ in zip(found, range(count), strict=False)
        ]
        if not self.rows:
            raise InputError(f"scene_object: found {name!r} alone in none of {_MOST_SCENES} scenes")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def in_batches(self, batch_size: int, seed: int) -> Stream:
        """Return the endless rows; see `jaxmix.tuning.data.BatchSource`."""
        return Stream([np.arange(len(self))], batch_size, seed, lambda index, group, rng: self.rows[index])


def _template(scene: Mapping[str, Any], name: str) -> str:
    said = re.escape(name or STYLE_WORDS[scene["style_name"]])
    return re.sub(rf"\b{said}\b", "{}", scene["caption"], count=1)


class OnePicture(PictureSource):
    """A picture's file as a source of one row."""

    def __init__(self, path: str) -> None:
        self.path = epath.Path(path).expanduser()
        super().__init__(str(path), None, [Entry(self.path.name, fault="no text", untold=True)])

    def open(self, index: int) -> BinaryIO:
        try:
            return self.path.open("rb")
        except FileNotFoundError:
            raise BadRow("no such file") from None


class InTurn:
    """Rows of one or several sources in turn, so that every batch has as many of each: a `BatchSource`.

    Each source has its prompt, the "text" of its rows, and its number, their "half".
    """

    def __init__(self, *parts: tuple[Any, str]):
        self.parts = parts

    def __len__(self) -> int:
        return sum(len(rows) for rows, _ in self.parts)

    def in_batches(self, batch_size: int, seed: int) -> _Turns:
        """Return the endless rows: row i of a batch is of source i modulo their number."""
        count = len(self.parts)
        streams = [rows.in_batches(batch_size // count, seed + i) for i, (rows, _) in enumerate(self.parts)]
        return _Turns(streams, [prompt for _, prompt in self.parts])


@dataclasses.dataclass(frozen=True)
class _Turns:
    streams: list[Any]
    prompts: list[str]

    def __len__(self) -> int:
        return min(map(len, self.streams))

    def __getitem__(self, place: int) -> dict[str, Any]:
        index, half = divmod(place, len(self.streams))
        return {**self.streams[half][index], "text": self.prompts[half], "half": half}


def open_instances(cfg: SubjectConfig, pipe: Pipeline, caption: str, word: str = "") -> Any:
    """Return the pictures of the subject, a `BatchSource`, and say what there is.

    ``caption`` is that of pictures without one; ``word`` is put before captions that lack it. A cache is refused.
    """
    if cfg.scenes:
        check_scenes(pipe)
        return SubjectScenes(Scenes(**cfg.scenes), cfg.scene_object, cfg.num_instance_images)
    path = epath.Path(cfg.train_data_dir).expanduser()
    source: Any
    if path.name.lower().endswith(PICTURES) and not path.is_dir():
        if not path.exists():
            raise InputError(f"{cfg.train_data_dir}: no such file, expected a picture or a folder of pictures")
        source = OnePicture(cfg.train_data_dir)
    else:
        source = open_source(cfg.train_data_dir, None, cfg.text_column, cfg.image_column, trigger_word=word)
    if isinstance(source, LatentCache):
        raise InputError(f"instance_data_dir: found a cache, {cfg.train_data_dir}, expected pictures")
    source.entries = [told(entry, caption) for entry in source.entries]
    check_sizes(cfg, pipe)
    rows = Pictures(source, cfg)
    if jax.process_index() == 0:
        print(rows.describe(), flush=True)
    return rows


def make_rows(
    tokenize: Callable[[str], dict[str, np.ndarray]],
    caption_dropout_rate: float,
    weights: tuple[float, ...] = (1.0,),
) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, Any]]:
    """Return the transform from a row of `InTurn` to `make_captioned`'s arrays, and "loss_weight" () float32.

    ``weights`` are those of the halves.
    """
    captioned = make_captioned(tokenize)

    def row(source: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        made = captioned(source, rng.random() < caption_dropout_rate)
        if "input_ids_2" not in made:  # sizes are for SDXL alone, and scenes have none
            made.pop("time_ids", None)
        return {**made, "loss_weight": np.float32(weights[source["half"]])}

    return row


def words_of(prompt: str) -> list[str]:
    """Return the words of a prompt in lower case."""
    return prompt.lower().replace(",", " ").replace(".", " ").split()
