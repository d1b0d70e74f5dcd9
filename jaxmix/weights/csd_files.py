"""The checkpoint of CSD, Contrastive Style Descriptors (arXiv 2404.01292): a CLIP image encoder and two matrices.

Its keys are the encoder's in OpenAI's layout, behind ``backbone.``, and ``last_layer_style`` and ``last_layer_content``
(hidden size, p), all of them behind ``module.`` where they were saved from several devices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxmix.types import InputError
from jaxmix.weights.files import exists
from jaxmix.weights.finite import all_finite
from jaxmix.weights.load import flat_pickle_error
from jaxmix.weights.safetensors import SafetensorsFile
from jaxmix.weights.single_file_kinds import kind_of
from jaxmix.weights.source import Source
from jaxmix.weights.vision_files import open_inner_encoder

HEADS = ("style", "content")
_PICKLES = (".pth", ".pt", ".bin", ".ckpt")


def open_csd(path: Path) -> tuple[dict[str, Any], Source, dict[str, np.ndarray]]:
    """Return the config and the tensors of the encoder, and the matrices {"style", "content": (d, p)}, float32.

    Raises InputError for a pickle, with the command that converts it, and for any other file.
    """
    if not exists(path) or path.is_dir():
        what = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: found {what}, expected a checkpoint of CSD as .safetensors")
    if path.suffix.lower() in _PICKLES:
        raise flat_pickle_error(path, "csd.safetensors", "model_state_dict")
    file = SafetensorsFile(path)
    shapes = {key: entry.shape for key, entry in file.stored.items()}
    outer = next((x for x in ("module.", "") if f"{x}last_layer_style" in shapes), None)
    if outer is None:
        raise InputError(
            f"{path}: this is {kind_of(shapes)}, expected a checkpoint of CSD (backbone.*, last_layer_style and "
            "last_layer_content)"
        )
    config, source = open_inner_encoder(file, f"{outer}backbone.")
    heads = {}
    for name in HEADS:
        key = f"{outer}last_layer_{name}"
        found = shapes.get(key)
        if found is None or len(found) != 2 or found[0] != config["hidden_size"]:
            raise InputError(f"{path}: {key} is {found or 'not there'}, expected ({config['hidden_size']}, p)")
        heads[name] = np.asarray(file.read(key), np.float32)
        if not all_finite(heads[name]):
            raise InputError(f"{path}: {key} holds numbers that are not finite")
    return config, source, heads
