"""Draw prompts by a layout: DenseDiffusion (arXiv 2308.12964). Each phrase of a prompt gets a place in the image.

This is infer.generate for rows that all have `segments`.

Examples: python -m infer.dense --prompt "a 3d render of a cat left of a car" --out gallery
            --segments "a cat @ 0,0.2,0.5,1; a car @ 0.5,0.2,1,1"
          python -m infer.dense --prompts rows.jsonl --out gallery      (rows with "segments", see infer/README.md)
"""

from infer.flags import Config
from infer.job import run_job
from jaxmix.command import run


def main(config: Config) -> int:
    """Read the rows, load the model, draw each row by its layout."""
    return run_job(config, "dense")


if __name__ == "__main__":
    run(main)
