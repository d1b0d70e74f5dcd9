"""Write the maps of pictures that ControlNets read: edges, tiles, blurs, greys.

    python -m infer.preprocess --pictures photos --preprocess canny:100,200 --out maps

Each map has its picture's size and name, as PNG; those that are there already, of the same picture and made the same
way, are kept, so that a stopped run goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from infer.pictures import pictures_in, read_picture
from infer.png import read_settings, write_png
from jaxmix import command, paths
from jaxmix.clients import url_of
from jaxmix.preprocessors import parse, preprocess
from jaxmix.types import InputError
from jaxmix.weights.files import user_path


@dataclasses.dataclass
class Config:
    """Maps of pictures.

    Attributes:
        pictures: a folder of pictures, or one file.
        preprocess: canny[:LOW,HIGH], tile[:PIXELS], blur[:SIGMA], gray, recolor[:GAMMA], scribble[:THRESHOLD], or none.
        out: folder for the maps.
        overwrite: make maps that are there already once more.
    """

    pictures: str = ""
    preprocess: str = "canny"
    out: str = "maps"
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse what is unknown before anything is read."""
        if not self.pictures:
            raise InputError("--pictures: not given, expected a folder of pictures, or a file")
        try:
            parse(self.preprocess)
        except InputError as error:
            raise InputError(f"--preprocess: {error}") from None


def main(cfg: Config) -> int:
    """Write the map of every picture; exit status 1 if there are pictures that cannot be read."""
    name, numbers = parse(cfg.preprocess)
    told = f"{name}:{','.join(f'{x:g}' for x in numbers)}" if numbers else name
    out, found = paths.place(cfg.out), pictures_in(cfg.pictures)
    places = {path: out / f"{Path(path).stem}.png" for path in found}
    by_place: dict[Path, str] = {}
    for path, place in places.items():
        if (other := by_place.setdefault(place, path)) != path:
            raise InputError(f"{other}, {path}: found two pictures of one name, expected one map each")
    if same := next((p for p in found if _whole(places[p]) == _whole(p)), None):
        raise InputError(f"--out: found the folder of {same}, which its map would replace, expected another folder")
    if paths.remote(out):
        paths.check_folder(out)
    else:
        if out.exists() and not out.is_dir():
            raise InputError(f"--out: {out}: found a file, expected a folder")
        out.mkdir(parents=True, exist_ok=True)
    failed, kept = [], 0
    with command.progress(len(found), told, "pictures") as bar:
        for path, place in places.items():
            settings = {"preprocess": told, "picture": hashlib.sha256(user_path(path).read_bytes()).hexdigest()}
            if not cfg.overwrite and read_settings(place) == settings:
                kept += 1
            else:
                try:
                    write_png(place, preprocess(read_picture(path), told), {"jaxmix": json.dumps(settings)})
                except InputError as error:
                    failed.append(str(error))
            bar.update(1)
    for line in failed:
        print(f"error: {line}")
    print(f"wrote {len(found) - len(failed) - kept} maps to {out}, {kept} were there, {len(failed)} failed")
    return 1 if failed else 0


def _whole(path: str | Path) -> str:
    return url_of(path) or str(Path(path).resolve())


if __name__ == "__main__":
    command.run(main)
