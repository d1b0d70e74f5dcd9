"""What every sampler and training step needs of a TPU (or a CUDA GPU), compiled without one: the table.

    python -m scripts.tpu_check                     # SD 1.5 at 512 px and SDXL at 1024 px, bfloat16: hours
    python -m scripts.tpu_check --models sd15 --chips v5e --only plain,lora
    python -m scripts.tpu_check --chips h100 --only plain     # a GPU: pip install --no-deps jax-cuda12-plugin==VERSION
                                                              #   jax-cuda12-pjrt==VERSION, those of jax
    python -m scripts.tpu_check --table_only true   # only writes the table of what there is

Every program is compiled from shapes alone for four chips, over which the rows are split, in a process of its own, one
at a time. Each result is kept in --out as it comes: the same command goes on where it stopped. The status is 1 if
something does not fit or does not compile, or if a sampler holds a collective: each is said in a line.
Compiling for a TPU needs no TPU, only libtpu: pip install "jax[tpu]".
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

from jaxmix import command
from jaxmix.types import InputError
from scripts.bench.rows import names
from scripts.tpu_check import compiling, largest, table
from scripts.tpu_check.cases import CHIPS, Case, plan


@dataclasses.dataclass
class Config:
    """What to compile.

    Attributes:
        models: comma list of sd15, sdxl.
        chips: comma list of v5e, v5p, v6e, h100.
        only: comma list of samplers and trainers (plain, vmix, lora, ...); all if empty.
        topology: compile for this one instead of the chip's own, such as v5e:2x4; needs a single chip.
        effort: XLA's effort from -1 (fast compiling) to 1, for a TPU.
        tiny: shrink every model, to see that the script works.
        confirm: compile the estimated largest batch, too; without it two sizes each, and a later run can confirm them.
        timeout: seconds for one program.
        out: JSON file of the results, written after each program and read when the command goes on.
        markdown: file of the table; the name of the JSON file with .md if empty.
        table_only: compile nothing.
    """

    models: str = "sd15,sdxl"
    chips: str = "v5e,v5p,v6e"
    only: str = ""
    topology: str = ""
    effort: float = -1.0
    tiny: bool = False
    confirm: bool = True
    timeout: float = 3600.0
    out: str = "runs/tpu_check.json"
    markdown: str = ""
    table_only: bool = False


def open_results(config: Config) -> dict[str, Any]:
    """Return the results so far; raises `InputError` if they were made otherwise, or cannot be read."""
    told = {"jax": importlib.metadata.version("jax"), "effort": config.effort, "tiny": config.tiny}
    told["topology"] = config.topology
    path = Path(config.out)
    if path.suffix != ".json":
        raise InputError(f"--out: found {config.out!r}, expected a .json file")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        runs = held["runs"]
        if not all(isinstance(run, dict) for found in runs.values() for run in found.values()):
            raise ValueError
    except FileNotFoundError:
        if config.table_only:
            raise InputError(f"--out {path}: no such file, expected results to make the table of") from None
        return {"told": told, "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), "runs": {}}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"--out {path}: found something else than results of this command") from None
    if not config.table_only and held.get("told") != told:
        raise InputError(
            f"--out {path}: found results of {held.get('told')}, expected those of {told}, or another file"
        )
    return held


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def check(case: Case, results: dict[str, Any], config: Config) -> None:
    """Compile what is missing of a case: two sizes, and the largest that they let expect."""
    runs = results["runs"].setdefault(case.key, {})
    for name in [name for name, run in runs.items() if "reason" in run]:
        del runs[name]  # what failed is tried again
    while (size := largest.wanted(case, runs, config.confirm)) is not None:
        name = largest.name_of(*size)
        run = compiling.in_process(case, *size, results["told"], config.timeout)
        runs[name] = run
        write(Path(config.out), json.dumps(results, indent=1) + "\n")
        write(markdown_of(config), table.markdown(results))
        said = run.get("reason") or (f"{run['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in run else "too large")
        print(f"{case.key}: {name}: {said}", file=sys.stderr, flush=True)


def markdown_of(config: Config) -> Path:
    """Return the file of the table."""
    return Path(config.markdown) if config.markdown else Path(config.out).with_suffix(".md")


def main(config: Config) -> int:
    """Compile, write the table, print it and what is wrong."""
    models = names("models", config.models, ("sd15", "sdxl"))
    chips = names("chips", config.chips, tuple(CHIPS))
    only = [part.strip() for part in config.only.split(",") if part.strip()]
    cases = plan(models, chips, only)
    if config.topology and len(chips) > 1:
        raise InputError(
            f"--topology: found {config.topology!r} for {', '.join(chips)}, expected --chips with one chip"
        )
    if not config.timeout > 0:
        raise InputError(f"--timeout: found {config.timeout:g}, expected seconds")
    results = open_results(config)
    if not config.table_only:
        for chip in chips:  # a name that does not exist is said before anything is compiled
            compiling.look_up(chip, config.topology, config.effort)
        for case in cases:
            check(case, results, config)
    write(markdown_of(config), text := table.markdown(results))
    print(text)
    wrong = [line for case in cases for line in largest.complaints(case, results["runs"].get(case.key, {}))]
    print("\n".join(wrong), file=sys.stderr, flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    command.run(main)
