"""Weights in 8-bit floating point, plain or scaled, as ComfyUI and others store them: widened on the way in.

A scaled tensor `X.weight` comes with `X.scale_weight` (or `X.weight_scale`), by which it is multiplied: one number, or
one for each output row. Scales of inputs and markers say how to compute in 8 bits, which nobody does here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxmix.types import InputError

FP8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))

_SCALES = (".scale_weight", ".weight_scale")
_ENDINGS = (*_SCALES, ".scale_input", ".input_scale", ".comfy_quant")
_MARKER = "scaled_fp8"


def split_scales(where: str, entries: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a file's entries without those of scaled 8-bit weights, and {key of a weight: key of its scale}.

    Raises InputError for a scale of a tensor that is not there, or of another shape than its rows.
    """
    if not any(entry.dtype in FP8 for entry in entries.values()):
        return dict(entries), {}
    scales = {}
    for key, entry in entries.items():
        ending = next((ending for ending in _SCALES if key.endswith(ending)), None)
        if ending is None:
            continue
        weight = key.removesuffix(ending) + ".weight"
        if weight not in entries:
            raise InputError(f"{where}: found {key} but no {weight}, expected the weight that it scales")
        shape, rows = entries[weight].shape, entry.shape
        if math.prod(rows) != 1 and not (shape and rows[:1] == shape[:1] and math.prod(rows) == shape[0]):
            raise InputError(
                f"{where}: {key} has the shape {list(rows)}, expected one number, or one per row of {weight}"
            )
        scales[weight] = key
    kept = {k: e for k, e in entries.items() if not k.endswith(_ENDINGS) and k.rpartition(".")[2] != _MARKER}
    return kept, scales


def scaled(array: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return weights (o, ...) times their scale, float32."""
    factor = scale.astype(np.float32).reshape(-1, *[1] * (array.ndim - 1)) if scale.size != 1 else scale.reshape(())
    return array.astype(np.float32) * factor.astype(np.float32)
