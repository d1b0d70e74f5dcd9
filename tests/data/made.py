"""Tiny pictures with captions and labels, as folders and as tars."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

DIMENSIONS = ("color", "light", "focus")


def picture(number: int, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    """Return a smooth picture, uint8 (H, W, 3), another for each number."""
    down, right = np.mgrid[: size[0], : size[1]] / max(size)
    return (np.stack([down, right, 0 * down + number / 32], -1) * 200 + 20).astype(np.uint8)


def encoded(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def row(number: int) -> dict:
    labels = [name for i, name in enumerate(DIMENSIONS) if number >> i & 1]
    return {"text": f"picture number {number}", "labels": labels}


def make_folder(folder: Path, sizes: list[tuple[int, int]], columns: bool = False) -> Path:
    """Return a folder with metadata.jsonl; `columns` gives one column a dimension instead of a list."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, size in enumerate(sizes):
        name = f"{number:03d}.png"
        (folder / name).write_bytes(encoded(picture(number, size)))
        made = row(number)
        if columns:
            listed = made.pop("labels")
            made.update({label: (label in listed) if number % 2 else int(label in listed) for label in DIMENSIONS})
        lines.append(json.dumps({"file_name": name, **made}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_tars(folder: Path, sizes: list[tuple[int, int]], count: int) -> Path:
    """Return the rows of `make_folder` in `count` tars."""
    for part, numbers in enumerate(np.array_split(np.arange(len(sizes)), count)):
        members = {}
        for number in numbers.tolist():
            members[f"{number:03d}.png"] = encoded(picture(number, sizes[number]))
            members[f"{number:03d}.json"] = json.dumps(row(number)).encode()
        write_tar(folder / f"{part:03d}.tar", members)
    return folder


def spoil(folder: Path, number: int) -> str:
    """Cut off one of a folder's pictures in the middle; returns its id."""
    path = folder / f"{number:03d}.png"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path.name
