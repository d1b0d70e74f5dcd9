#!/usr/bin/env bash
# Times SD 1.5 at 512 px and SDXL at 1024 px in bfloat16, batch 1 and 8, on the GPU of this machine, in under ten minutes.
# Writes bench_gpu.json and bench_gpu.md into the folder given (here if none). Flags after it go to scripts.bench.
# PYTHON names the interpreter, which has jax with CUDA, torch with CUDA, and diffusers (0.39 for its Flax models).
set -euo pipefail
out=$(mkdir -p "${1:-.}" && cd "${1:-.}" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
"${PYTHON:-python}" -m scripts.bench --preset gpu --out "$out/bench_gpu.json" "${@:2}" | tee "$out/bench_gpu.md"
