"""What is installed is what pyproject.toml allows, all of it imports, and the embedded model draws what it is told."""

import importlib
import importlib.metadata
import os
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import jaxmix

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = [
    Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for folder in ("jaxmix", "infer", "train")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("requirement", [pytest.param(r, id=r.name) for r in REQUIREMENTS])
def test_installed_version_is_allowed(requirement: Requirement):
    version = importlib.metadata.version(requirement.name)
    assert requirement.specifier.contains(version, prereleases=True)
    if os.environ.get("JAXMIX_LOWEST"):  # scripts/test.sh --lowest
        (lowest,) = (Version(s.version) for s in requirement.specifier if s.operator == ">=")
        assert Version(version).release[: len(lowest.release)] == lowest.release


def test_every_module_imports():
    for module in MODULES:
        importlib.import_module(module)


def test_embedded_model_draws_what_it_is_asked_for():
    from train.scorer import load_scorer

    images = jaxmix.load("mini").generate(["an ink drawing of a cat on a plain blue background"] * 2, seeds=[1, 2])
    scorer = load_scorer()
    said = scorer(images)
    assert [scorer.objects[i] for i in said["object"].argmax(-1)] == ["cat", "cat"]
    assert [scorer.styles[i] for i in said["style"].argmax(-1)] == ["ink", "ink"]
    assert [scorer.backgrounds[i] for i in said["background"].argmax(-1)] == ["blue", "blue"]
