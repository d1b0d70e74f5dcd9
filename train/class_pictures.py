"""Pictures of a class, drawn once by the model that is to be trained, from a fixed seed each (arXiv 2208.12242)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmix import command
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.tuning.checkpoints import stop_on_signals
from jaxmix.types import InputError, shown
from jaxmix.weights.identity import weights_digest
from train.data.rows import PICTURES

PLAN = "class_pictures.json"


def class_pictures(
    pipe: Pipeline,
    folder: Path,
    prompt: str,
    count: int,
    size: int,
    *,
    seed: int = 0,
    batch_size: int = 4,
    guidance_scale: float | None = None,
    draw: Callable[..., np.ndarray] | None = None,
) -> bool:
    """Draw what a folder lacks of `count` pictures; return whether it has them now, False after a signal to stop.

    Pictures that are there already and are not ours (named otherwise than NNNNN.png) count, as in diffusers' trainers.
    Number i is drawn from seed + i, whatever the batch, so a run that was stopped goes on where it was; several
    processes draw a share each of the folder that all of them see. Raises `InputError` for a folder whose pictures were
    drawn for another prompt, size or model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in folder.iterdir() if path.suffix.lower() in PICTURES}
    drawn = max(0, count - len({name for name in names if not _is_ours(name)}))
    wanted = [i for i in range(drawn) if f"{i:05d}.png" not in names]
    plan = {"class_prompt": prompt, "seed": seed, "guidance_scale": guidance_scale, "resolution": size}
    if drawn:
        _check_plan(folder, {**plan, "base": weights_digest(pipe.params["unet"])})
    mine = wanted[jax.process_index() :: jax.process_count()]
    draw, whole = draw or pipe.generate, True
    if mine:
        with stop_on_signals() as signals, command.progress(len(mine), "class pictures", "pictures") as bar:
            for start in range(0, len(mine), batch_size):
                if signals:
                    print(
                        f"stopped while drawing class pictures ({signals[0]}): {start} of {len(mine)} more are in "
                        f"{folder}; the same command goes on from there"
                    )
                    whole = False
                    break
                part = mine[start : start + batch_size]
                padded = part + part[-1:] * (batch_size - len(part))  # one program, whatever is left
                seeds = [seed + i for i in padded]
                images = draw([prompt] * batch_size, seeds, None, guidance_scale, height=size, width=size)
                for i, image in zip(part, images, strict=False):
                    _write(folder / f"{i:05d}.png", image)
                bar.update(len(part))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        whole = bool(np.all(multihost_utils.process_allgather(np.asarray(whole))))
    return whole


def _is_ours(name: str) -> bool:
    return len(name) == 9 and name.endswith(".png") and name[:5].isdigit()


def _write(path: Path, image: Any) -> None:
    """Write a PNG, which appears whole or not at all."""
    from PIL import Image

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    Image.fromarray(np.asarray(image)).save(temporary, format="PNG")
    os.replace(temporary, path)


def _check_plan(folder: Path, plan: dict[str, Any]) -> None:
    file = folder / PLAN
    if not file.is_file():
        if jax.process_index() == 0:
            file.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not readable as JSON: {error}") from None
    for key in sorted(plan):
        if not isinstance(found, dict) or found.get(key) != plan[key]:
            was = found.get(key) if isinstance(found, dict) else found
            raise InputError(
                f"{folder}: its class pictures were drawn for another {key}: found {shown(was)}, expected "
                f"{shown(plan[key])}; give another class_data_dir, or delete the folder"
            )
