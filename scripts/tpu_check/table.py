"""The results as Markdown."""

from __future__ import annotations

from typing import Any

from jaxmix.tuning.flops import data_sheet_rate
from scripts.bench.table import table
from scripts.tpu_check.cases import CHIPS, GIB, Case, plan
from scripts.tpu_check.largest import MOST, complaints, known, of_size

NAMES = {"sd15": "SD 1.5", "sdxl": "SDXL"}
HEAD = (
    "model",
    "program",
    "images",
    "arguments",
    "temporaries",
    "peak GiB",
    "largest batch (peak)",
    "TFLOP",
    "GB read and written",
    "roofline ms",
    "at the largest",
    "collectives",
)


def roofline(run: dict[str, Any], case: Case) -> tuple[float, str]:
    """Return the seconds that a step takes at least on one device, and what bounds it: products or memory.

    Products are the model's own, in a training step the compiler's if those are more (it recomputes); bytes are the
    compiler's.
    """
    flops = max(run["flops"], run["xla_flops"] or 0) if case.kind == "train" else run["flops"]
    rate = data_sheet_rate(run["device_kind"], "bfloat16")
    bounds = {"memory": (run["xla_bytes"] or 0) / CHIPS[case.chip].bandwidth}
    if rate is not None:
        bounds["products"] = flops / rate
    name = max(bounds, key=lambda name: bounds[name])
    return bounds[name], name


def line(case: Case, runs: dict[str, dict[str, Any]]) -> list[str] | None:
    """Return the cells of a case, None if nothing of it has been compiled."""
    fsdp, guess, best, run = known(case, runs)
    mine = of_size(runs, fsdp)
    first = mine.get(case.batches[0])
    if first is None or "peak_bytes" not in first:
        return None
    program = case.title + (f", weights over {fsdp}" if fsdp > 1 else "")
    lead = [NAMES[case.model], program if case.kind == "decode" else f"{case.kind}: {program}", f"{case.batches[0]}"]
    bytes_ = [f"{first[f'{name}_bytes'] / GIB:.2f}" for name in ("argument", "temp", "peak")]
    confirmed = best is not None and (best not in case.batches or len(mine) > 2 or guess <= best)
    if run is None or best is None:
        most = "none"
    elif case.batches[1] not in mine:
        most, confirmed = "not estimated", False
    elif not confirmed:
        most = f"about {guess}, not compiled"
    else:
        most = f"{best} ({run['peak_bytes'] / GIB:.2f})" + (" or more" if best == MOST else "")
    seconds, bound = roofline(first, case)
    spoken = ", ".join(f"{n} {kind}" for kind, n in sorted(first["collectives"].items())) or "none"
    moved = "" if first["xla_bytes"] is None else f"{first['xla_bytes'] / 1e9:.1f}"
    at_most = roofline(run, case)[0] if run is not None and confirmed else 0.0
    cost = [f"{first['flops'] / 1e12:.2f}", moved, f"{1e3 * seconds:.1f} ({bound})" if seconds else ""]
    cost.append(f"{1e3 * at_most:.0f}" if at_most else "")
    return [*lead, *bytes_, most, *cost, spoken]


def markdown(results: dict[str, Any]) -> str:
    """Return a table for each chip, and below them what is wrong and what has not been compiled."""
    told, runs = results["told"], results["runs"]
    effort = f"effort {told['effort']:g}" + (", shrunk models" if told["tiny"] else "")
    out = [f"{results['date']}, jax {told['jax']}, {effort}, bfloat16; all figures are for one of four chips."]
    wrong, missing = [], []
    for chip, about in CHIPS.items():
        lines = []
        for model in NAMES:
            absent = []
            for case in plan([model], [chip], ()):
                held = runs.get(case.key, {})
                cells, bad = line(case, held), complaints(case, held)
                wrong += bad
                if cells is not None:
                    lines.append(cells)
                elif not bad:
                    absent.append(case.key.split(" ", 2)[2])
            if absent:
                missing.append(f"{chip}, {NAMES[model]}: {', '.join(absent)}")
        if lines:
            name = told["topology"] or about.topology
            out += ["", f"**{chip}** ({name}, {about.memory / GIB:.2f} GiB a chip)", "", *table(list(HEAD), lines)]
    if wrong:
        out += ["", "What does not fit or compile:", "", *(f"- {text}" for text in wrong)]
    if missing:
        out += ["", "Not compiled yet:", "", *(f"- {text}" for text in missing)]
    return "\n".join(out) + "\n"
