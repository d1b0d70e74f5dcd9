#!/usr/bin/env bash
# Writes scripts/constraints/*.txt: the version of every package in each environment that scripts/test.sh makes, as pip
# resolves them today. Nothing is installed. Run it to take newer versions, run all tests, and commit what it wrote.
# usage: scripts/lock.sh [NAME ...]      NAME: 3.11, 3.11-flax, 3.12; default: all
#   PYTHON_311=... PYTHON_312=...  the Pythons to resolve for
# pip and not `uv pip compile`: torch must come from where pip is told to find it, or a CUDA build is resolved.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/find_python.sh

# lock NAME PYTHON EXTRAS
lock() {
  local file=scripts/constraints/$1.txt report
  report=$(mktemp)
  echo "==> $file"
  resolve_quietly "$2" "$report" -e ".[$3]"
  "$2" - "$report" "$file" "$3" <<'PY'
import json, re, sys

report, file, extras = sys.argv[1:]
found = json.load(open(report))
names = {}
for item in found["install"]:
    meta = item["metadata"]
    # A local version (2.13.0+cpu) is one build of a release; another machine may have another build.
    names[re.sub(r"[-_.]+", "-", meta["name"]).lower()] = meta["version"].split("+")[0]
names.pop("jaxmix-diffusion")
python = ".".join(found["environment"]["python_full_version"].split(".")[:2])
with open(file, "w") as out:
    out.write(f"# Written by scripts/lock.sh for jaxmix-diffusion[{extras}] on Python {python}, {found['environment']['sys_platform']}.\n")
    out.writelines(f"{name}=={version}\n" for name, version in sorted(names.items()))
print(f"    {len(names)} packages")
PY
  rm -f "$report"
}

[ $# -gt 0 ] || set -- 3.11 3.11-flax 3.12
for name in "$@"; do
  case $name in
    3.11) lock 3.11 "$(PYTHON=${PYTHON_311:-python3.11} find_python)" dev,parity ;;
    3.11-flax) lock 3.11-flax "$(PYTHON=${PYTHON_311:-python3.11} find_python)" dev,diffusers ;;
    3.12) lock 3.12 "$(find_python_of 3.12 "${PYTHON_312:-}")" dev ;;
    *) echo "error: found $name, expected 3.11, 3.11-flax or 3.12" >&2 && exit 2 ;;
  esac
done
