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

# install_quietly PYTHON ARGUMENTS...: pip install without the chatter, but with a sign of life and all of an error.
install_quietly() {
  local python=$1 log seconds=0
  shift
  log=$(mktemp)
  "$python" -m pip install --disable-pip-version-check --no-compile --progress-bar off "$@" >"$log" 2>&1 &
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
    echo "error: pip install failed" >&2
    return 1
  fi
  rm -f "$log"
  echo "    done in ${seconds} s"
}
