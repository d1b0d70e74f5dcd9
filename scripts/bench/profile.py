"""Where the time of one of our programs goes on this CPU: by kind of operation, and how fast its convolutions are.

    python -m scripts.bench.profile --model mini --task unet
    taskset -c 0 python -m scripts.bench.profile --model mini --task decode      # of one core, whose peak is known

Times are those of XLA's own profiler, summed over the threads that wait for an operation: with several cores compare
shares. FLOPs of convolutions are what the compiled program computes, columns that are dropped again included; those of
products are what the model needs besides.
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax

from jaxmix import command
from jaxmix.types import InputError
from scripts.bench.ours import materialize
from scripts.bench.programs import program
from scripts.bench.rows import BenchRow
from scripts.bench.table import table

_SHAPE = r"\w+\[([\d,]*)\]"
_CONVOLUTION = re.compile(rf"%?([\w.\-]+) = {_SHAPE}\S* convolution\(.*?%?([\w.\-]+)\), window={{size=(\d+)x(\d+)")
_DEFINED = re.compile(rf"%?([\w.\-]+) = {_SHAPE}")
_PRODUCTS = re.compile(r"ynn_fusion|^dot|onednn|eigen", re.IGNORECASE)


@dataclasses.dataclass
class Config:
    """What to look at.

    Attributes:
        model: mini, sd15 or sdxl, with random weights.
        task: one step of the UNet, the sampler, or the decoder.
        latents: their side.
        batch: images; the UNet sees two rows of each.
        steps: of the sampler.
        calls: that are profiled.
        tiny: shrink the model, to see that the script works.
    """

    model: Literal["mini", "sd15", "sdxl"] = "mini"
    task: Literal["unet", "sample", "decode"] = "unet"
    latents: int = 16
    batch: int = 4
    steps: int = 25
    calls: int = 10
    tiny: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that make no program."""
        for key in ("latents", "batch", "steps", "calls"):
            if getattr(self, key) < 1:
                raise InputError(f"{key}: found {getattr(self, key)}, expected 1 or more")


def _sides(text: str) -> list[int]:
    return [int(side) for side in text.split(",") if side]


def convolutions(text: str) -> dict[str, float]:
    """Return the FLOPs of every convolution of a compiled program, by its name."""
    shapes = {name: _sides(sides) for name, sides in _DEFINED.findall(text)}
    found = {}
    for name, out, kernel, high, wide in _CONVOLUTION.findall(text):
        inputs = shapes[kernel][-2] if kernel in shapes else 0
        found[name] = 2.0 * math.prod(_sides(out)) * int(high) * int(wide) * inputs
    return found


def operations(folder: Path) -> Iterator[tuple[str, float]]:
    """Yield the name and the seconds of every operation of a profile."""
    (path,) = folder.rglob("*.trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            yield event["args"]["hlo_op"], event["dur"] / 1e6


def main(cfg: Config) -> int:
    """Compile, time, profile, print."""
    if jax.default_backend() != "cpu":
        raise InputError(f"found a {jax.default_backend()}, expected a CPU: its names of operations are read here")
    steps = cfg.steps if cfg.task == "sample" else 0
    row = BenchRow(cfg.model, cfg.task, cfg.latents, cfg.batch, "float32", steps, cfg.tiny)
    made = program("ours", row)
    params, inputs = materialize(made)
    call = made.trace().lower().compile()
    jax.block_until_ready(call(params, inputs))
    walls = []
    with tempfile.TemporaryDirectory() as kept:
        for _ in range(cfg.calls):
            began = time.perf_counter()
            jax.block_until_ready(call(params, inputs))
            walls.append(time.perf_counter() - began)
        with jax.profiler.trace(kept):
            for _ in range(cfg.calls):
                jax.block_until_ready(call(params, inputs))
        took, counts = collections.Counter[str](), collections.Counter[str]()
        flops, alone = convolutions(call.as_text()), set()
        for name, seconds in operations(Path(kept)):
            known = "convolutions" if name in flops else "products" if _PRODUCTS.search(name) else "the rest"
            alone |= {name} & flops.keys()  # a few are parts of fusions, and count as products
            took[known] += seconds / cfg.calls
            counts[known] += 1
    total = sum(took.values())
    print(f"{row.name}: {statistics.median(walls) * 1e3:.1f} ms a call ({min(walls) * 1e3:.1f} at best)")
    work = {"convolutions": sum(flops[name] for name in alone)}
    work["products"] = max(0.0, made.flops() - work["convolutions"]) if cfg.task != "sample" else 0.0
    body = [
        [kind, str(round(counts[kind] / cfg.calls)), f"{1e3 * seconds:.2f}", f"{100 * seconds / total:.0f} %"]
        + ([f"{work[kind] / 1e9:.2f}", f"{work[kind] / seconds / 1e9:.0f}"] if work.get(kind) else ["", ""])
        for kind, seconds in took.most_common()
    ]
    print("\n".join(table(["operations", "of them", "ms", "share", "GFLOP", "GFLOP/s"], body)))
    return 0


if __name__ == "__main__":
    command.run(main)
