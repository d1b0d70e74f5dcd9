# Sourced by the other scripts.

# Prints the first Python of 3.11 or newer that runs and can make environments. PYTHON wins.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
    # A name on the PATH is not enough: version managers leave names that do not run.
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer found (tried ${PYTHON:-python3.11 ... python}); name one with PYTHON=/path/to/python" >&2
  return 2
}

# find_python_of VERSION [CANDIDATE]: prints a Python of that version, from the PATH or from pyenv's folders.
find_python_of() {
  local candidate
  for candidate in ${2:-} "python$1" "$HOME"/.pyenv/versions/"$1".*/bin/python; do
    if "$candidate" -c "import sys, venv, ensurepip; sys.exit(not sys.version.startswith('$1.'))" >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  echo "Python $1: not found" >&2
  return 2
}

# quietly WHAT COMMAND...: runs a command without its chatter, but with a sign of life and all of an error.
quietly() {
  local what=$1 log seconds=0
  shift
  log=$(mktemp)
  "$@" >"$log" 2>&1 &
  local job=$!
  while kill -0 "$job" 2>/dev/null; do
    sleep 1
    seconds=$((seconds + 1))
    if [ $((seconds % 10)) -eq 0 ]; then
      echo "    ${seconds} s $(grep -oE '^ *(Collecting|Downloading|Installing|Building) [^ ]+' "$log" | tail -n 1)"
    fi
  done
  if ! wait "$job"; then
    cat "$log" >&2
    rm -f "$log"
    echo "error: $what failed" >&2
    return 1
  fi
  rm -f "$log"
  echo "    done in ${seconds} s"
}

# install_quietly PYTHON ARGUMENTS...: pip install.
install_quietly() {
  local python=$1
  shift
  quietly "pip install" "$python" -m pip install --disable-pip-version-check --no-compile --progress-bar off "$@"
}

# resolve_quietly PYTHON REPORT ARGUMENTS...: what pip would install into an empty environment, as JSON, with what
# builds this package.
resolve_quietly() {
  local python=$1 report=$2
  shift 2
  quietly "pip install --dry-run" "$python" -m pip install --disable-pip-version-check --progress-bar off \
    --dry-run --ignore-installed --report "$report" hatchling editables "$@"
}
