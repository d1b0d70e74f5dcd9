"""What each change of the layers and kernels gains: our programs with one of them undone, against the current ones.

    python -m scripts.bench.changes --models sd15 --latents 16,32,64
    python -m scripts.bench.changes --models mini --tasks unet,decode --latents 16 --batch 8 --rounds 9
    python -m scripts.bench.memory --models sdxl --tasks sample --batch 1 --engines ours --without products   # of a TPU

All variants of a row are compiled in one process and called in turn with the same weights, A B C A B C, so that other
work on the machine affects all of them alike. For CPUs only: elsewhere the changes are not in the program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxmix import command, kernels
from jaxmix.models import layers
from scripts.bench import rows as bench_rows
from scripts.bench.ours import materialize
from scripts.bench.programs import program
from scripts.bench.rows import BenchRow
from scripts.bench.table import seconds, summary, table
from scripts.bench.workers import machine

CHANGES: dict[str, tuple[Any, str, Any]] = {  # name: (module, attribute, what it was before the change)
    "small-convolutions": (layers, "_SMALL_IMAGE", 0),
    "tiny-convolutions": (layers, "_TINY_IMAGE", 0),
    "means": (layers, "mean_over_pixels", layers._mean_by_sum),
    "products": (layers, "product", layers._flat_product),
    "attention": (kernels, "_CPU_SCORES", sys.maxsize),
}
_SAYS = {
    "": "as it is",
    "small-convolutions": "without the column that keeps convolutions up to 64x64 from YNNPACK",
    "tiny-convolutions": "without products for convolutions up to 4x4",
    "means": "without products for the means of norms",
    "products": "without the axes of products on a TPU",
    "attention": "without blocks of query rows",
    "all": "without all of these",
}
_ON_CPU = ("small-convolutions", "tiny-convolutions", "means", "attention")
_LEAST_SECONDS = 0.3  # a shorter call is repeated for that long in each round


@dataclasses.dataclass
class Config:
    """What to time.

    Attributes:
        models: comma list of mini, sd15, sdxl.
        tasks: comma list of unet, sample, decode.
        latents: comma list of sides in latents.
        batch: comma list of numbers of images.
        changes: comma list of what to undo, each alone, and "all" together; see CHANGES.
        dtype: float32 or bfloat16.
        steps: sampling steps.
        rounds: timed calls of each variant.
        tiny: shrink every model, to see that the script works.
        out: JSON file; none if empty.
    """

    models: str = "sd15"
    tasks: str = "unet"
    latents: str = "32"
    batch: str = "1"
    changes: str = ",".join((*_ON_CPU, "all"))
    dtype: str = "float32"
    steps: int = 2
    rounds: int = 5
    tiny: bool = False
    out: str = ""


@contextlib.contextmanager
def without(name: str) -> Iterator[None]:
    """Undo a change in what is traced inside ("" for none, "all" for all that matter on a CPU)."""
    undone = [CHANGES[n] for n in (_ON_CPU if name == "all" else (name,) if name else ())]
    kept = [getattr(module, attribute) for module, attribute, _ in undone]
    try:
        for module, attribute, before in undone:
            setattr(module, attribute, before)
        jax.clear_caches()  # helpers traced once per shape would bring the other variant back
        yield
    finally:
        for (module, attribute, _), now in zip(undone, kept, strict=True):
            setattr(module, attribute, now)
        jax.clear_caches()


def one_row(row: BenchRow, variants: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Compile and time the variants of a row; return a cell for each that is a different program."""
    made = program("ours", row)
    params, inputs = materialize(made)
    calls: dict[str, Callable[[Any, Any], Any]] = {}
    cells: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for name in variants:
        start = time.perf_counter()
        with without(name):
            lowered = made.trace().lower()
        texts[name] = lowered.as_text()
        if name and texts[name] == texts[""]:
            print(f"bench: {row.name}: {_SAYS[name]}: the same program, not timed", file=sys.stderr, flush=True)
            continue
        calls[name] = lowered.compile()
        cells[name] = {"compile_s": time.perf_counter() - start, "rounds": []}
    repeat = {}
    for name, call in calls.items():  # a warm-up, which also determines how often to call
        start = time.perf_counter()
        jax.block_until_ready(call(params, inputs))
        repeat[name] = max(1, round(_LEAST_SECONDS / (time.perf_counter() - start)))
    for i in range(rounds):
        for name, call in calls.items():
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeat[name]):
                jax.block_until_ready(call(params, inputs))
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
            cells[name]["rounds"].append({"wall_s": wall / repeat[name], "cpu_s": cpu / repeat[name]})
        print(f"bench: {row.name}: round {i + 1} of {rounds}", file=sys.stderr, flush=True)
    return {name: {**cell, **summary(cell["rounds"])} for name, cell in cells.items()}


def markdown(result: dict[str, Any]) -> str:
    """Return the table: median seconds of each variant, and the factor that the undone change gains."""
    about = result["machine"]
    body = []
    for row in result["rows"]:
        now = row["variants"][""]
        for name, cell in row["variants"].items():
            spread = f"{seconds(cell['median_s'])} ({seconds(cell['min_s'])}-{seconds(cell['max_s'])})"
            gain = f"{cell['median_s'] / now['median_s']:.2f}" if name else ""
            lead = [row["model"], row["task"], f"{row['latents']}x{row['latents']}", str(row["batch"])]
            body.append([*lead, _SAYS[name], spread, gain, seconds(cell["compile_s"])])
    head = ["model", "task", "latents", "images", "variant", "seconds", "gain", "trace + compile"]
    where = f"{about['cpu']}, {about['cores']} cores; {result['dtype']}; jax {result['jax']}"
    return "\n".join([f"{result['date']}, {where}", "", *table(head, body)]) + "\n"


def main(config: Config) -> int:
    """Time what the config names, print the table."""
    models = bench_rows.names("models", config.models, bench_rows.MODELS)
    tasks = bench_rows.names("tasks", config.tasks, bench_rows.TASKS)
    changes = bench_rows.names("changes", config.changes, (*CHANGES, "all"))
    (dtype,) = bench_rows.names("dtype", config.dtype, bench_rows.DTYPES)[:1]
    sides, batch = bench_rows.numbers("latents", config.latents), bench_rows.numbers("batch", config.batch)
    bench_rows.check(config.steps, config.rounds, config.out)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "dtype": dtype,
        "jax": jax.__version__,
        "rows": [],
    }
    for model in models:
        for side in sides:
            for n in batch:
                for task in tasks:
                    row = BenchRow(model, task, side, n, dtype, config.steps if task == "sample" else 0, config.tiny)
                    variants = one_row(row, ("", *changes), config.rounds)
                    result["rows"].append({**dataclasses.asdict(row), "variants": variants})
                    if config.out:
                        Path(config.out).write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))
    return 0


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    command.run(main)
