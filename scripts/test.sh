#!/usr/bin/env bash
# Installs what the tests need and runs them: ruff, mypy, pytest.
# usage: scripts/test.sh [--no-parity] [--smoke | --flax] [arguments of pytest, such as -k WORD, or -n 0 for one process]
#   --no-parity  without torch and diffusers (left out by itself on Python 3.12 and newer)
#   --smoke      no linters, and only the tests that touch what changes from one JAX to the next
#   --flax       no linters, and only the tests against diffusers' own Flax models, whose last release is another one
#   PYTHON=...   the Python (3.11 or newer) to make the environment with
#   VENV=...     where the environment goes; default: .venv-test-MAJOR.MINOR
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/find_python.sh

parity=yes smoke=no flax=no
while [ $# -gt 0 ]; do
  case $1 in
    --no-parity) parity=no ;;
    --smoke) smoke=yes ;;
    --flax) flax=yes ;;
    *) break ;;
  esac
  shift
done

python=$(find_python)
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$version" = 3.11 ] || parity=no  # the pinned torch oracle has been checked there
extras=dev
[ $parity = no ] || extras=dev,parity
name=$version
if [ $flax = yes ]; then
  extras=dev,diffusers name=flax-$version
fi
venv=${VENV:-.venv-test-$name}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
if ! { echo "$extras" && cat pyproject.toml; } | cmp -s - "$venv/.installed-test"; then
  echo "==> Python $version: installing jaxmix-diffusion[$extras] into $venv"
  install_quietly "$venv/bin/python" -e ".[$extras]"
  { echo "$extras" && cat pyproject.toml; } >"$venv/.installed-test"
fi
run="$venv/bin/python -m"
# Compiling leaves a core idle now and then, and the memory maps of all programs are too many for one process.
pytest="pytest -q -n auto --maxprocesses 4 --dist worksteal"

if [ $flax = yes ]; then
  echo "==> Python $version: diffusers with Flax"
  [ $# -gt 0 ] || set -- tests/flax
  exec $run pytest -q "$@"
fi
if [ $smoke = yes ]; then
  echo "==> Python $version: smoke"
  [ $# -gt 0 ] || set -- tests/laws tests/sharding tests/tuning tests/parity/test_fixtures.py tests/smoke/test_generate_pipeline.py tests/test_house.py
  exec $run $pytest -m "not slow" "$@"
fi
echo "==> Python $version: ruff"
$run ruff check .
$run ruff format --check .
echo "==> mypy"
$run mypy
echo "==> pytest"
exec $run $pytest "$@"
