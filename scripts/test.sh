#!/usr/bin/env bash
# Installs what the tests need, in the versions that scripts/constraints names, and runs them: ruff, mypy, pytest.
# usage: scripts/test.sh [--no-parity] [--smoke | --flax | --newest | --lowest] [arguments of pytest, such as -k WORD]
#   --no-parity  without torch and diffusers (left out by itself on Python 3.12 and newer)
#   --smoke      no linters, and only the tests that touch what changes from one JAX to the next
#   --flax       no linters, and only the tests against diffusers' own Flax models, whose last release is another one
#   --newest     --smoke with the newest versions there are today, on the newest Python that can install them
#   --lowest     imports everything and draws with the lowest versions that pyproject.toml allows, on Python 3.11
#   PYTHON=...   the Python (3.11 or newer) to make the environment with
#   VENV=...     where the environment goes; default: .venv-test-MAJOR.MINOR
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/find_python.sh

parity=yes kind=all
while [ $# -gt 0 ]; do
  case $1 in
    --no-parity) parity=no ;;
    --smoke | --flax | --newest | --lowest) kind=${1#--} ;;
    *) break ;;
  esac
  shift
done

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# prepare VENV PYTHON EXTRAS [CONSTRAINTS]: makes the environment, unless it is there and nothing has changed.
prepare() {
  local venv=$1 python=$2 extras=$3 constraints=${4:-} stamp
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  stamp=$(echo "$extras" && cat pyproject.toml ${constraints:+"$constraints"})
  [ "$stamp" != "$(cat "$venv/.installed-test" 2>/dev/null)" ] || return 0
  echo "==> Python $(version_of "$venv/bin/python"): installing jaxmix-diffusion[$extras] into $venv"
  if [ -n "$constraints" ]; then
    # What builds the package is named in the constraints, too; an isolated build would take whatever is newest.
    install_quietly "$venv/bin/python" -c "$constraints" hatchling editables || return
    install_quietly "$venv/bin/python" -c "$constraints" --no-build-isolation -e ".[$extras]" || return
  else
    install_quietly "$venv/bin/python" --upgrade --upgrade-strategy eager -e ".[$extras]" || return
  fi
  echo "$stamp" >"$venv/.installed-test"
}

# More workers than four would compile the same programs at the same time instead of finding them in the cache.
pytest="pytest -q -n auto --maxprocesses 4 --dist worksteal --durations 20 --durations-min 5"
smoke="tests/laws tests/sharding tests/tuning tests/parity/test_fixtures.py tests/smoke/test_generate_pipeline.py tests/test_house.py tests/test_installed.py"

if [ $kind = newest ]; then
  for minor in 16 15 14 13 12 11; do
    python=$(find_python_of 3.$minor 2>/dev/null) || continue
    venv=${VENV:-.venv-test-newest-3.$minor}
    rm -f "$venv/.installed-test"  # what is newest changes without a change here
    prepare "$venv" "$python" dev && break
    echo "==> Python 3.$minor: cannot install the newest versions, trying an older Python"
    venv=
  done
  [ -n "${venv:-}" ] || { echo "error: found no Python from 3.11 on that installs the newest versions" >&2; exit 1; }
  echo "==> Python 3.$minor, newest: $("$venv/bin/python" -m pip list --format freeze | grep -E '^(jax|flax|optax|orbax-checkpoint|numpy|transformers|grain|jsonargparse)==' | tr '\n' ' ')"
  [ $# -gt 0 ] || set -- $smoke
  exec "$venv/bin/python" -m $pytest -m "not slow" "$@"
fi

if [ $kind = lowest ]; then
  python=${PYTHON:-$(find_python_of 3.11)}
  venv=${VENV:-.venv-test-lowest}
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  # pip has no such mode. uv resolves, pip installs: the versions of the dependencies that pyproject.toml names are the
  # lowest, of all others the newest that go with them.
  install_quietly "$venv/bin/python" uv
  "$venv/bin/python" -m uv pip compile -q --resolution lowest-direct --python-version "$(version_of "$python")" \
    pyproject.toml -o "$venv/lowest.txt"
  echo "==> lowest: $(grep -E '^[a-z0-9_.-]+(\[[a-z,]+\])?==' "$venv/lowest.txt" | wc -l) packages resolved, in $venv/lowest.txt"
  sed -i -E 's/^([A-Za-z0-9_.-]+)\[[^]]*\]==/\1==/' "$venv/lowest.txt"  # a constraint names no extras
  install_quietly "$venv/bin/python" -c "$venv/lowest.txt" -e ".[dev]"
  [ $# -gt 0 ] || set -- tests/test_installed.py
  JAXMIX_LOWEST=1 exec "$venv/bin/python" -m pytest -q "$@"
fi

python=$(find_python)
version=$(version_of "$python")
[ "$version" = 3.11 ] || parity=no  # the pinned torch oracle has been checked there
extras=dev name=$version
[ $parity = no ] || extras=dev,parity
if [ $kind = flax ]; then
  extras=dev,diffusers name=flax-$version
fi
constraints=scripts/constraints/$version.txt
[ "$name" != flax-3.11 ] || constraints=scripts/constraints/3.11-flax.txt
if [ ! -f "$constraints" ]; then
  constraints=scripts/constraints/3.12.txt
  echo "==> Python $version: no versions of its own in scripts/constraints, taking those of 3.12"
fi
venv=${VENV:-.venv-test-$name}
prepare "$venv" "$python" "$extras" "$constraints"
run="$venv/bin/python -m"

if [ $kind = flax ]; then
  echo "==> Python $version: diffusers with Flax"
  [ $# -gt 0 ] || set -- tests/flax
  exec $run pytest -q "$@"
fi
if [ $kind = smoke ]; then
  echo "==> Python $version: smoke"
  [ $# -gt 0 ] || set -- $smoke
  exec $run $pytest -m "not slow" "$@"
fi
echo "==> Python $version: ruff"
$run ruff check .
$run ruff format --check .
# Mypy has one thread, and pytest's workers leave gaps.
log=$(mktemp) status=0
$run mypy >"$log" 2>&1 &
mypy=$!
trap 'kill $mypy 2>/dev/null || true; rm -f "$log"' EXIT
echo "==> pytest, and mypy beside it"
$run $pytest "$@" || status=$?
echo "==> mypy"
wait $mypy || status=$?
cat "$log"
exit $status
