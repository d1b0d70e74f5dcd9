"""The findings about an adapter, as tables to read, a table for the README, and numbers for a JSON file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from scripts.effects.measures import Measures
from scripts.effects.stats import Effect, Matrix, Verdict, matrix_verdicts, paired, pooled, ratio
from train.scenes import DIMENSIONS

LIMIT = 0.01  # p-value below which an effect counts
FALL = 0.02  # of the object and style accuracy, at most
KEPT = 0.7  # share of the effect that must remain on a fine-tuned model
SCORES = ("object", "style")


@dataclasses.dataclass
class Findings:
    """Measurements of every condition and the references they are judged by.

    `measures` holds conditions of the same prompts and noise, "base" among them; `matrix` the effects of one label
    alone against no label; `scenes` those of real scenes ("" for as they are, "autoencoder" for after a round trip);
    both in sd of real scenes without labels; `judged` what each label of the scenes costs the judge of objects and
    styles after the autoencoder; `styles` the share judged right of each style; `attention` the distances of attn2
    maps; `finetuned` the measures of a fine-tuned model without ("base") and with ("all 1") the adapter.
    """

    measures: dict[str, Measures]
    matrix: Matrix
    scenes: dict[str, Matrix]
    judged: Matrix
    styles: dict[str, dict[str, float]]
    attention: dict[str, dict[str, float]]
    finetuned: dict[str, Measures]

    def effect(self, name: str, measure: str, than: str = "base") -> Effect:
        """Return the paired difference of a condition from the base (or another condition), in sd of the base."""
        base = self.measures["base"][measure]
        unit = paired(base, base).sd
        return paired(self.measures[name][measure], self.measures[than][measure], unit)

    def kept(self) -> list[tuple[Effect, Effect]]:
        """Return for each dimension the effect on the fine-tuned model and that on the base model."""
        after, before = self.finetuned["all 1"], self.finetuned["base"]
        return [(paired(after[d], before[d]), self.effect("all 1", d)) for d in DIMENSIONS]

    def share_kept(self) -> tuple[float, float]:
        """Return the share of the effect that remains on the fine-tuned model, and half of its interval.

        The ratio of the sums over the dimensions, in sd of the base's pictures: a dimension that hardly moves weighs
        little.
        """
        there, here = zip(*self.kept(), strict=True)
        units = [e.sd for e in here]
        return ratio(pooled(there, units), pooled(here, units))

    @property
    def nothing(self) -> bool:
        """Whether the adapter changes no measure of any picture, as before its training."""
        names = [name for name in self.measures if name.startswith("all ") or name.endswith(" alone")]
        return all(self.effect(name, d).zero for name in names for d in DIMENSIONS)


def cell(effect: Effect, p: bool = False) -> str:
    """Return an effect in sd with its interval, such as "+0.81 ±0.07", and its p-value if asked."""
    text = f"{effect.in_sd:+.2f} ±{effect.half_in_sd:.2f}"
    return f"{text} p={effect.p:.0e}" if p else text


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return rows aligned under a head."""
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows])


def verdicts(found: Findings) -> list[Verdict]:
    """Return the requirements of a trained adapter, one by one."""
    result = []
    for d in DIMENSIONS:
        moved = found.effect("all 1", d)
        text = f"all labels at scale 1 move {d} {cell(moved)} sd (p={moved.p:.0e}, asked < {LIMIT})"
        result.append(Verdict(text, moved.mean > 0 and moved.p < LIMIT))
        alone = found.effect(f"{d} alone", d)
        text = f"{d} alone at scale 1 moves {d} {cell(alone)} sd (p={alone.p:.0e}, asked < {LIMIT})"
        result.append(Verdict(text, alone.mean > 0 and alone.p < LIMIT))
        more = found.effect("all 1", d, than="words")
        text = f"{d} moves by {cell(more)} sd more than by the same words in the prompt (p={more.p:.0e})"
        result.append(Verdict(f"{text}, asked: the interval above zero", more.mean - more.half > 0))
    result += matrix_verdicts(found.matrix, found.scenes[""])
    # No model that draws through this autoencoder can do more than the scenes do after it.
    after = "the scenes' own after the autoencoder"
    result += matrix_verdicts(found.matrix, found.scenes["autoencoder"], whose=after)
    for name in SCORES:
        fall = found.effect("all 1", name)
        text = (
            f"{name} accuracy at scale 1 {100 * fall.mean:+.1f} ±{100 * fall.half:.1f} points, asked {-100 * FALL:+g}"
        )
        result.append(Verdict(text, fall.mean >= -FALL))
        own = found.judged["all"][name]
        text = (
            f"{name} accuracy at scale 1 against {after}, {100 * own.mean:+.1f} ±{100 * own.half:.1f} points, "
            f"asked at most {100 * FALL:g} below"
        )
        result.append(Verdict(text, fall.mean >= own.mean - FALL))
    if found.finetuned:
        share, half = found.share_kept()
        text = f"a fine-tuned model keeps {share:.0%} ±{100 * half:.0f} of the effect, all dimensions together"
        result.append(Verdict(f"{text}, asked {KEPT:.0%}", share >= KEPT))
    return result


def accuracy(found: Findings, name: str, score: str) -> str:
    """Return the share judged right in per cent, and the paired difference from the base in points."""
    share = 100 * float(found.measures[name][score].mean())
    if name == "base":
        return f"{share:.1f}"
    change = found.effect(name, score)
    return f"{share:.1f} ({100 * change.mean:+.1f} ±{100 * change.half:.1f})"


def report(found: Findings) -> str:
    """Return all tables as text."""
    base = found.measures["base"]
    lines = [f"{len(base['color'])} prompts; ± is half of a 95 % interval (paired, Student's t)"]
    lines.append("\nThe base's pictures: mean and standard deviation, the unit sd below")
    lines += [f"  {d}: {np.nanmean(base[d]):.4f}, {found.effect('base', d).sd:.4f}" for d in DIMENSIONS]
    lost = {name: int(np.isnan(m["composition"]).sum()) for name, m in found.measures.items()}
    lines.append(
        "pictures on which the segmenter finds no object, left out of composition: "
        + (", ".join(f"{name} {count}" for name, count in lost.items() if count) or "none")
    )
    if found.nothing:
        lines.append("\nTHE ADAPTER CHANGES NOTHING: every effect of its labels is exactly zero, as before training.")
    lines.append(
        "\nPaired difference from the base in sd of the base, its p-value; accuracy in %, difference in points"
    )
    rows = [
        [name, *(cell(found.effect(name, d), p=True) for d in DIMENSIONS), *(accuracy(found, name, s) for s in SCORES)]
        for name in found.measures
        if name != "base"
    ]
    rows.insert(0, ["base", *[""] * len(DIMENSIONS), *(accuracy(found, "base", s) for s in SCORES)])
    lines.append(table(["", *DIMENSIONS, *SCORES], rows))
    lines.append("\nAll labels at scale 1 less the same words in the prompt, sd of the base")
    lines.append(", ".join(f"{d} {cell(found.effect('all 1', d, than='words'), p=True)}" for d in DIMENSIONS))
    for title, matrix in (
        ("One label alone less no label, both at scale 1, sd of real scenes without labels", found.matrix),
        ("Real scenes of the same prompts, with the label less without, the same sd", found.scenes[""]),
        ("Real scenes after the autoencoder, the same sd", found.scenes["autoencoder"]),
    ):
        lines.append(f"\n{title}")
        lines.append(table(["", *DIMENSIONS], [[k, *(cell(row[d]) for d in DIMENSIONS)] for k, row in matrix.items()]))
    lines.append("\nAccuracy on real scenes after the autoencoder, with the label less without, points")
    rows = [[k, *(f"{100 * e.mean:+.1f} ±{100 * e.half:.1f}" for e in row.values())] for k, row in found.judged.items()]
    lines.append(table(["", *SCORES], rows))
    lines.append("\nStyle accuracy by style, %")
    rows = [[name, *(f"{100 * share:.0f}" for share in shares.values())] for name, shares in found.styles.items()]
    lines.append(table(["", *found.styles["base"]], rows))
    for name, sites in found.attention.items():
        lines.append(f"\nattn2 maps, {name}: mean total variation distance from the base {mean_distance(sites):.4f}")
        lines.append("  " + ", ".join(f"{site} {value:.4f}" for site, value in sites.items()))
    if found.finetuned:
        lines.append("\nThe same adapter on a fine-tuned model: effect there / effect on the base model, own units")
        for d, (there, here) in zip(DIMENSIONS, found.kept(), strict=True):
            share, half = ratio(there, here)
            shown = f"{there.mean:+.4f} ±{there.half:.4f} / {here.mean:+.4f} ±{here.half:.4f}"
            lines.append(f"  {d}: {shown} = {share:.0%} ±{100 * half:.0f} ({cell(there)} sd of the model's own)")
    lines += ["", *map(str, verdicts(found))]
    return "\n".join(lines)


def mean_distance(sites: Mapping[str, float]) -> float:
    """Return the mean over sites."""
    return float(np.mean(list(sites.values())))


def markdown(found: Findings) -> str:
    """Return two small tables for the README, effects in sd: the conditions with accuracy in per cent, the matrix."""

    def lines(head: list[str], rows: list[list[str]]) -> str:
        return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])

    rows = []
    for name, measures in found.measures.items():
        if name == "none" or name.startswith("words of ") or name in {f"{d} alone" for d in DIMENSIONS}:
            continue
        moved = ["" if name == "base" else cell(found.effect(name, d)) for d in DIMENSIONS]
        rows.append([name, *moved, *(f"{100 * measures[s].mean():.1f}" for s in SCORES)])
    both = []
    for label, row in found.matrix.items():
        own, after = found.scenes[""][label], found.scenes["autoencoder"][label]
        cells = (f"{e.in_sd:+.2f} ({own[d].in_sd:+.2f}, {after[d].in_sd:+.2f})" for d, e in row.items())
        both.append([f"{label} alone", *cells])
    note = "One label alone less no label (in brackets: real scenes, and real scenes after the autoencoder):"
    return f"{lines(['', *DIMENSIONS, *SCORES], rows)}\n\n{note}\n\n{lines(['', *DIMENSIONS], both)}"


def as_json(found: Findings) -> dict[str, Any]:
    """Return every number."""

    def numbers(matrix: Matrix) -> dict[str, Any]:
        return {name: {d: e.as_dict() for d, e in row.items()} for name, row in matrix.items()}

    names = (*DIMENSIONS, *SCORES)
    result: dict[str, Any] = {
        "means": {name: {k: float(np.nanmean(m[k])) for k in names} for name, m in found.measures.items()},
        "effects": numbers({name: {k: found.effect(name, k) for k in names} for name in found.measures}),
        "more_than_words": {d: found.effect("all 1", d, than="words").as_dict() for d in DIMENSIONS},
        "matrix": numbers(found.matrix),
        "scenes": {name or "as they are": numbers(matrix) for name, matrix in found.scenes.items()},
        "scenes_accuracy": numbers(found.judged),
        "styles": found.styles,
        "attention_distance": found.attention,
        "verdicts": [{"text": v.text, "passed": v.passed} for v in verdicts(found)],
    }
    if found.finetuned:
        pairs = dict(zip(DIMENSIONS, found.kept(), strict=True))
        result["finetuned"] = {
            d: {"there": a.as_dict(), "here": b.as_dict(), "share": ratio(a, b)[0], "half": ratio(a, b)[1]}
            for d, (a, b) in pairs.items()
        }
        result["finetuned_share"] = dict(zip(("share", "half"), found.share_kept(), strict=True))
    return _finite(result)


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by null, since JSON has none."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
