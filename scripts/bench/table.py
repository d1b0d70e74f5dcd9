"""The results of the rounds: medians, spread, disturbed rounds, and the tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmix.tuning.flops import data_sheet_rate

_STEADY = 0.9  # a round with less than this share of the best round's cores was disturbed


def peak_tflops(device: str, dtype: str) -> float | None:
    """Return the dense matrix peak of a device in TFLOP/s for bfloat16, None for another dtype or an unknown device.

    In float32 the engines use different precisions (TF32 or not), so there is no single peak.
    """
    rate = data_sheet_rate(device, dtype) if dtype == "bfloat16" else None
    return None if rate is None else rate / 1e12


def summary(rounds: Sequence[Mapping[str, float]], cores: bool = True) -> dict[str, Any]:
    """Return median, minimum and maximum of the rounds' wall seconds, and how many were disturbed.

    A round is disturbed if the process got clearly fewer cores (CPU seconds per wall second) than in its best round,
    because something else had them. Those rounds are left out as long as half of the rounds remain. ``cores`` False:
    the CPU does not do the work, and no round is marked.
    """
    used = [r["cpu_s"] / r["wall_s"] if r["wall_s"] > 0 else 0.0 for r in rounds]
    disturbed = [cores and u < _STEADY * max(used) for u in used]
    kept = [r["wall_s"] for r, bad in zip(rounds, disturbed, strict=True) if not bad]
    if 2 * len(kept) < len(rounds):
        kept = [r["wall_s"] for r in rounds]
    return {
        "median_s": statistics.median(kept),
        "min_s": min(kept),
        "max_s": max(kept),
        "timed": len(kept),
        "disturbed": sum(disturbed),
    }


def ratio(cells: Mapping[str, Mapping[str, Any]], peer: str, ours: str = "ours") -> float | None:
    """Return how many times faster ours is than a peer (peer's median / our median), None without both."""
    pair = [cells.get(name, {}).get("median_s") for name in (peer, ours)]
    return pair[0] / pair[1] if all(pair) else None


def seconds(x: float | None) -> str:
    """Return seconds to three digits, in ms below a tenth."""
    if x is None:
        return ""
    return f"{1000 * x:.3g} ms" if x < 0.1 else f"{x:.3g} s" if x < 1000 else f"{x:.0f} s"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    return [_line(head), "|" + "---|" * len(head), *map(_line, body)]


def _row_names(row: Mapping[str, Any]) -> list[str]:
    task = f"sample, {row['steps']} steps" if row["steps"] else row["task"]
    tiny = " (tiny)" if row["tiny"] else ""
    return [f"{row['model']}{tiny}", task, f"{row['latents']}x{row['latents']}", str(row["batch"])]


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of a result (see `scripts.bench`) as Markdown; an empty cell has its reason below."""
    engines, rows = result["engines"], result["rows"]
    peers = [name for name in engines if name != "ours"]
    lead = ["model", "task", "latents", "images"]

    def timing(cell: Mapping[str, Any]) -> str:
        if "median_s" not in cell:
            return ""
        mark = f", {cell['disturbed']} disturbed" if cell["disturbed"] else ""
        return f"{seconds(cell['median_s'])} ({seconds(cell['min_s'])}-{seconds(cell['max_s'])}{mark})"

    def ratios(cells: Mapping[str, Any]) -> list[str]:
        found = [ratio(cells, peer) for peer in peers] if "ours" in engines else []
        return ["" if x is None else f"{x:.2f}" for x in found]

    heads = [f"{peer} / ours" for peer in peers] if "ours" in engines else []
    machine = result["machine"]
    where = f"{machine['device']}; {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
    out = [
        f"{result['date']}, {where}; {result['dtype']}; {versions}",
        "",
        "Median seconds per call (minimum-maximum), and how many times faster ours is:",
        "",
        *table([*lead, *engines, *heads], [
            [*_row_names(row), *(timing(row["engines"].get(e, {})) for e in engines), *ratios(row["engines"])]
            for row in rows
        ]),
        "",
        "First call in a new process with an empty compile cache -> with a full one; peak memory:",
        "",
        *table([*lead, *engines], [
            [*_row_names(row), *(_start(row["engines"].get(e, {})) for e in engines)] for row in rows
        ]),
    ]  # fmt: skip
    if any("tflop" in row for row in rows):
        peak = result.get("peak_tflops")
        share = f" (share of {peak:.0f})" if peak else ""
        out += ["", f"TFLOP of one call of ours, and TFLOP/s{share}:", ""]
        out += table([*lead, "TFLOP", *engines], [
            [*_row_names(row), f"{row['tflop']:.3g}", *(_rate(row, e, peak) for e in engines)]
            for row in rows if "tflop" in row
        ])  # fmt: skip
    out += _work([row for row in rows if "flops" in row["engines"].get("ours", {})], lead)
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for engine, cell in row["engines"].items():
            if "reason" in cell:
                reasons.setdefault((engine, cell["reason"]), []).append(" ".join(_row_names(row)))
    if reasons:
        out += ["", "Not timed:", ""]
        for (engine, reason), names in reasons.items():
            which = "all rows" if len(names) == len(rows) else "; ".join(names)
            out.append(f"- {engine}, {which}: {reason}")
    notes = [f"- {' '.join(_row_names(row))}: {row['note']}" for row in rows if row.get("note")]
    return "\n".join([*out, *(["", *notes] if notes else [])]) + "\n"


def _work(rows: Sequence[Mapping[str, Any]], lead: Sequence[str]) -> list[str]:
    """Return the lines about our methods' products against those of plain sampling, where both were counted."""
    counted = {e: None for row in rows for e, cell in row["engines"].items() if e != "ours" and "flops" in cell}
    if not counted:
        return []

    def cell(cells: Mapping[str, Mapping[str, Any]], engine: str) -> str:
        one, plain = cells.get(engine, {}), cells["ours"]
        if not all("flops" in c and c.get("median_s") for c in (one, plain)):
            return ""
        more = one["flops"] / plain["flops"]
        return f"{more:.3f}; {one['median_s'] / plain['median_s'] / more:.2f}"

    body = [[*_row_names(row), *(cell(row["engines"], e) for e in counted)] for row in rows]
    return ["", "FLOPs against ours; seconds against ours, over that:", "", *table([*lead, *counted], body)]


def _start(cell: Mapping[str, Any]) -> str:
    if "median_s" not in cell:
        return ""
    first, second = seconds(cell.get("first_call_s")), seconds(cell.get("second_process_s"))
    return f"{first} -> {second}; {cell['peak_bytes'] / 2**30:.2f} GiB"


def _rate(row: Mapping[str, Any], engine: str, peak: float | None) -> str:
    median = row["engines"].get(engine, {}).get("median_s")
    if not median:
        return ""
    rate = row["tflop"] / median
    return f"{rate:.3g}" + (f" ({rate / peak:.0%})" if peak else "")
