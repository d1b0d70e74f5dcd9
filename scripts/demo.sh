#!/usr/bin/env bash
# Draws the gallery of built-in prompts with the embedded model, from a fresh clone.
# usage: scripts/demo.sh [flags of infer.generate]
#   PYTHON=...  the Python (3.11 or newer) to make the environment with; default: the first one found
#   EXTRAS=...  what else to install: cuda on an NVIDIA GPU, tpu on a Cloud TPU VM
#   VENV=...    where the environment goes; default: .venv
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/find_python.sh

venv=${VENV:-.venv}
if [ ! -x "$venv/bin/python" ]; then
  python=$(find_python)
  echo "==> making $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi
# Installing again is needed only when what is to be installed has changed.
for extra in $(echo "${EXTRAS:-}" | tr ',' ' '); do
  # pip would only warn, and the demo would run without what was asked for.
  grep -q "^$extra = \[" pyproject.toml || { echo "error: EXTRAS: found $extra, expected cuda, tpu, or another extra of pyproject.toml" >&2; exit 2; }
done
stamp=$(echo "${EXTRAS:-}" && cat pyproject.toml)
if [ "$stamp" != "$(cat "$venv/.installed-demo" 2>/dev/null)" ]; then
  package=.${EXTRAS:+[$EXTRAS]}
  echo "==> installing jaxmix-diffusion${EXTRAS:+[$EXTRAS]} and what it needs (about 1 GB on disk, a few minutes)"
  install_quietly "$venv/bin/python" -e "$package"
  echo "$stamp" >"$venv/.installed-demo"
fi
echo "==> drawing"
"$venv/bin/python" -m infer.generate --model mini --out gallery --resume "$@"
echo
echo "==> look at $PWD/gallery/gallery.html in a browser, or at $PWD/gallery/contact_sheet.png"
