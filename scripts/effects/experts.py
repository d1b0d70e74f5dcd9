"""Train experts on what the embedded model was never shown, for `scripts.effects.subjects --experts`.

Four objects and a style are learnt, each from the same few pictures by each recipe, and kept at each number of steps.
The class that its prompts name is the known object or style whose scenes look most like its own, by CLIP. What is there
is not trained again: the command may be stopped, and goes on.

    python -m scripts.effects.experts --out runs/experts
    python -m scripts.effects.subjects --experts runs/experts --cases 50 --steps 10 --out runs/subjects
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.command import near_misses
from jaxmix.types import InputError
from scripts.effects.studio import check_counts
from train.scenes import SIZE, Scenes
from train.scenes.captions import STYLE_WORDS, with_article
from train.scenes.scenes import STYLES
from train.scenes.splits import HELD_OUT_STYLE, held_out_objects

PLAN = "plan.json"
STYLE = STYLE_WORDS[HELD_OUT_STYLE]
_SCENES = 24  # of each object, whose mean says what it looks like
_LOOKED = 4000  # scenes in which these are looked for


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A trainer with its flags beside the subject's, and the file or folder that it writes."""

    trainer: str
    flags: tuple[str, ...]
    made: str
    prior: bool = False


_LORA = ("--rank", "16", "--learning_rate", "5e-4")
_NO_PRIOR = ("--with_prior_preservation", "false", "--class_prompt", "", "--train_batch_size", "8")
RECIPES: dict[str, Recipe] = {
    "prior": Recipe("dreambooth", ("--save_precision", "float16"), "pipeline", True),
    "without prior": Recipe("dreambooth", ("--save_precision", "float16", *_NO_PRIOR), "pipeline"),
    "LoRA, prior": Recipe("dreambooth", _LORA, "pytorch_lora_weights.safetensors", True),
    "one vector": Recipe("textual_inversion", (), "learned_embeds.safetensors"),
    "four vectors": Recipe("textual_inversion", ("--num_vectors", "4"), "learned_embeds.safetensors"),
    "per layer": Recipe("textual_inversion", ("--per_layer", "true"), "learned_embeds.safetensors"),
}


@dataclasses.dataclass
class Config:
    """What to train.

    Attributes:
        model: the model that learns.
        image_encoder: the CLIP that finds each object's class.
        subjects: objects, and the style by its name in captions; null for all that no model is trained on.
        recipes: by which; null for all.
        steps: numbers of steps, ascending; an expert is kept at each.
        pictures: scenes of the subject that are shown.
        style: the style of objects.
        size: side of the scenes, in pixels.
        seed: of the trainings.
        out: folder with a folder for each subject, recipe and number of steps.
    """

    model: str = "mini"
    image_encoder: str = "mini-clip"
    subjects: list[str] | None = None
    recipes: list[str] | None = None
    steps: list[int] = dataclasses.field(default_factory=lambda: [100, 200])
    pictures: int = 4
    style: str = "3d"
    size: int = SIZE
    seed: int = 0
    out: str = "runs/experts"

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        check_counts(self, pictures=1)
        if not self.steps or self.steps != sorted(set(self.steps)) or self.steps[0] < 1:
            raise InputError(f"steps: found {self.steps}, expected numbers of 1 or more, ascending")
        for name in self.recipes or ():
            if name not in RECIPES:
                raise InputError(f"recipes: found {name!r}{near_misses(name, RECIPES)}")


def looks_of(judge: jaxmix.ImageEncoder, scenes: Scenes, name: str = "") -> np.ndarray:
    """Return the mean direction (p,) of scenes that show one object, or any."""
    found = []
    for i in range(_LOOKED):
        scene = scenes[i]
        if not name or scene["object_names"] == (name,):
            found.append(scene["image"])
        if len(found) == _SCENES:
            break
    seen = np.asarray(judge(judge.pixels(found)).projected, np.float32)
    mean = (seen / np.linalg.norm(seen, axis=-1, keepdims=True)).mean(0)
    return mean / np.linalg.norm(mean)


def classes_of(cfg: Config, subjects: list[str]) -> dict[str, tuple[str, float]]:
    """Return for each subject the known object or style that looks most like it, and the cosine of the two."""
    judge = jaxmix.ImageEncoder.load(cfg.image_encoder)
    shares: dict[str, Any] = {"two_objects": 0.0, "three_objects": 0.0, "labelled": 0.0, "seed": 1}
    known = Scenes(cfg.size, split="all", styles=(cfg.style,), **shares)
    objects = {name: looks_of(judge, known, name) for name in known.object_names}
    styles = {
        words: looks_of(judge, Scenes(cfg.size, split="all", styles=(style,), **shares))
        for style, words in STYLE_WORDS.items()
        if style in STYLES
    }
    found = {}
    for name in subjects:
        looks = styles if name == STYLE else objects
        own = looks_of(judge, Scenes(cfg.size, **shares | scenes_of(name, cfg.style)), "" if name == STYLE else name)
        like = max(looks, key=lambda other: float(own @ looks[other]))
        found[name] = (like, float(own @ looks[like]))
    return found


def flags_of(cfg: Config, recipe: Recipe, subject: str, known: str) -> list[str]:
    """Return the flags that say what is to be learnt."""
    scenes = {"size": cfg.size, **scenes_of(subject, cfg.style)}
    scenes |= {"two_objects": 0.0, "three_objects": 0.0, "labelled": 0.0}
    flags = ["--pretrained_model_name_or_path", cfg.model, "--scenes", json.dumps(scenes)]
    flags += ["--scene_object", "" if subject == STYLE else subject]
    flags += ["--num_instance_images", str(cfg.pictures), "--validation_steps", "0", "--seed", str(cfg.seed)]
    if recipe.trainer == "textual_inversion":
        token = f"<{subject.replace(' ', '-')}>"
        return [*flags, "--placeholder_token", token, "--initializer_token", known.split()[-1], *recipe.flags]
    told = "" if subject == STYLE else f"{with_article(STYLE_WORDS[cfg.style])} of "
    flags += ["--instance_prompt", f"{told}a sks {known}"]
    if recipe.prior:
        classes = Path(cfg.out) / "class" / known.replace(" ", "_")
        flags += ["--class_prompt", f"{told}{with_article(known)}", "--class_data_dir", str(classes)]
    return [*flags, *recipe.flags]


def scenes_of(subject: str, style: str) -> dict[str, Any]:
    """Return what makes scenes show a subject that no model is trained on: an object in one style, or the style."""
    return {"split": "held_out_style"} if subject == STYLE else {"split": "held_out_objects", "styles": [style]}


def folder_of(out: str | Path, subject: str, recipe: str) -> Path:
    """Return where the experts on a subject by a recipe are, in a folder for each number of steps."""
    return Path(out) / subject.replace(" ", "_") / recipe.replace(", ", "_").replace(" ", "_")


def train(cfg: Config, name: str, subject: str, known: str) -> None:
    """Train one expert by one recipe, and keep it at each number of steps."""
    recipe, folder = RECIPES[name], folder_of(cfg.out, subject, name)
    for steps in cfg.steps:
        kept = folder / str(steps)
        if kept.exists():
            continue
        words = [sys.executable, "-m", f"train.{recipe.trainer}", "--config", f"configs/{recipe.trainer}_mini.yaml"]
        words += [*flags_of(cfg, recipe, subject, known), "--max_train_steps", str(steps)]
        began = time.monotonic()
        done = subprocess.run([*words, "--checkpointing_steps", str(steps), "--output_dir", str(folder / "run")])
        if done.returncode:
            raise InputError(f"{subject}, {name}: its training ended with status {done.returncode}, see above")
        unfinished = folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        shutil.move(folder / "run" / recipe.made, unfinished / recipe.made)
        (unfinished / "seconds").write_text(f"{time.monotonic() - began:.0f}\n")
        unfinished.rename(kept)
    shutil.rmtree(folder / "run", ignore_errors=True)  # its checkpoints


def main(cfg: Config) -> int:
    """Find the classes, train what is missing."""
    command.enable_compilation_cache()
    reserved = (*held_out_objects(Scenes().atlas.objects), STYLE)
    subjects = list(reserved if cfg.subjects is None else cfg.subjects)
    for subject in subjects:
        if subject not in reserved:
            raise InputError(f"subjects: found {subject!r}{near_misses(subject, reserved)}")
    classes = classes_of(cfg, subjects)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    plan = {name: {"known": known, "alike": round(alike, 3)} for name, (known, alike) in classes.items()}
    held = {"pictures": cfg.pictures, "style": cfg.style, "size": cfg.size, "model": cfg.model, "subjects": plan}
    (out / PLAN).write_text(json.dumps(held, indent=1) + "\n")
    for subject, (known, alike) in classes.items():
        print(f"{subject}: most like {known} (cosine {alike:.2f})", flush=True)
        for name in cfg.recipes or RECIPES:
            train(cfg, name, subject, known)
    return 0


if __name__ == "__main__":
    command.run(main)
