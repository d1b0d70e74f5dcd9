"""PEFT's configuration of a LoRA: in the metadata of diffusers' files, or in the file beside PEFT's own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmix.types import InputError, shown
from jaxmix.weights.load import read_config
from jaxmix.weights.safetensors import SafetensorsFile

METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's configuration, as JSON, in the metadata of the safetensors file."""

_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def peft_configs(source: SafetensorsFile) -> dict[str | None, dict[str, Any]]:
    """Return PEFT's configuration of each part; that of its own file, which holds one model, under None."""
    path = Path(source.where)
    if METADATA in source.metadata:
        try:
            flat = json.loads(source.metadata[METADATA])
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", type(error).__name__)
            raise InputError(f"{source.where}: the metadata {METADATA} is not JSON: {why}") from None
        configs: dict[str | None, dict[str, Any]] = {}
        for key, value in flat.items() if isinstance(flat, Mapping) else ():
            part, _, name = key.partition(".")
            configs.setdefault(part, {})[name] = value
        return configs
    if path.name == _PEFT_FILE and (path.parent / _PEFT_CONFIG).is_file():
        return {None: read_config(path.parent / _PEFT_CONFIG)}
    return {}


def peft_alpha(where: str, config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the alpha that PEFT would use; where it scales by the root of the rank, converted to scale by the rank.

    LoRA calls it `lora_alpha`, LoHa and LoKr `alpha`; null or none is the rank, 0 is 0. Raises InputError for values
    that are no numbers, and patterns that are no regular expressions.
    """
    key = "lora_alpha" if config.get("lora_alpha") is not None else "alpha"
    alpha = config.get(key)
    patterns = config.get("alpha_pattern")
    if patterns is not None and not isinstance(patterns, Mapping):
        raise InputError(f"{where}: PEFT's alpha_pattern is {shown(patterns)}, expected an object")
    for pattern, value in (patterns or {}).items():
        try:
            hit = re.match(rf"(.*\.)?({pattern})$", module)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{where}: PEFT's alpha_pattern has {shown(pattern)}: {error}") from None
        if hit:
            key, alpha = f"alpha_pattern {pattern}", value
            break
    if alpha is None:
        alpha = rank
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not (number and abs(alpha) < 1e30 and math.isfinite(alpha)):
        raise InputError(f"{where}: PEFT's {key} is {shown(alpha)}, expected a number")
    return float(alpha) * (rank**0.5 if config.get("use_rslora") else 1.0)
