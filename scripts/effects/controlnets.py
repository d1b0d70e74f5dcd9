"""Measure the embedded model's ControlNets: how far pictures follow a map, and what of the prompt that costs.

For each net, over its scale: edges (F1 against the map's), the outline of the object (IoU), and the picture in little
(PSNR at 1/8), whether object, style and background are the prompt's; the map of another scene, no prompt, guess mode,
two nets at once. Then layouts of two objects: DenseDiffusion and the net of masks given the same ones. Pictures are
kept under `out`.

    python -m scripts.effects.controlnets --out runs/effects_controlnets
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.preprocessors import preprocess
from scripts.effects import layouts
from scripts.effects.draw import digest
from scripts.effects.image_prompts import Case, Judges, make_cases
from scripts.effects.measures import round_trip
from scripts.effects.pictures import labelled_grid
from scripts.effects.studio import Measured, Studio, check_counts, check_parts, filled, means, table
from scripts.effects.styles import psnr
from scripts.effects.vmix import load_model
from train.controlnet import MASKS, coloured

MAPS = {"edges": "canny:100,200", "tile": "tile:8", "masks": MASKS}
"""What each net was trained to follow."""

SCALES = (0.25, 0.5, 1.0, 1.5)
PARTS = (*MAPS, "together", "layouts")
SQUARE = 8  # pixels, for the picture in little


@dataclasses.dataclass
class Config:
    """What to measure.

    Attributes:
        parts: which of edges, tile, masks, together (two nets, and other scenes' maps) and layouts.
        model: "mini" or a diffusers folder whose images have the judges' size.
        edges: "mini-edges" or the folder of a net that follows Canny's edges.
        tile: "mini-tile" or the folder of a net that follows small pictures.
        masks: "mini-masks" or the folder of a net that follows masks by colour.
        cases: scenes, each drawn once per condition.
        steps: sampling steps; the model's own default if null.
        grid_rows: cases on the pictures.
        batch_size: pictures drawn at a time.
        seed: of the cases and of the first picture.
        out: folder for effects.json, effects.md, the pictures and what is kept between runs.
    """

    parts: str = ",".join(PARTS)
    model: str = "mini"
    edges: str = "mini-edges"
    tile: str = "mini-tile"
    masks: str = "mini-masks"
    cases: int = 200
    steps: int | None = None
    grid_rows: int = 5
    batch_size: int = 25
    seed: int = 20
    out: str = "runs/effects_controlnets"

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        check_counts(self, cases=2, grid_rows=1, batch_size=1)
        check_parts(self.parts, PARTS)


def edges_f1(images: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return how far the edges of uint8 pictures (n, h, w, 3) are those of others, 0 to 1; a pixel off counts as on."""
    found = []
    for one, other in zip(images, wanted, strict=True):
        here, there = (preprocess(x, MAPS["edges"])[..., 0] > 0 for x in (one, other))
        if not here.any() or not there.any():
            found.append(float(here.any() == there.any()))
            continue
        precision, recall = here[_wider(there)].sum() / here.sum(), there[_wider(here)].sum() / there.sum()
        found.append(2 * precision * recall / max(precision + recall, 1e-9))
    return np.asarray(found)


def _wider(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    h, w = mask.shape
    return np.any([padded[i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0)


def little_psnr(images: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the peak signal to noise ratio, in dB, of means over squares of uint8 pictures (n, h, w, 3)."""
    n, h, w, _ = images.shape
    small = [
        x.astype(np.float64).reshape(n, h // SQUARE, SQUARE, w // SQUARE, SQUARE, 3).mean((2, 4))
        for x in (images, wanted)
    ]
    return psnr(*small)


def make_map(kind: str, case: Case) -> np.ndarray:
    """Return the map of a kind of a case, uint8 (h, w, 3)."""
    return coloured(case.mask[None]) if kind == "masks" else preprocess(case.image, MAPS[kind])


Method = Callable[[Sequence[int]], Any]


@dataclasses.dataclass(frozen=True)
class Bench:
    """What every part needs."""

    cfg: Config
    studio: Studio
    judges: Judges
    cases: list[Case]
    nets: Mapping[str, jaxmix.ControlNet]

    def draw(self, name: str, texts: Sequence[str], methods: Sequence[Method] = (), mark: Any = "") -> np.ndarray:
        """Return one picture per text, under methods made for some of them, which `mark` tells from others."""

        def some(index: list[int], seeds: list[int]) -> np.ndarray:
            made = tuple(method(index) for method in methods)
            return self.studio.pipe.generate([texts[i] for i in index], seeds, self.cfg.steps, methods=made)

        key, size = ["controlnets", self.cfg.steps, list(texts), mark], self.cfg.batch_size
        return self.studio.draw(key, len(texts), filled(some, size), size, name)

    def followed(
        self,
        name: str,
        kinds: Sequence[str],
        texts: Sequence[str],
        maps: Mapping[str, Sequence[np.ndarray]],
        scale: float = 1.0,
        guess: bool = False,
        more: Sequence[Method] = (),
        mark: Any = "",
    ) -> np.ndarray:
        """Draw texts under the nets of some kinds, each with a map per text, and further methods that `mark` tells."""

        def method(kind: str) -> Method:
            return lambda index: self.nets[kind].on([maps[kind][i] for i in index], scale, guess=guess)

        told = [scale, guess, mark, *((digest(self.nets[k].params), digest(list(maps[k]))) for k in kinds)]
        return self.draw(name, texts, [*(method(kind) for kind in kinds), *more], told)

    def measure(self, images: np.ndarray, shift: int = 0) -> dict[str, np.ndarray]:
        """Measure pictures against the cases whose maps they were given, `shift` later than those of their prompts."""
        n = len(self.cases)
        given = [self.cases[(i + shift) % n] for i in range(n)]
        scenes = np.stack([c.image for c in given])
        prompt, layout = self.judges.follow(images, self.cases), self.judges.follow(images, given)
        return {
            "edges F1": edges_f1(images, scenes),
            "masks IoU": layout["layout IoU"],
            "PSNR at 1/8": little_psnr(images, scenes),
            **{k: prompt[k] for k in ("object", "style", "background")},
        }

    def shown(self, file: str, columns: Sequence[tuple[str, np.ndarray]]) -> None:
        """Write the pictures of the first cases."""
        rows = self.cfg.grid_rows
        scenes = np.stack([c.image for c in self.cases[:rows]])
        captions = [c.caption for c in self.cases[:rows]]
        path = labelled_grid(Path(self.cfg.out) / file, [("scene", scenes), *columns], captions, 2)
        print(f"wrote {path}, {path.stat().st_size / 1e3:.0f} kB", flush=True)


def one_net(bench: Bench, kind: str) -> dict[str, Any]:
    """Measure a net over its scale, with another scene's map, and without a prompt."""
    cases, n = bench.cases, len(bench.cases)
    captions, empty = [c.caption for c in cases], [""] * n
    maps = {kind: [make_map(kind, c) for c in cases]}
    rolled = {kind: [*maps[kind][1:], maps[kind][0]]}
    plain = bench.draw("prompt alone", captions)
    drawn = {"0": plain}
    for scale in SCALES:
        drawn[f"{scale:g}"] = bench.followed(f"{kind} x {scale:g}", [kind], captions, maps, scale)
    found = {name: bench.measure(images) for name, images in drawn.items()}
    elsewhere = bench.followed(f"{kind}, another scene's", [kind], captions, rolled)
    found["prompt alone, against another scene's map"] = bench.measure(plain, 1)
    found["1, another scene's map"] = bench.measure(elsewhere, 1)
    found["no prompt, 0"] = bench.measure(bench.draw("no prompt", empty))
    silent = {}
    for guess in (False, True):
        name = "no prompt, 1, guess mode" if guess else "no prompt, 1"
        silent[name] = bench.followed(f"{kind}: {name}", [kind], empty, maps, guess=guess)
        found[name] = bench.measure(silent[name])
    scenes = np.stack([c.image for c in cases])
    found["real scenes after the autoencoder"] = bench.measure(
        round_trip(bench.studio.pipe, scenes, min(bench.cfg.batch_size, n))
    )
    bench.shown(f"{kind}.png", [("map", np.stack(maps[kind])[: bench.cfg.grid_rows]), *drawn.items(), *silent.items()])
    return {f"mini-{kind}, over its scale": (found, "0")}


def together(bench: Bench) -> dict[str, Any]:
    """Measure two nets at once: the edges and the masks, the edges and the tile."""
    captions = [c.caption for c in bench.cases]
    maps = {kind: [make_map(kind, c) for c in bench.cases] for kind in bench.nets}
    drawn = {"prompt alone": bench.draw("prompt alone", captions)}
    for kinds in (("edges",), ("tile",), ("edges", "tile"), ("edges", "masks")):
        if all(kind in bench.nets for kind in kinds):
            name = " + ".join(f"mini-{kind}" for kind in kinds)
            drawn[name] = bench.followed(name, kinds, captions, maps)
    bench.shown("together.png", list(drawn.items()))
    return {"Two nets": ({name: bench.measure(images) for name, images in drawn.items()}, "prompt alone")}


def same_layouts(bench: Bench) -> dict[str, Any]:
    """Measure DenseDiffusion and the net of masks on layouts of two objects, as masks and as boxes."""
    cases = layouts.cases(bench.cfg.cases, bench.cfg.seed, 2)
    captions = [c.caption for c in cases]
    exact, boxes = [], []
    for i, case in enumerate(cases):
        # Colours go by the order in which the caption names the objects, as they do in training.
        ordered = list(zip(case.objects, case.masks, strict=True))[:: -1 if i % 2 else 1]
        exact.append([(phrase, mask) for (phrase, _, _), mask in ordered])
        boxes.append([(phrase, layouts.box_mask(box)) for (phrase, _, box), _ in ordered])

    def dense(held: Sequence[Sequence[tuple[str, np.ndarray]]], **options: Any) -> Method:
        return lambda index: jaxmix.DenseDiffusion(
            [[jaxmix.Segment(phrase, mask) for phrase, mask in held[i]] for i in index], **options
        )

    drawn = {"prompt alone": bench.draw("layouts: prompt alone", captions)}
    strong = {"cross": 4.0, "self_": 1.0, "window": (0.0, 1.0)}
    for shape, held in (("masks", exact), ("boxes", boxes)):
        hints = {"masks": [coloured(np.stack([mask for _, mask in x])) for x in held]}
        told = [shape, [[phrase for phrase, _ in x] for x in held], digest(hints["masks"])]
        for name, options in (("DenseDiffusion", {}), (f"DenseDiffusion, {layouts.STRONG}", strong)):
            title = f"{name}, {shape}"
            drawn[title] = bench.draw(f"layouts: {title}", captions, [dense(held, **options)], [name, told])
        drawn[f"mini-masks, {shape}"] = bench.followed(f"layouts: mini-masks, {shape}", ["masks"], captions, hints)
        title = f"mini-masks + DenseDiffusion, {shape}"
        drawn[title] = bench.followed(
            f"layouts: {title}", ["masks"], captions, hints, more=[dense(held)], mark=[title, told]
        )
    drawn["real scenes"] = layouts.real(cases)
    scorer, segmenter = bench.judges.scorer, bench.judges.segmenter
    found = {name: layouts.measure(images, cases, scorer, segmenter) for name, images in drawn.items()}
    rows = bench.cfg.grid_rows
    shown = [("layout", np.stack([coloured(c.masks[:: -1 if i % 2 else 1]) for i, c in enumerate(cases[:rows])]))]
    path = labelled_grid(
        Path(bench.cfg.out) / "layouts.png", [*shown, *((k, x[:rows]) for k, x in drawn.items())], captions[:rows], 2
    )
    print(f"wrote {path}, {path.stat().st_size / 1e3:.0f} kB", flush=True)
    return {"Two objects, the same layouts": (found, "prompt alone")}


def main(cfg: Config) -> int:
    """Draw, measure, print; write effects.json, effects.md and the pictures."""
    command.enable_compilation_cache()
    pipe, out, parts = load_model(cfg.model), Path(cfg.out), cfg.parts.split(",")
    needed = {kind for kind in MAPS if kind in parts or "together" in parts or (kind == "masks" and "layouts" in parts)}
    nets = {kind: jaxmix.ControlNet.load(getattr(cfg, kind), pipe) for kind in MAPS if kind in needed}
    out.mkdir(parents=True, exist_ok=True)
    judges = Judges(jaxmix.ImageEncoder.load("mini-clip"))
    bench = Bench(cfg, Studio(out, pipe, cfg.seed), judges, make_cases(cfg.cases, cfg.seed), nets)
    found: dict[str, tuple[Measured, str]] = {}
    for part in parts:
        if part in MAPS:
            found |= one_net(bench, part)
        else:
            found |= (together if part == "together" else same_layouts)(bench)
    told = "\n\n".join(table(title, measured, base, {}) for title, (measured, base) in found.items())
    print(told)
    numbers = {title: means(measured) for title, (measured, _) in found.items()}
    (out / "effects.json").write_text(json.dumps({"config": dataclasses.asdict(cfg), **numbers}, indent=1) + "\n")
    (out / "effects.md").write_text(told + "\n", encoding="utf-8")
    print(f"wrote {out}/effects.json, effects.md and the pictures")
    return 0


if __name__ == "__main__":
    command.run(main)
