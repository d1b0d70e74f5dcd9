"""Blend two models, or two prompts of one: MagicFusion (arXiv 2303.13126). The expert draws where it has more to say.

This is infer.generate for rows that all have an `expert_prompt`, or any rows with --expert.

Examples: python -m infer.fuse --expert FOLDER --prompt "a 3d render of a cat" --expert-prompt "pixel art of a cat"
          python -m infer.fuse --prompts rows.jsonl --mode 1 --switch 850      (rows with "expert_prompt")
"""

from infer.flags import Config
from infer.job import run_job
from jaxmix.command import run
from jaxmix.types import InputError


def main(config: Config) -> int:
    """Read the rows, load both models, draw."""
    if config.expert is None and config.expert_prompt is None and config.prompts is None:
        raise InputError("nothing to blend: expected --expert MODEL, --expert-prompt TEXT, or rows with one")
    return run_job(config, "fuse")


if __name__ == "__main__":
    run(main)
