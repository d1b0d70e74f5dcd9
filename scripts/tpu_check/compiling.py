"""One case compiled for a chip that is not here, in a process of its own: bytes, FLOPs, collectives."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxmix.sharding import DATA
from jaxmix.tuning.flops import model_flops
from jaxmix.types import InputError
from scripts.bench import train_memory
from scripts.bench.apart import answer
from scripts.bench.programs import program
from scripts.bench.rows import BenchRow
from scripts.tpu_check.cases import CHIPS, GIB, Case

MODULE = "scripts.tpu_check.compiling"
STEPS = 25
SIDES = {"sd15": 64, "sdxl": 128}  # latents of 512 and 1024 px
CACHED = ("vmix", "ip_adapter", "controlnet", "lora")  # trainers that can do without encoders in their step
_KINDS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast")
_COLLECTIVE = re.compile(r"[\s)](" + "|".join(_KINDS) + r")(?:-start)?\(")
_OVER = re.compile(r"Used ([\d.]+)([KMGT]?) of|required for [\w ]+ \(([\d.]+)([KMGT]?)\) exceeds")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def collectives(text: str) -> dict[str, int]:
    """Count the collectives of a compiled program's text: with tuples as results and begun by ``-start``, too."""
    return dict(Counter(match[1] for match in _COLLECTIVE.finditer(text)))


def devices_of(chip: str, topology: str = "") -> list[Any]:
    """Return the devices of a chip's topology (or of another one); raises `InputError` if there is no such."""
    known = CHIPS[chip]
    name = topology or known.topology
    options: dict[str, Any] = {}
    if known.platform == "cuda":
        told = Path(__file__).with_name(f"{chip}.txtpb").read_text(encoding="utf-8")
        options = {"topology": name, "target_config": told}
    try:
        found = topologies.get_topology_desc(platform=known.platform, topology_name=name, **options)
    except Exception as error:  # whatever the plugin raises, or its absence
        said = str(error).strip().splitlines()
        needs = {"tpu": 'pip install "jax[tpu]"', "cuda": "pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt"}
        raise InputError(
            f"topology {name}: {said[0] if said else type(error).__name__}: expected a name such as "
            f"{known.topology}, and its compiler ({needs[known.platform]})"
        ) from None
    return list(found.devices)


def compile_case(case: Case, batch: int, fsdp: int, tiny: bool, topology: str = "") -> dict[str, Any]:
    """Compile one case with `batch` images, or rows of a step, for each device; return what one device needs.

    "flops" are those of a step on one device, a sampler's by its steps, with loops counted as often as they run;
    "xla_flops" and "xla_bytes" are the compiler's, which count a loop once. A program that the compiler finds too large
    has "used_bytes" instead.
    """
    devices = devices_of(case.chip, topology)
    platforms = (CHIPS[case.chip].platform,)
    make = _step if case.kind == "train" else _sampler
    traced, parts, flops, kind = make(case, batch, fsdp, tiny, devices)
    told = {"devices": len(devices), "device_kind": kind, "parts": parts, "flops": flops}
    began = time.perf_counter()
    try:
        compiled = traced.lower(lowering_platforms=platforms).compile()
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in said:
            raise
        match = _OVER.search(said)
        size, unit = (match[1] or match[3], match[2] or match[4]) if match else ("0", "")
        return {**told, "used_bytes": int(float(size) * _UNITS[unit]), "said": said[:300]}
    memory = compiled.memory_analysis()
    found = {f"{name}_bytes": getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "temp", "output")}
    # An output written into the memory of an argument is counted once.
    found["peak_bytes"] = sum(found.values()) - memory.alias_size_in_bytes
    cost = compiled.cost_analysis() or {}
    return {
        **told,
        **found,
        "xla_flops": cost.get("flops"),
        "xla_bytes": cost.get("bytes accessed"),
        "collectives": collectives(compiled.as_text()),
        "compile_s": round(time.perf_counter() - began, 1),
    }


def _sampler(
    case: Case, batch: int, fsdp: int, tiny: bool, devices: list[Any]
) -> tuple[Any, dict[str, int], float, str]:
    steps = STEPS if case.kind == "sample" else 0
    side = 8 if tiny else SIDES[case.model]
    row = BenchRow(case.model, case.kind, side, batch * len(devices), "bfloat16", steps, tiny)
    made = program(case.name, row, Mesh(np.array(devices), (DATA,)))
    traced = made.trace_over(Mesh(np.array(devices), (DATA,)))
    # Under shard_map shapes, and so FLOPs, are those of one device.
    flops = model_flops(traced.jaxpr) / max(steps, 1)
    shared = {k: x for k, x in made.inputs.items() if k in made.shared}
    inputs = train_memory.size(_placeless(made.inputs)) - train_memory.size(_placeless(shared))
    parts = {"weights": train_memory.size(_placeless(made.params))}
    parts["inputs"] = inputs // len(devices) + train_memory.size(_placeless(shared))
    return traced, parts, flops, devices[0].device_kind


def _placeless(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _step(case: Case, batch: int, fsdp: int, tiny: bool, devices: list[Any]) -> tuple[Any, dict[str, int], float, str]:
    keys: dict[str, Any] = {"trainer": case.name, "model": case.model, "per_device_batch": batch, "fsdp": fsdp}
    keys |= {"mixed_precision": "bf16", "tiny": tiny, "latents": 8 if tiny else SIDES[case.model]}
    keys["cached"] = case.model == "sdxl" and case.name in CACHED
    config = train_memory.Config(**keys)
    step = train_memory.make_step(config, train_memory.trainer_config(config), len(devices))
    placed, traced = train_memory.trace_step(step, devices, fsdp)
    state = placed.state
    parts = {
        "frozen weights": train_memory.size(placed.frozen),
        "weights that learn": train_memory.size(state.params),
        "optimiser": train_memory.size(state.opt_state),
        "average": train_memory.size(state.ema),
        "batch": train_memory.size(placed.batch),
    }
    flops = model_flops(traced.jaxpr) / len(devices)
    return traced, {name: size for name, size in parts.items() if size}, flops, devices[0].device_kind


def in_process(case: Case, batch: int, fsdp: int, told: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Run `compile_case` in a process of its own; "reason" says why there is nothing."""
    order = {"case": [case.kind, case.model, case.name, case.chip], "batch": batch, "fsdp": fsdp}
    order |= {"tiny": told["tiny"], "topology": told["topology"]}
    return answer(MODULE, order, told["effort"], timeout)


def look_up(chip: str, topology: str, effort: float) -> int:
    """Return the number of devices of a chip's topology, found in a process of its own; raises `InputError`."""
    found = answer(MODULE, {"chip": chip, "topology": topology}, effort, 600)
    if "devices" not in found:
        raise InputError(found.get("refused") or found["reason"])
    return found["devices"]


def too_many(case: Case, batch: int, run: dict[str, Any]) -> str:
    """Return in one line by how many bytes a program does not fit its chip, and which of its parts are the largest."""
    there = CHIPS[case.chip].memory
    used = run.get("used_bytes") or run.get("peak_bytes", 0)
    parts = dict(run["parts"])
    if used > sum(parts.values()):
        parts["what the program holds meanwhile"] = used - sum(parts.values())
    largest = sorted(parts.items(), key=lambda part: -part[1])
    said = ", ".join(f"{name} {size / GIB:.2f}" for name, size in largest)
    return (
        f"{case.key}: {batch} a device needs {used / GIB:.2f} GiB, {(used - there) / GIB:.2f} GiB ({used - there:,} "
        f"bytes) more than the {there / GIB:.2f} of a {case.chip}: {said}"
    )


def one(told: dict[str, Any]) -> dict[str, Any]:
    """Be the process of one program, or of one topology."""
    try:
        if "case" not in told:
            return {"devices": len(devices_of(told["chip"], told["topology"]))}
        return compile_case(Case(*told["case"]), told["batch"], told["fsdp"], told["tiny"], told["topology"])
    except InputError as error:
        return {"refused" if "case" not in told else "reason": str(error)}


if __name__ == "__main__":
    print(json.dumps(one(json.loads(sys.argv[2]))))
