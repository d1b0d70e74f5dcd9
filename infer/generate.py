"""Draw images from prompts: rows in; PNGs, a manifest, a contact sheet and a gallery out.

A row is drawn by the methods whose fields it has, so a job may mix them, and so may a row.

Examples: python -m infer.generate --prompt "a 3d render of an apple by the sea" --out gallery
          python -m infer.generate --model FOLDER --prompts rows.jsonl --out gallery --steps 50 --seed 7
"""

from __future__ import annotations

from infer.flags import Config
from infer.job import run_job
from jaxmix.command import run


def main(config: Config) -> int:
    """Load the model and draw; return 0, or 2 if any row was bad."""
    return run_job(config)


if __name__ == "__main__":
    run(main)
