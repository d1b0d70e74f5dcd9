"""Measure DreamBooth and textual inversion: what the model never saw, in new scenes, beside its class.

The subject is the object of configs/dreambooth_mini.yaml. Each model draws the same prompts from the same noise: the
subject before known backgrounds and in known styles, its class without the word for it, and other objects.

    python -m train.dreambooth --config configs/dreambooth_mini.yaml --output_dir runs/duck
    python -m scripts.effects.subjects --models "prior=runs/duck/pipeline" --steps 10 --out runs/effects_subjects
    python -m train.textual_inversion --config configs/textual_inversion_mini.yaml --output_dir runs/word
    python -m scripts.effects.subjects --words "one vector=runs/word/learned_embeds.safetensors" --steps 10
    python -m scripts.effects.subjects --experts runs/experts --cases 50 --steps 10     # of scripts.effects.experts
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.types import InputError
from scripts.effects.draw import digest
from scripts.effects.experts import PLAN, RECIPES, STYLE, folder_of, scenes_of
from scripts.effects.fusion import Fused, average
from scripts.effects.image_prompts import Judges
from scripts.effects.pictures import labelled_grid
from scripts.effects.studio import Studio, check_counts, filled, means, table
from scripts.effects.vmix import load_model
from train.scenes import Scenes
from train.scenes.captions import BACKGROUND_WORDS, STYLE_WORDS, with_article
from train.scenes.splits import HELD_OUT_STYLE
from train.scorer import WEIGHTS as SCORER
from train.subjects import SubjectScenes

BASE = "the model itself"
SPREAD = 4  # pictures of different prompts, between which variety is measured, 1 less their mean cosine


@dataclasses.dataclass
class Config:
    """What to measure.

    Attributes:
        models: names of experts, each with its folder or LoRA file, as in "prior=runs/duck/pipeline".
        words: names of learnt words, each with its file of vectors; they are measured where the subject is asked for,
            since other prompts draw what the model itself does.
        experts: instead of both, a folder by `scripts.effects.experts`; the tables then pool its subjects, each with as
            many cases, and what follows about the subject is read there.
        model: "mini" or a diffusers folder whose images have the judges' size, which the experts were made from.
        image_encoder: the CLIP that compares pictures.
        scorer: weights of the judge, such as those by configs/scorer_reserved.yaml, which knows the objects, too.
        subject: the object that they learnt, or the style as captions say it.
        subject_style: the style of an object's pictures.
        subject_pictures: how many were shown.
        word: what stands for the subject in prompts.
        known: the class, an object or a style that the model knows.
        cases: prompts of each table; each variety is of this many, too.
        steps: of each run.
        grid_rows: cases on the pictures.
        batch_size: pictures drawn at a time.
        seed: of the cases and of the first picture.
        out: folder for effects.json, effects.md, the pictures and what is kept between runs.
    """

    models: list[str] = dataclasses.field(default_factory=list)
    words: list[str] = dataclasses.field(default_factory=list)
    experts: str = ""
    model: str = "mini"
    image_encoder: str = "mini-clip"
    scorer: str = str(SCORER)
    subject: str = "duck"
    subject_style: str = "3d"
    subject_pictures: int = 5
    word: str = "sks penguin"
    known: str = "penguin"
    cases: int = 100
    steps: int = 25
    grid_rows: int = 5
    batch_size: int = 20
    seed: int = 29
    out: str = "runs/effects_subjects"

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        check_counts(self, cases=SPREAD, steps=2, grid_rows=1, batch_size=1, subject_pictures=2)
        if self.experts and (self.models or self.words):
            raise InputError("experts: found it with models or words, expected one of the two")
        for named in [*self.models, *self.words]:
            if not named.partition("=")[2]:
                key, such = ("models", "FOLDER or NAME=LORA") if named in self.models else ("words", "EMBEDDING")
                raise InputError(f"{key}: found {named!r}, expected NAME={such}.safetensors")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt with its answers."""

    prompt: str
    object: str
    style: str
    background: str


def prompts_of(what: str, n: int, seed: int, word: str = "") -> list[Asked]:
    """Return n prompts of an object (of any, if ``what`` is empty) in known styles before known backgrounds."""
    scenes = Scenes(split="train", seed=seed, two_objects=0.0, three_objects=0.0)
    backgrounds, names = sorted(BACKGROUND_WORDS), [scenes.atlas.objects[i] for i in range(scenes.objects)]
    found = []
    for i in range(n):
        rng = np.random.Generator(np.random.Philox(key=[seed, (0x5B << 32) + i]))
        style = list(scenes.styles)[rng.integers(len(scenes.styles))]
        where, name = backgrounds[rng.integers(len(backgrounds))], what or names[rng.integers(len(names))]
        text = f"{with_article(STYLE_WORDS[style])} of {with_article(word or name)} {BACKGROUND_WORDS[where]}"
        found.append(Asked(text, name, style, where))
    return found


def in_style(what: str, n: int, seed: int, word: str = "") -> list[Asked]:
    """Return n prompts of known objects before known backgrounds in one style, as captions say it, or in a word's."""
    name = next(style for style, words in STYLE_WORDS.items() if words == what)
    return [
        dataclasses.replace(x, style=name, prompt=x.prompt.replace(told, with_article(word or what), 1))
        for x in prompts_of("", n, seed)
        for told in [with_article(STYLE_WORDS[x.style])]
    ]


def asked_of(cfg: Config) -> dict[str, list[Asked]]:
    """Return the tables: the prompts of each, and their answers."""
    if cfg.subject == STYLE:
        style = [
            dataclasses.replace(x, style=HELD_OUT_STYLE) for x in in_style(cfg.known, cfg.cases, cfg.seed, cfg.word)
        ]
        return {
            "The style for known objects": style,
            "The known style, without the word": in_style(cfg.known, cfg.cases, cfg.seed + 1),
            "Other styles": prompts_of("", cfg.cases, cfg.seed + 2),
        }
    return {
        "The subject in new scenes": prompts_of(cfg.known, cfg.cases, cfg.seed, cfg.word),
        "Its class, without the word": prompts_of(cfg.known, cfg.cases, cfg.seed + 1),
        "Other objects": prompts_of("", cfg.cases, cfg.seed + 2),
    }


def opened(pipe: jaxmix.Pipeline, path: str) -> tuple[jaxmix.Pipeline, tuple[Any, ...]]:
    """Return a pipeline and methods for an expert: its own, or the model's with a LoRA."""
    if path.endswith(".safetensors"):
        return pipe, (jaxmix.LoRA.load(path, pipe).on(1.0),)
    return jaxmix.load(path), ()


def main(cfg: Config) -> int:
    """Draw, measure, print; write effects.json, effects.md and the pictures."""
    command.enable_compilation_cache()
    each = each_subject(cfg) if cfg.experts else []
    pipe = load_model(cfg.model)
    judges = Judges(jaxmix.ImageEncoder.load(cfg.image_encoder), cfg.scorer)
    kinds = [[x for x in each if x.subject != STYLE], [x for x in each if x.subject == STYLE]] if each else [[cfg]]
    found = {}
    for some in filter(None, kinds):
        found |= pooled([measure(one, pipe, judges) for one in some])
    out = Path(cfg.out)
    told = "\n\n".join(table(title, measured, BASE, {}) for title, measured in found.items())
    print(told)
    numbers = {title: means(measured) for title, measured in found.items()}
    (out / "effects.json").write_text(json.dumps(numbers | {"config": dataclasses.asdict(cfg)}, indent=1) + "\n")
    (out / "effects.md").write_text(told + "\n", encoding="utf-8")
    return 0


def each_subject(cfg: Config) -> list[Config]:
    """Return what to measure of each subject of a folder of experts."""
    path = Path(cfg.experts) / PLAN
    if not path.is_file():
        raise InputError(f"experts: found no {path}, expected a folder by scripts.effects.experts")
    held, some = json.loads(path.read_text()), []
    for subject, about in held["subjects"].items():
        models: list[str] = []
        words: list[str] = []
        for name, recipe in RECIPES.items():
            folder = folder_of(cfg.experts, subject, name)
            for steps in sorted(int(kept.name) for kept in folder.glob("[0-9]*")):
                named = f"{name}, {steps} steps={folder / str(steps) / recipe.made}"
                (words if recipe.trainer == "textual_inversion" else models).append(named)
        how: dict[str, Any] = {"subject": subject, "known": about["known"], "word": f"sks {about['known']}"}
        how |= {"models": models, "words": words}
        how |= {"subject_style": held["style"], "subject_pictures": held["pictures"]}
        how |= {"out": str(Path(cfg.out) / subject.replace(" ", "_"))}
        some.append(dataclasses.replace(cfg, experts="", **how))
    return some


def pooled(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the tables of several subjects as one: of what every subject has, all cases one after the other."""
    tables: dict[str, Any] = {}
    for title, first in found[0].items():
        if all(title in one for one in found):
            names = [name for name in first if all(name in one[title] for one in found)]
            tables[title] = {
                name: {key: np.concatenate([one[title][name][key] for one in found]) for key in first[name]}
                for name in names
            }
    return tables


def measure(cfg: Config, pipe: jaxmix.Pipeline, judges: Judges) -> dict[str, Any]:
    """Draw and measure one subject; return the tables, and write the pictures."""
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    studio = Studio(out, pipe, cfg.seed)
    plain: dict[str, Any] = {"two_objects": 0.0, "three_objects": 0.0, "labelled": 0.0}
    scenes = Scenes(judges.scorer.size, **plain, **scenes_of(cfg.subject, cfg.subject_style))
    shown = SubjectScenes(scenes, "" if cfg.subject == STYLE else cfg.subject, 8 * cfg.subject_pictures)
    pictures = np.stack([row["image"] for row in shown.rows])
    subject, unseen = judges.see(pictures[: cfg.subject_pictures]), pictures[cfg.subject_pictures :]
    experts = {BASE: (pipe, ())} | {
        name: opened(pipe, path) for name, _, path in (named.partition("=") for named in cfg.models)
    }
    asked = asked_of(cfg)
    first = next(iter(asked))
    if cfg.words and not cfg.models:  # nothing else would differ
        asked = dict(list(asked.items())[:1])
    found: dict[str, Any] = {}
    for title, some in asked.items():
        drawn = {}
        for name, (expert, methods) in experts.items():

            def each(index: list[int], seeds: list[int], one: Any = expert, how: Any = methods) -> np.ndarray:
                return one.generate([some[i].prompt for i in index], seeds, cfg.steps, methods=how)  # noqa: B023

            weights = digest([expert.params, *(m.lora.parts for m in methods)])
            key = ["subjects", weights, cfg.steps, [x.prompt for x in some]]
            drawn[name] = studio.draw(key, len(some), filled(each, cfg.batch_size), cfg.batch_size, f"{title}: {name}")
        for name, _, path in (named.partition("=") for named in cfg.words if title == first):
            drawn[name] = _with_word(cfg, studio, pipe, path, name, some)
        found[title] = {name: _measure(judges, images, some, subject, cfg.subject) for name, images in drawn.items()}
        if title == first:
            real = _measure(judges, unseen, [Asked("", "", "", "")] * len(unseen), subject, cfg.subject)
            found[title]["real scenes of the subject"] = {
                key: values if "subject" in key else np.full(len(unseen), np.nan) for key, values in real.items()
            }
        rows = slice(0, cfg.grid_rows)
        file = title.lower().replace(",", "").split()[1] + ".png"
        columns = [("shown", pictures[: cfg.grid_rows])] if title == first else []
        columns += [(name, images[rows]) for name, images in drawn.items()]
        _show(out / file, columns, [x.prompt for x in some[rows]])
    whole = [(name, expert) for name, (expert, methods) in experts.items() if name != BASE and not methods]
    if whole and cfg.subject != STYLE:
        title, some = "Beside another object", prompts_of("", cfg.cases, cfg.seed + 3)
        drawn = _beside(cfg, studio, pipe, *whole[0], some)
        found[title] = {name: _measure(judges, images, some, subject, cfg.subject, 2) for name, images in drawn.items()}
        columns = [(name, images[: cfg.grid_rows]) for name, images in drawn.items()]
        _show(out / "beside.png", columns, [x.prompt for x in some[: cfg.grid_rows]])
    return found


def _show(path: Path, columns: Sequence[tuple[str, np.ndarray]], captions: Sequence[str]) -> None:
    labelled_grid(path, columns, captions, 2)
    print(f"wrote {path}, {path.stat().st_size / 1e3:.0f} kB", flush=True)


def _with_word(
    cfg: Config, studio: Studio, pipe: jaxmix.Pipeline, path: str, name: str, some: Sequence[Asked]
) -> np.ndarray:
    """Draw prompts with a learnt word in place of the subject's, in every layer its own vectors if it has them."""
    knows = pipe.with_embedding(path)
    word = knows.embeddings[-1]
    texts = [x.prompt.replace(with_article(cfg.word), with_article(word.token)) for x in some]

    def each(index: list[int], seeds: list[int]) -> np.ndarray:
        told = [texts[i] for i in index]
        methods = (jaxmix.LayerPrompts([{".": text} for text in told]),) if word.layers else ()
        return knows.generate(told, seeds, cfg.steps, methods=methods)

    key = ["words", digest([word.vectors, word.layers]), cfg.steps, texts]
    return studio.draw(key, len(some), filled(each, cfg.batch_size), cfg.batch_size, f"Words: {name}")


def _beside(
    cfg: Config, studio: Studio, pipe: jaxmix.Pipeline, name: str, expert: jaxmix.Pipeline, some: Sequence[Asked]
) -> dict[str, np.ndarray]:
    """Draw the subject beside other objects: both named in one prompt, and MagicFusion's second application."""
    places = [BACKGROUND_WORDS[x.background] for x in some]
    own = [f"{with_article(STYLE_WORDS[x.style])} of {with_article(cfg.word)}" for x in some]
    both = [f"{t} and {with_article(x.object)} {w}" for t, x, w in zip(own, some, places, strict=True)]
    alone = [f"{t} {w}" for t, w in zip(own, places, strict=True)]

    def draw(title: str, one: jaxmix.Pipeline, texts: Sequence[str], fused: bool = False) -> np.ndarray:
        def each(index: list[int], seeds: list[int]) -> np.ndarray:
            method = jaxmix.MagicFusion([alone[i] for i in index], expert, switch=300)
            return one.generate([texts[i] for i in index], seeds, cfg.steps, methods=(method,) if fused else ())

        key = ["beside", title, cfg.steps, list(texts), alone, digest(expert.params)]
        return studio.draw(key, len(some), filled(each, cfg.batch_size), cfg.batch_size, f"Beside: {title}")

    def mean(index: list[int], seeds: list[int]) -> np.ndarray:
        pairs = [Fused(some[i].prompt, alone[i], (0, 0)) for i in index]
        return average(dataclasses.replace(pipe, default_steps=cfg.steps), expert, pairs, seeds)

    key = ["mean", cfg.steps, [x.prompt for x in some], alone, digest(expert.params)]
    both_means = studio.draw(key, len(some), filled(mean, cfg.batch_size), cfg.batch_size, "Beside: the mean")
    return {
        BASE: draw(BASE, pipe, both),
        f"{name}, both in the prompt": draw(name, expert, both),
        f"the mean of the model and {name}": both_means,
        f"MagicFusion with {name}": draw("MagicFusion", pipe, [x.prompt for x in some], True),
    }


def _measure(
    judges: Judges, images: np.ndarray, some: Sequence[Asked], subject: np.ndarray, name: str, first: int = 1
) -> dict[str, np.ndarray]:
    """Measure how like the subject pictures are, whether they are what was asked for, and how much they vary.

    The subject, for a judge that knows it, and the object that is asked for must be among the ``first`` that it names.
    """
    seen, said = judges.see(images), judges.scorer(images)
    right, named = {}, np.full(len(images), np.nan)
    for kind in ("object", "style", "background"):
        known, most = getattr(judges.scorer, f"{kind}s"), first if kind == "object" else 1
        found = [[known[k] for k in row] for row in np.argsort(-said[kind], -1)[:, :most]]
        right[kind] = np.asarray([getattr(x, kind) in names for names, x in zip(found, some, strict=True)], float)
        if name in known and kind == "object":
            named = np.asarray([name in names for names in found], float)
    groups = [range(i, i + SPREAD) for i in range(0, len(seen) - SPREAD + 1, SPREAD)]
    apart = [1 - (seen[list(g)] @ seen[list(g)].T)[np.triu_indices(SPREAD, 1)].mean() for g in groups]
    variety = np.full(len(seen), np.nan)
    variety[: len(apart)] = apart
    return {"CLIP-I subject": (seen @ subject.T).mean(1), "subject": named, **right, "variety": variety}


if __name__ == "__main__":
    command.run(main)
