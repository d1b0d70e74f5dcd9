"""The house rules: who may import whom, what stands at the top level, how long a file gets, what an import loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUND_FLOOR = {"types", "rows", "control", "kernels", "schedule", "sharding"}
GROUND_FLOOR |= {"command", "pictures", "preprocessors", "cards", "released", "schedulers", "lora_forms", "signals"}
GROUND_FLOOR |= {"clients", "copies", "paths"}
ROOMS = {"models", "weights", "controls", "samplers", "tuning"}
# Below each of these stand the ground floor, all rooms, and what is named here; nothing stands below what it stands on.
UPPER = {"pipeline": set(), "methods": {"pipeline"}, "testing": {"pipeline"}, "__init__": {"pipeline", "methods"}}
UPPER["__main__"] = set()  # the command, which runs what stands outside
COMPOSITES = {
    "vmix": {"lora"},
    "instantstyle_plus": {"controlnet", "ip_adapter"},
}  # methods that are made of others by their papers
TOP_LEVEL = {"LICENSE", "README.md", "configs", "infer", "jaxmix", "pyproject.toml", "scripts", "tests", "train"}
HEAVY = ("torch", "diffusers", "transformers", "grain", "orbax", "PIL", "tensorboardX", "jsonargparse", "tqdm")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Return every module that a file imports, anywhere in it, as absolute dotted names."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def place(module: str) -> str:
    """Return the room (or ground floor or roof module) of a dotted name inside jaxmix."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def named(paths: list[Path]) -> list:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


@pytest.mark.parametrize("path", named(sources("jaxmix")))
def test_a_module_imports_only_what_stands_below_it(path):
    here = path.relative_to(ROOT / "jaxmix").with_suffix("").parts[0]
    assert here in GROUND_FLOOR | ROOMS | set(UPPER), f"{path} is in no room that the house knows"
    allowed = GROUND_FLOOR | {here}
    if here in UPPER:
        allowed |= ROOMS | UPPER[here]
    elif here in GROUND_FLOOR:
        allowed = GROUND_FLOOR
    for module in imports(path):
        if module == "jaxmix" or module.startswith("jaxmix."):
            below = place(module)
            assert below in allowed, f"{path.relative_to(ROOT)} ({here}) imports {module}"


@pytest.mark.parametrize("path", named(sources("jaxmix/methods")))
def test_a_method_imports_no_other(path):
    mine = COMPOSITES.get(path.stem, set()) | {path.stem}
    for module in imports(path):
        if module.startswith("jaxmix.methods."):
            assert module.split(".")[2] in mine, f"{path.name} imports {module}"


def test_no_imports_go_in_a_circle():
    """Imports inside functions and for type checkers count as imports."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in
               sources("jaxmix", "infer", "train", "scripts")}  # fmt: skip
    needs = {}
    for name, path in modules.items():
        found = set()
        for module in imports(path):
            parts = module.split(".")
            longest = next((m for i in range(len(parts), 0, -1) if (m := ".".join(parts[:i])) in modules), None)
            if longest and longest != name:
                found.add(longest)
        needs[name] = found
    while free := {name for name, below in needs.items() if not below & set(needs)}:
        needs = {name: below for name, below in needs.items() if name not in free}
    assert not needs, f"circle among {sorted(needs)}"


@pytest.mark.parametrize("path", named(sources("jaxmix")))
def test_the_library_imports_no_application(path):
    for module in imports(path):
        assert module.split(".")[0] not in {"train", "infer", "tests"}, f"{path} imports {module}"


@pytest.mark.parametrize("path", named(sources("jaxmix", "train", "infer")))
def test_torch_is_imported_nowhere(path):
    for module in imports(path):
        assert module.split(".")[0] not in {"torch", "torchvision", "diffusers"}, f"{path} imports {module}"


@pytest.mark.parametrize("path", named(sources("jaxmix")))
def test_only_the_models_know_linen_and_samplers_know_no_flax(path):
    room = path.relative_to(ROOT / "jaxmix").parts[0]
    for module in imports(path):
        if room != "models":
            assert not module.startswith("flax.linen"), f"{path} imports {module}"
        if room == "samplers":
            assert module.split(".")[0] != "flax", f"{path} imports {module}"


@pytest.mark.parametrize("path", named(sources("jaxmix", "train", "infer", "scripts")))
def test_a_file_has_at_most_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_no_file_is_called_utils():
    assert not [path for path in sources("jaxmix", "train", "infer", "scripts", "tests") if "util" in path.stem]


def test_the_top_level_holds_what_the_design_names_and_nothing_else():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_importing_jaxmix_loads_no_heavy_package():
    code = f"import sys, jaxmix; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
