"""One program, compiled in a process of its own: what it leaves behind, and what kills it, is nobody else's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What libtpu would otherwise ask of a machine that has no TPU.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process that compiles is refused, whatever it compiles for
}


def answer(module: str, order: dict[str, Any], effort: float | None, timeout: float) -> dict[str, Any]:
    """Run ``python -m module --one ORDER`` and return the JSON object that it prints, or why there is none as "reason".

    `effort` is XLA's for a TPU, None for this machine; `timeout` is in seconds.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    if effort is not None:
        environment |= NO_TPU | {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": str(effort)}
    arguments = [sys.executable, "-m", module, "--one", json.dumps(order)]
    try:
        done = subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"reason": f"stopped after {timeout:.0f} s"}
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not answers:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        # The line that names the exception; what follows it may be advice.
        named = [line for line in lines if "Error" in line.split(":", 1)[0]]
        return {"reason": (named or lines)[-1][:300]}
    return json.loads(answers[-1])
