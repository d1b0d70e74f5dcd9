"""Peak memory and compile time of ours and of diffusers' Flax programs, without weights and without the device.

    python -m scripts.bench.memory --models sd15,sdxl --batch 1,4,8 --out memory.json  # bfloat16, for a TPU v5p
    python -m scripts.bench.memory --target cpu --models sd15 --batch 1 --dtype float32      # seconds of each stage

Peak bytes are the compiler's own: arguments (weights and inputs) + outputs + temporaries of one program on one device.
Compiling for a TPU needs no TPU, only libtpu: pip install "jax[tpu]". Each program is compiled in its own process.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

from jaxmix import command
from scripts.bench import apart
from scripts.bench import rows as bench_rows
from scripts.bench.changes import CHANGES, without
from scripts.bench.rows import BenchRow
from scripts.bench.table import seconds, table

PAIR = ("ours", "flax")  # whose ratios the table has
ENGINES = (*PAIR, *bench_rows.ADAPTERS, *bench_rows.METHODS)
TASKS = ("sample", "decode", "unet")
_SIDES = {"mini": 16, "sd15": 64, "sdxl": 128}
_PARTS = ("argument", "temp", "output")


@dataclasses.dataclass
class Config:
    """What to compile, and for what.

    Attributes:
        target: "cpu", or a TPU topology such as v5p:2x2x1, v5e:2x2, v6e:2x2, of which one chip is used.
        models: comma list of mini, sd15, sdxl.
        tasks: comma list of sample (the whole guided sampler), decode, unet.
        engines: comma list of ours, flax, and for the sampler ours with a method, as `scripts.bench` names them.
        latents: comma list of sides in latents; the model's own size if empty.
        batch: comma list of numbers of images.
        dtype: float32 or bfloat16.
        steps: sampling steps; memory does not depend on them.
        tiny: shrink every model, to see that the script works.
        without: a change of ours to undo (see `scripts.bench.changes`); none if empty.
        effort: XLA's effort from -1 (fast compiling) to 1; -1 compiles SD 1.5 for a TPU in a tenth of the time.
        rounds: compilations of each program; the seconds are those of the fastest.
        timeout: seconds for one program.
        out: JSON file, rewritten after each program; none if empty.
    """

    target: str = "v5p:2x2x1"
    models: str = "sd15,sdxl"
    tasks: str = "sample,decode"
    engines: str = "ours,flax"
    latents: str = ""
    batch: str = "1,4,8"
    dtype: str = "bfloat16"
    steps: int = 25
    tiny: bool = False
    without: str = ""
    effort: float = -1.0
    rounds: int = 1
    timeout: float = 3600.0
    out: str = ""


def compile_one(engine: str, row: BenchRow, target: str, undone: str) -> dict[str, Any]:
    """Compile one program in this process; return seconds of each stage and bytes of each kind."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from scripts.bench.programs import program

    sharding, platforms = None, None
    if target != "cpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
        mesh = Mesh(np.array(topology.devices[:1]), ("data",))
        sharding, platforms = NamedSharding(mesh, PartitionSpec()), ("tpu",)
    made = program(engine, row)
    clock = [time.perf_counter()]
    with without(undone):
        traced = made.trace(sharding)
    clock.append(time.perf_counter())
    lowered = traced.lower(lowering_platforms=platforms) if platforms else traced.lower()
    clock.append(time.perf_counter())
    compiled = lowered.compile()
    clock.append(time.perf_counter())
    memory = compiled.memory_analysis()
    found: dict[str, Any] = {f"{kind}_bytes": getattr(memory, f"{kind}_size_in_bytes") for kind in _PARTS}
    # An output written into the memory of an argument is counted once.
    found["peak_bytes"] = sum(found.values()) - memory.alias_size_in_bytes
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made.params))
    stages = {f"{name}_s": b - a for name, a, b in zip(("trace", "lower", "compile"), clock, clock[1:], strict=False)}
    return {**found, "weight_bytes": weights, **stages, "hlo_lines": lowered.as_text().count("\n")}


def in_process(engine: str, row: BenchRow, config: Config) -> dict[str, Any]:
    """Run `compile_one` in a new process; if it fails, return the "reason"."""
    order = {"engine": engine, "row": dataclasses.asdict(row), "target": config.target, "without": config.without}
    effort = None if config.target == "cpu" else config.effort
    return apart.answer("scripts.bench.memory", order, effort, config.timeout)


def fastest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the run that took the least time from trace to executable, or the first that failed."""
    failed = [run for run in runs if "reason" in run]
    return failed[0] if failed else min(runs, key=lambda run: run["trace_s"] + run["lower_s"] + run["compile_s"])


def markdown(result: dict[str, Any]) -> str:
    """Return the table: peak and temporaries in GiB, seconds of compiling, and their ratios."""
    engines = result["engines"]
    lead = ["model", "task", "latents", "images"]
    columns = [f"{e}: peak (temporaries) GiB" for e in engines] + [f"{e}: trace + lower + compile" for e in engines]
    both = set(PAIR) <= set(engines)
    head = [*lead, *columns, *(["peak, ours / flax", "seconds, ours / flax"] if both else [])]
    body, reasons = [], []
    for row in result["rows"]:
        cells = row["engines"]
        total = {e: sum(c[f"{s}_s"] for s in ("trace", "lower", "compile")) for e, c in cells.items() if "trace_s" in c}
        line = [row["model"], row["task"], f"{row['latents']}x{row['latents']}", str(row["batch"])]
        for e in engines:
            c = cells.get(e, {})
            line.append(f"{c['peak_bytes'] / 2**30:.2f} ({c['temp_bytes'] / 2**30:.2f})" if e in total else "")
            if "reason" in c:
                reasons.append(f"- {e}, {' '.join(line[:4])}: {c['reason']}")
        for e in engines:
            c = cells.get(e, {})
            line.append(" + ".join(seconds(c[f"{s}_s"]) for s in ("trace", "lower", "compile")) if e in total else "")
        if both:
            pair = set(PAIR) <= set(total)
            peak = [cells[e].get("peak_bytes", 0) for e in PAIR] if pair else []
            line += [f"{peak[0] / peak[1]:.2f}", f"{total['ours'] / total['flax']:.2f}"] if pair else ["", ""]
        body.append(line)
    undone = f"; ours without {result['without']}" if result["without"] else ""
    effort = "" if result["target"] == "cpu" else f", effort {result['effort']:g}"
    first = f"{result['date']}, compiled for {result['target']}{effort}, {result['dtype']}, jax {result['jax']}{undone}"
    return "\n".join([first, "", *table(head, body), *(["", "Not compiled:", "", *reasons] if reasons else [])]) + "\n"


def main(config: Config) -> int:
    """Compile what the config names, print the table."""
    import jax

    engines = bench_rows.names("engines", config.engines, ENGINES)
    models = bench_rows.names("models", config.models, bench_rows.MODELS)
    tasks = bench_rows.names("tasks", config.tasks, TASKS)
    (dtype,) = bench_rows.names("dtype", config.dtype, bench_rows.DTYPES)[:1]
    sides = bench_rows.numbers("latents", config.latents)
    if config.without:
        bench_rows.names("without", config.without, tuple(CHANGES))
    bench_rows.check(config.steps, config.rounds, config.out)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "target": config.target,
        "effort": config.effort,
        "dtype": dtype,
        "without": config.without,
        "jax": jax.__version__,
        "engines": list(engines),
        "rows": [],
    }
    for model in models:
        for side in sides or ((8,) if config.tiny else (_SIDES[model],)):
            for n in bench_rows.numbers("batch", config.batch):
                for task in tasks:
                    steps = config.steps if task == "sample" else 0
                    row = BenchRow(model, task, side, n, dtype, steps, config.tiny)
                    cells: dict[str, Any] = {e: [] for e in engines}
                    for _ in range(config.rounds):  # in turn, so that other work on the machine affects both alike
                        for engine in engines:
                            cells[engine].append(in_process(engine, row, config))
                            print(f"memory: {row.name}: {engine} done", file=sys.stderr, flush=True)
                    cells = {engine: fastest(runs) for engine, runs in cells.items()}
                    result["rows"].append({**dataclasses.asdict(row), "engines": cells})
                    if config.out:
                        Path(config.out).write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))
    return 0


def one(order: str) -> None:
    """Be the process of one program."""
    told = json.loads(order)
    print(json.dumps(compile_one(told["engine"], BenchRow(**told["row"]), told["target"], told["without"])))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2])
    else:
        command.run(main)
