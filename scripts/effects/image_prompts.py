"""Measure what image prompts do to the embedded model's pictures: IP-Adapter, InstantStyle, and VMix beside them.

References are real scenes of pairs of object and style that neither the model nor the adapters were trained on. Judged
is what of a reference comes back (object, style, background, CLIP-I), what of a prompt does, and what leaks. Pictures
are kept under `out`, so an interrupted run can be resumed.

    python -m scripts.effects.image_prompts --out runs/effects_image_prompts
    python -m scripts.effects.image_prompts --parts blocks --cases 40
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.pipeline.blocks import attn2_names
from jaxmix.types import InputError
from scripts.effects.draw import digest
from scripts.effects.measures import round_trip
from scripts.effects.pictures import labelled_grid
from scripts.effects.studio import Measured, Studio, check_counts, check_parts, filled, means, table
from scripts.effects.vmix import load_model
from train.scenes import DIMENSIONS, Plan, Scenes, measure
from train.scenes.captions import BACKGROUND_WORDS, with_article
from train.scorer import WEIGHTS as SCORER
from train.scorer import load_scorer
from train.segmenter import distance_from_middle, load_segmenter

PARTS = ("alone", "scales", "text", "blocks", "subtract", "vmix")
SCALES = (0.25, 0.5, 1.0, 1.5)
STRENGTHS = (0.5, 1.0)
SPLIT = "held_out_pairs"


@dataclasses.dataclass
class Config:
    """What to measure.

    Attributes:
        parts: some of alone, scales, text, blocks, subtract, vmix, separated by commas.
        model: "mini" or a diffusers folder whose images have the judges' size.
        adapter: "mini-ip" or the file of a base adapter for it.
        plus: "mini-ip-plus" or the file of a plus adapter for it; left out if empty.
        image_encoder: the CLIP that they read with, and that judges pictures.
        vmix: "mini-vmix" or the file of a VMix adapter for it.
        style_blocks: preset or pattern of the attn2 that are measured as those of the style.
        style_scale: scale of the adapter beside a prompt in the parts blocks and subtract.
        cases: references; each is drawn once per condition.
        steps: sampling steps; the model's own default if null.
        grid_rows: cases on the pictures.
        batch_size: pictures drawn at a time.
        seed: of the cases and of the first picture.
        out: folder for effects.json, effects.md, the pictures and what is kept between runs.
    """

    parts: str = ",".join(PARTS)
    model: str = "mini"
    adapter: str = "mini-ip"
    plus: str = "mini-ip-plus"
    image_encoder: str = "mini-clip"
    vmix: str = "mini-vmix"
    style_blocks: str = "style"
    style_scale: float = 1.0
    cases: int = 200
    steps: int | None = None
    grid_rows: int = 5
    batch_size: int = 25
    seed: int = 17
    out: str = "runs/effects_image_prompts"

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        check_counts(self, cases=2, grid_rows=1, batch_size=1)
        check_parts(self.parts, PARTS)


@dataclasses.dataclass(frozen=True)
class Case:
    """A reference with what it shows, and a prompt of another object before another background, of no style."""

    image: np.ndarray
    mask: np.ndarray
    caption: str
    object: str
    style: str
    background: str
    prompt: str
    other: str
    elsewhere: str


def make_cases(n: int, seed: int) -> list[Case]:
    """Paint n references; case i does not change when n grows."""
    scenes = Scenes(split=SPLIT, seed=seed, two_objects=0.0, three_objects=0.0)
    backgrounds = sorted(BACKGROUND_WORDS)
    names = [scenes.atlas.objects[i] for i in range(scenes.objects)]
    found = []
    for i in range(n):
        rng = np.random.Generator(np.random.Philox(key=[seed, (0x1A << 32) + i]))
        style, index = scenes.pairs[rng.integers(len(scenes.pairs))]
        here, there = (backgrounds[k] for k in rng.choice(len(backgrounds), 2, replace=False))
        plan = Plan(style, (index,), here)
        image, masks = scenes.render(plan, rng)
        other = names[rng.choice([k for k in range(len(names)) if k != index])]
        prompt = f"{with_article(other)} {BACKGROUND_WORDS[there]}"
        pixels = np.asarray(image).astype(np.uint8)
        found.append(Case(pixels, masks.any(0), scenes.caption(plan), names[index], style, here, prompt, other, there))
    return found


class Judges:
    """The scorer, the segmenter and the CLIP of the scenes."""

    def __init__(self, encoder: jaxmix.ImageEncoder, scorer: str | Path = SCORER) -> None:
        self.encoder, self.scorer, self.segmenter = encoder, load_scorer(scorer), load_segmenter()

    def see(self, images: np.ndarray) -> np.ndarray:
        """Return unit vectors (n, p) of pictures in CLIP's space."""
        seen = np.asarray(self.encoder(self.encoder.pixels(list(images))).projected, np.float32)
        return seen / np.linalg.norm(seen, axis=-1, keepdims=True)

    def follow(self, images: np.ndarray, cases: Sequence[Case]) -> dict[str, np.ndarray]:
        """Measure how far pictures follow the references: object, style, background (1 or 0), and CLIP-I."""
        said, n = self.scorer(images), len(images)
        names = {"object": self.scorer.objects, "style": self.scorer.styles, "background": self.scorer.backgrounds}
        right = {
            kind: np.asarray(
                [names[kind][k] == getattr(c, kind) for k, c in zip(said[kind].argmax(-1), cases, strict=True)], float
            )
            for kind in names
        }
        near = (self.see(images) * self.see(np.stack([c.image for c in cases]))).sum(-1)
        masks = self.segmenter(images, min(128, n)) > 0.5
        wanted = np.stack([c.mask for c in cases])
        iou = (masks & wanted).sum((1, 2)) / np.maximum((masks | wanted).sum((1, 2)), 1)
        return {**right, "CLIP-I": near, "layout IoU": iou}

    def both(self, images: np.ndarray, cases: Sequence[Case]) -> dict[str, np.ndarray]:
        """Measure pictures of a prompt beside a reference: what each of them gave, and what leaked from it."""
        follow, said = self.follow(images, cases), self.scorer(images)
        objects = [self.scorer.objects[k] for k in said["object"].argmax(-1)]
        grounds = [self.scorer.backgrounds[k] for k in said["background"].argmax(-1)]
        texts = self.encoder.texts([c.prompt for c in cases])
        texts = texts / np.linalg.norm(texts, axis=-1, keepdims=True)
        return {
            "prompt's object": np.asarray([o == c.other for o, c in zip(objects, cases, strict=True)], float),
            "prompt's background": np.asarray([g == c.elsewhere for g, c in zip(grounds, cases, strict=True)], float),
            "reference's style": follow["style"],
            "leaked object": follow["object"],
            "leaked background": follow["background"],
            "layout IoU": follow["layout IoU"],
            "CLIP-T": (self.see(images) * texts).sum(-1),
        }


@dataclasses.dataclass(frozen=True)
class Bench:
    """What every part needs."""

    cfg: Config
    studio: Studio
    judges: Judges
    cases: list[Case]
    adapters: Mapping[str, jaxmix.IPAdapter]

    def draw(self, name: str, texts: Sequence[str], *methods: Any, mark: Any = "", **options: Any) -> np.ndarray:
        """Return one picture per case: of `texts`, under methods made for a slice of the cases, which `mark` tells."""

        def some(index: list[int], seeds: list[int]) -> np.ndarray:
            made = tuple(method(index) for method in methods)
            kwargs = {key: value[index] if isinstance(value, np.ndarray) else value for key, value in options.items()}
            return self.studio.pipe.generate([texts[i] for i in index], seeds, self.cfg.steps, methods=made, **kwargs)

        key = ["image prompts", self.cfg.steps, list(texts), mark, digest([c.image for c in self.cases])]
        size = self.cfg.batch_size
        return self.studio.draw(key, len(self.cases), filled(some, size), size, name)

    def seen(
        self,
        name: str,
        texts: Sequence[str],
        kind: str = "base",
        scale: float = 1.0,
        shift: int = 0,
        vmix: tuple[str, Any] | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Draw the cases' references beside `texts`; `shift` shows each case the reference of a later one.

        ``options`` are those of `IPAdapter.on`, a list having one value per case; ``vmix`` is (labels, adapter).
        """
        adapter, n = self.adapters[kind], len(self.cases)

        def look(index: Sequence[int]) -> Any:
            told = {k: [v[i] for i in index] if isinstance(v, list) else v for k, v in options.items()}
            return adapter.on([[self.cases[(i + shift) % n].image] for i in index], scale, **told)

        methods, mark = [look], [self.marks[kind], scale, shift, options]
        if vmix is not None:
            labels, mixer = vmix
            methods.append(lambda index: mixer.on(labels))
            mark += [labels, digest(mixer.params)]
        return self.draw(name, texts, *methods, mark=mark)

    @functools.cached_property
    def marks(self) -> dict[str, str]:
        """What tells each adapter from others."""
        return {kind: digest({"p": a.projection, "l": dict(a.layers)}) for kind, a in self.adapters.items()}

    def shown(self, file: str, columns: Sequence[tuple[str, np.ndarray]], captions: Sequence[str]) -> None:
        """Write the pictures of the first cases."""
        rows = self.cfg.grid_rows
        images = np.stack([c.image for c in self.cases[:rows]])
        path = labelled_grid(Path(self.cfg.out) / file, [("reference", images), *columns], captions[:rows], 2)
        print(f"wrote {path}, {path.stat().st_size / 1e3:.0f} kB", flush=True)


def alone(bench: Bench) -> dict[str, Any]:
    """Measure pictures that follow a reference without any word."""
    empty, n = [""] * len(bench.cases), len(bench.cases)
    references = np.stack([c.image for c in bench.cases])
    pictures = {"no picture": bench.draw("no picture", empty)}
    for kind in bench.adapters:
        title = {"base": "mini-ip", "plus": "mini-ip-plus"}[kind]
        pictures[title] = bench.seen(title, empty, kind)
        pictures[f"{title}, another reference"] = bench.seen(f"{title}, another", empty, kind, shift=1)
    pictures["its caption as prompt"] = bench.draw("caption", [c.caption for c in bench.cases])
    for strength in (0.6, 0.8):
        pictures[f"image to image, strength {strength}"] = bench.draw(
            f"image to image {strength}", empty, images=references, strength=strength, mark=strength
        )
    pictures["reference after the autoencoder"] = round_trip(
        bench.studio.pipe, references, min(bench.cfg.batch_size, n)
    )
    names = [name for name in pictures if "another" not in name and "autoencoder" not in name]
    bench.shown("alone.png", [(name, pictures[name]) for name in names], [c.caption for c in bench.cases])
    found = {name: bench.judges.follow(images, bench.cases) for name, images in pictures.items()}
    return {"The picture alone": (found, "no picture")}


def scales(bench: Bench) -> dict[str, Any]:
    """Measure the strength of a reference without any word."""
    empty = [""] * len(bench.cases)
    pictures = {"0": bench.draw("no picture", empty)}
    for scale in SCALES:
        pictures[f"{scale:g}"] = bench.seen(f"scale {scale:g}", empty, scale=scale)
    bench.shown("scales.png", list(pictures.items()), [c.caption for c in bench.cases])
    found = {name: bench.judges.follow(images, bench.cases) for name, images in pictures.items()}
    return {"Scale of mini-ip, the picture alone": (found, "0")}


def _beside(bench: Bench, title: str, conditions: Mapping[str, dict[str, Any]], file: str) -> dict[str, Any]:
    """Measure references beside prompts of other objects; the options of each condition are those of `Bench.seen`."""
    prompts = [c.prompt for c in bench.cases]
    pictures = {"prompt alone": bench.draw("prompt alone", prompts)}
    for name, options in conditions.items():
        pictures[name] = bench.seen(f"{title}: {name}", prompts, **{"scale": bench.cfg.style_scale, **options})
    bench.shown(file, list(pictures.items()), prompts)
    found = {name: bench.judges.both(images, bench.cases) for name, images in pictures.items()}
    return {title: (found, "prompt alone")}


def text(bench: Bench) -> dict[str, Any]:
    """Measure a prompt of another object and background beside the reference, over the scale."""
    wanted: dict[str, dict[str, Any]] = {f"mini-ip x {s:g}": {"scale": s} for s in (0.25, 0.5, 1.0)}
    if "plus" in bench.adapters:
        wanted |= {f"mini-ip-plus x {s:g}": {"scale": s, "kind": "plus"} for s in (0.5, 1.0)}
    return _beside(bench, "Picture and prompt", wanted, "text.png")


def blocks(bench: Bench) -> dict[str, Any]:
    """Measure which cross-attentions carry style and which layout: each alone, all, and presets."""
    names = attn2_names(bench.studio.pipe)
    wanted: dict[str, dict[str, Any]] = {"all blocks": {}}
    for name in names:
        short = name.replace(".transformer_blocks.0.attn2", "").replace("attentions.", "")
        wanted[short] = {"blocks": f"^{name.replace('.', chr(92) + '.')}$"}
    wanted["preset: style"] = {"blocks": bench.cfg.style_blocks}
    return _beside(bench, "InstantStyle: blocks that listen", wanted, "blocks.png")


def subtract(bench: Bench) -> dict[str, Any]:
    """Measure what subtracting the reference's object in CLIP's space does, over its strength."""
    told = [c.object for c in bench.cases]
    wanted: dict[str, dict[str, Any]] = {"nothing subtracted": {}}
    for strength in STRENGTHS:
        wanted[f"its object x {strength:g}"] = {"subtract": told, "subtract_scale": strength}
    rolled = [*told[1:], told[0]]
    wanted["another object x 0.5"] = {"subtract": rolled, "subtract_scale": 0.5}
    return _beside(bench, "InstantStyle: content subtraction", wanted, "subtract.png")


def vmix(bench: Bench) -> dict[str, Any]:
    """Measure VMix's labels beside an image prompt, each by its own measure, and whether the picture is followed."""
    adapter, empty = jaxmix.VMix.load(bench.cfg.vmix, bench.studio.pipe), [""] * len(bench.cases)
    pictures, found = {}, {}
    for labels in ("", "none", *DIMENSIONS, "all"):
        name = labels or "mini-ip"
        pictures[name] = bench.seen(f"with VMix {name}", empty, vmix=(labels, adapter) if labels else None)
        images = pictures[name]
        seen = [measure(image) for image in images]
        masks = bench.judges.segmenter(images, min(128, len(images)))
        found[name] = {
            **{d: np.asarray([x[d] for x in seen]) for d in DIMENSIONS if d != "composition"},
            "composition": -distance_from_middle(masks),
            **{k: x for k, x in bench.judges.follow(images, bench.cases).items() if k != "layout IoU"},
        }
    bench.shown("vmix.png", list(pictures.items()), [c.caption for c in bench.cases])
    return {"VMix beside the picture": (found, "none")}


RUN = {"alone": alone, "scales": scales, "text": text, "blocks": blocks, "subtract": subtract, "vmix": vmix}


def main(cfg: Config) -> int:
    """Draw, measure, print; write effects.json, effects.md and the pictures."""
    command.enable_compilation_cache()
    pipe, out = load_model(cfg.model), Path(cfg.out)
    encoder = jaxmix.ImageEncoder.load(cfg.image_encoder)
    files = {"base": cfg.adapter, "plus": cfg.plus}
    adapters = {kind: jaxmix.IPAdapter.load(path, pipe, encoder) for kind, path in files.items() if path}
    for kind, adapter in adapters.items():
        if adapter.kind != kind:
            raise InputError(f"{files[kind]}: found a {adapter.kind} adapter, expected a {kind} one")
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(cfg, Studio(out, pipe, cfg.seed), Judges(encoder), make_cases(cfg.cases, cfg.seed), adapters)
    found: dict[str, tuple[Measured, str]] = {}
    for part in cfg.parts.split(","):
        found |= RUN[part](bench)
    told = "\n\n".join(table(title, measured, base, {}) for title, (measured, base) in found.items())
    print(told)
    numbers = {title: means(measured) for title, (measured, _) in found.items()}
    (out / "effects.json").write_text(json.dumps({"config": dataclasses.asdict(cfg), **numbers}, indent=1) + "\n")
    (out / "effects.md").write_text(told + "\n", encoding="utf-8")
    print(f"wrote {out}/effects.json, effects.md and the pictures")
    return 0


if __name__ == "__main__":
    command.run(main)
