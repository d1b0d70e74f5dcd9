"""The command `jaxmix`: the tools of `infer` and `train` by name.

`jaxmix generate ...` is `python -m infer.generate ...`, `jaxmix train vmix ...` is `python -m train.vmix ...`. The
tools lie beside this package in a checkout, and inside of it, in `jaxmix/tools`, where it is installed from a wheel.
"""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxmix import command

HERE = Path(__file__).resolve().parent


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool that the first words name, which exits by itself; return the status if there is none to run."""
    words = list(sys.argv[1:] if argv is None else argv)
    folder = tools()
    if folder is None:
        print(f"error: found no folder infer beside {HERE} or in it, expected a checkout or a wheel", file=sys.stderr)
        return 2
    known = commands(folder)
    asked = ("-h", "--help", "help")
    if not words or words[0] in asked or (words[0] == "train" and (len(words) == 1 or words[1] in asked)):
        print(usage(folder, known))
        return 0
    if words[0] == "--version":
        print(command.version())
        return 0
    name = words.pop(0)
    if name == "train" and words:
        name = f"train {words.pop(0)}"
    module = known.get(name.replace("_", "-"))
    if module is None:
        print(f"error: unknown command '{name}'{command.near_misses(name, known)}", file=sys.stderr)
        return 2
    command.PROGRAM[:] = ["jaxmix", *name.split()]
    sys.path.insert(0, str(folder))
    sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def tools() -> Path | None:
    """Return the folder with `infer` and `train`: that of the checkout, or the one in the wheel; None without one."""
    places = (HERE.parent, HERE / "tools")
    return next((place for place in places if (place / "infer" / "generate.py").is_file()), None)


def commands(folder: Path) -> dict[str, str]:
    """Return the name of each command with its module: the modules of `infer` and `train` that can be run."""
    found = {}
    for package, prefix in (("infer", ""), ("train", "train ")):
        for path in sorted((folder / package).glob("*.py")):
            if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"):
                found[prefix + path.stem.replace("_", "-")] = f"{package}.{path.stem}"
    return found


def usage(folder: Path, known: dict[str, str]) -> str:
    """Return the list of commands with a line about each."""
    width = max(map(len, known))
    lines = ["usage: jaxmix COMMAND [FLAGS], see jaxmix COMMAND --help", ""]
    for name, module in known.items():
        text = (folder / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        about = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
        lines.append(f"  {name:{width}}  {about}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
