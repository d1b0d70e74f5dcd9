"""What CLIP sees in pictures, kept in files: as one object, and as a folder that many jobs fill and read."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmix import pictures
from jaxmix.pipeline.vision import ImageEncoder
from jaxmix.types import AnyArray, InputError, shown
from jaxmix.weights import save_tree
from jaxmix.weights.files import exists, path_here, user_path
from jaxmix.weights.finite import all_finite
from jaxmix.weights.identity import config_digest, weights_digest
from jaxmix.weights.safetensors import SafetensorsFile

NONE = "none.safetensors"  # what is seen in no picture; it also says which image encoder filled the folder
_IDENTITY = ("config", "weights", "dtype")
_AT_ONCE = 8  # pictures read before they are encoded


class Takes(NamedTuple):
    """What an adapter takes of CLIP: ``output`` "projected" (p,) or "penultimate" (s, d), p or d being ``width``.

    ``where`` names the adapter, ``needs`` the image encoder that it was trained with, in messages.
    """

    output: str
    width: int
    where: str
    needs: str

    def check(self, encoder: ImageEncoder) -> None:
        """Raise `InputError` for an image encoder that gives something else."""
        cfg = encoder.model.config
        found = (cfg.projection_dim if cfg.projection else 0) if self.output == "projected" else cfg.hidden_size
        if found != self.width:
            raise InputError(f"{self.where}: needs {self.needs}, found an image encoder that gives {found}")


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Pictures as CLIP sees them: ``shown`` (n, ...) for n pictures, ``none`` (...) for no picture, float32.

    "base" adapters take the projection (p,), others the states before the last layer (s, d).
    """

    shown: np.ndarray
    none: np.ndarray

    def check(self, takes: Takes, where: str) -> None:
        """Raise `InputError` starting with ``where`` if an adapter takes something else of CLIP."""
        found, none = np.shape(self.shown), np.shape(self.none)
        of_states = takes.output == "penultimate"
        if found[1:] != none or len(none) != 1 + of_states or none[-1] != takes.width:
            expected = f"(pictures, states, {takes.width})" if of_states else f"(pictures, {takes.width})"
            raise InputError(
                f"{where}: found embeddings {found} and {none} of no picture, expected {expected} and one of them; "
                f"{takes.where} needs {takes.needs}"
            )

    def save(self, path: str | Path) -> None:
        """Write both as one safetensors file, which appears whole or not at all."""
        save_tree({"shown": np.asarray(self.shown), "none": np.asarray(self.none)}, path_here(path), np.float32)

    @classmethod
    def load(cls, path: str | Path) -> Embeddings:
        """Read a file that `save` wrote; raises `InputError` for any other."""
        file = SafetensorsFile(user_path(path))
        shapes = {key: entry.shape for key, entry in file.entries.items()}
        if shapes.keys() != {"shown", "none"} or shapes["shown"][1:] != shapes["none"] or not shapes["none"]:
            raise InputError(
                f"{path}: found {shown(shapes or 'no tensors')}, expected 'shown' (n, ...) and 'none' (...) of pictures"
            )
        return cls(_numbers(file, "shown"), _numbers(file, "none"))


class EmbeddingFolder:
    """A folder of what an image encoder sees in pictures, one small file for each, so that each is encoded once.

    A picture's file is named by the SHA-256 of the picture's bytes, so neither its name nor its place matters; it holds
    "projected" (p,), if the encoder has a projection, and "penultimate" (s, d), if an adapter has needed it, float32.
    `NONE` holds the "penultimate" of a grey picture. All say by which encoder they were made. Files appear whole or not
    at all, so any number of processes may share a folder.

    With an ``image_encoder`` pictures that are not there are encoded and added; without one they cannot be read. Raises
    `InputError` if another encoder, or the same in another dtype, has filled the folder. For
    `jaxmix.IPAdapter.on`::

        folder = EmbeddingFolder("seen", jaxmix.ImageEncoder.load("clip"))
        look = adapter.on([folder.read([path], adapter.takes) for path in ("a.png", "b.png")])
    """

    def __init__(self, path: str | Path, image_encoder: ImageEncoder | None = None) -> None:
        self.path = path_here(path)
        self.image_encoder = image_encoder
        self._names: dict[tuple[str, int, int], str] = {}
        self._none: np.ndarray | None = None
        if exists(self.path) and not self.path.is_dir():
            raise InputError(f"{path}: found a file, expected a folder of what is seen in pictures")
        if image_encoder is not None:
            self.identity = _identify(image_encoder)
        elif not exists(self.path / NONE):
            raise InputError(
                f"{path}: found no {NONE}, expected a folder that an image encoder has filled, or one to fill it"
            )
        else:
            held = SafetensorsFile(self.path / NONE).metadata
            self.identity = {key: held.get(key, "none") for key in _IDENTITY}
        if exists(self.path / NONE):
            self._open(self.path / NONE)

    def file(self, picture: str | Path) -> Path:
        """Return where a picture's file is, or would be."""
        path = user_path(picture)
        try:
            stat = path.stat()
            key = (str(path), stat.st_mtime_ns, stat.st_size)
            if key not in self._names:
                with path.open("rb") as file:
                    self._names[key] = hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, ValueError):
            raise InputError(f"{picture}: no such file, expected a picture") from None
        return self.path / f"{self._names[key]}.safetensors"

    def holds(self, picture: str | Path, takes: Takes) -> bool:
        """Return whether what an adapter takes of a picture is there.

        Raises `InputError` for a file that is damaged, of another encoder, or not of the adapter's width.
        """
        path = self.file(picture)
        return exists(path) and self._find(path, takes) is not None

    def check(self, picture: str | Path, takes: Takes) -> None:
        """Raise `InputError` as `holds` does, and if a picture is neither there nor can be encoded."""
        if not self.holds(picture, takes) and self.image_encoder is None:
            raise InputError(
                f"{picture}: found no '{takes.output}' of it in {self.path} ({self.file(picture).name}), expected it "
                f"there, or {takes.needs}: image_encoder= (--image-encoder) names its folder or file"
            )

    def missing(self, pictures: Sequence[str | Path], takes: Sequence[Takes]) -> list[str | Path]:
        """Return the pictures of which something that adapters take is not there, those of the same bytes once."""
        files: dict[Path, str | Path] = {}
        for picture in pictures:
            files.setdefault(self.file(picture), picture)
        return [x for x in files.values() if not all(self.holds(x, one) for one in takes)]

    def add(self, pictures: Sequence[str | Path], takes: Sequence[Takes]) -> None:
        """Encode what is missing of pictures, a few at a time, and write their files.

        Raises `InputError` for what is no picture, without an image encoder, and if what is seen is not finite.
        """
        todo = self.missing(pictures, takes)
        if not todo:
            return
        if (encoder := self.image_encoder) is None:
            for one in takes:
                self.check(todo[0], one)
            return
        for one in takes:
            one.check(encoder)
        self._write(NONE, {"penultimate": encoder.none.penultimate[0]}, replace=False)
        states = any(one.output == "penultimate" for one in takes)
        for start in range(0, len(todo), _AT_ONCE):
            some = [_open_picture(x) for x in todo[start : start + _AT_ONCE]]
            seen = encoder(encoder.pixels([image for _, image in some]))
            for i, (name, _) in enumerate(some):
                held: dict[str, AnyArray] = {} if seen.projected is None else {"projected": seen.projected[i]}
                held |= {"penultimate": seen.penultimate[i]} if states else {}
                if not all(np.isfinite(np.asarray(x, np.float32)).all() for x in held.values()):
                    raise InputError(
                        f"{todo[start + i]}: found numbers that are not finite in what the image encoder sees in it, "
                        f"expected finite ones; {self.identity['dtype']} may be too small"
                    )
                self._write(f"{name}.safetensors", held)

    def read(self, pictures: Sequence[str | Path], takes: Takes) -> Embeddings:
        """Return what an adapter (``takes`` is its `jaxmix.IPAdapter.takes`) takes of the pictures of one image.

        Those that are not there are encoded and added. Raises `InputError` as `check` and `add` do.
        """
        self.add(pictures, [takes])
        seen = []
        for picture in pictures:
            file = self._find(self.file(picture), takes)
            if file is None:
                raise InputError(f"{self.file(picture)}: found no '{takes.output}', which was there before")
            seen.append(_numbers(file, takes.output))
        shown_to = np.stack(seen)
        if takes.output == "projected":
            return Embeddings(shown_to, np.zeros_like(shown_to[0]))
        none = self._nothing()
        if shown_to.shape[1:] != none.shape:
            raise InputError(
                f"{self.path / NONE}: found states {none.shape}, expected {shown_to.shape[1:]} as of pictures"
            )
        return Embeddings(shown_to, none)

    def _nothing(self) -> np.ndarray:
        if self._none is None:
            file = self._open(self.path / NONE)
            if "penultimate" not in file.entries:
                raise InputError(f"{file.where}: found no 'penultimate', expected it of a grey picture")
            self._none = _numbers(file, "penultimate")
        return self._none

    def _open(self, path: Path) -> SafetensorsFile:
        """Return a file of the folder; raises `InputError` for one that this encoder did not make."""
        file = SafetensorsFile(path)
        for key in _IDENTITY:
            found, expected = file.metadata.get(key, "none"), self.identity[key]
            if found == "none":
                raise InputError(f"{path}: found no {key} of an image encoder, expected a file of what one sees")
            if found != expected:
                raise InputError(
                    f"{path}: made by another image encoder: {key}: found {shown(found)}, expected {shown(expected)}"
                )
        return file

    def _find(self, path: Path, takes: Takes) -> SafetensorsFile | None:
        """Return a picture's file, None if it lacks what an adapter takes."""
        file = self._open(path)
        if takes.output not in file.entries:
            return None
        shape = file.entries[takes.output].shape
        if len(shape) != (1 if takes.output == "projected" else 2) or shape[-1] != takes.width:
            raise InputError(
                f"{path}: found '{takes.output}' {shape}, expected {takes.width} channels for {takes.where}, which "
                f"needs {takes.needs}"
            )
        return file

    def _write(self, name: str, held: Mapping[str, AnyArray], replace: bool = True) -> None:
        if replace or not exists(self.path / name):
            save_tree({key: np.asarray(x) for key, x in held.items()}, self.path / name, np.float32, self.identity)


def _open_picture(picture: str | Path) -> tuple[str, np.ndarray]:
    """Return the SHA-256 of a picture's bytes and what they show: of the same bytes, whoever changes the file."""
    try:
        content = user_path(picture).read_bytes()
        return hashlib.sha256(content).hexdigest(), pictures.read(content)
    except OSError as error:
        raise InputError(f"{picture}: cannot be read: {error.strerror}, expected a picture") from None
    except pictures.UnreadableError as error:
        raise InputError(f"{picture}: {error}") from None


def _numbers(file: SafetensorsFile, key: str) -> np.ndarray:
    array = file.read(key)
    if array.dtype != np.float32 or not all_finite(array):
        kind = array.dtype if array.dtype != np.float32 else "numbers that are not finite"
        raise InputError(f"{file.where}: found {kind} in '{key}', expected finite float32")
    return array


def _identify(encoder: ImageEncoder) -> dict[str, str]:
    model = encoder.model
    return {
        "config": config_digest(model.config.to_dict()),
        "weights": weights_digest(encoder.params),
        "dtype": str(jnp.dtype(model.dtype)),
    }
