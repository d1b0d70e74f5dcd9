"""Draw sets of images in one style: StyleAligned (arXiv 2312.02133), or Visual Style Prompting with --swap.

This is infer.generate for rows that are all in groups; those without a `group` form one, or groups of --group-size.

Examples: python -m infer.style_aligned --prompts rows.txt --out gallery        (one set, in the style of the first)
          python -m infer.style_aligned --prompts rows.jsonl --steps 50         (sets by "group" of the rows)
          python -m infer.style_aligned --reference picture.png --reference-prompt "a cat" --prompts rows.txt
"""

from infer.flags import Config
from infer.job import run_job
from jaxmix.command import run


def main(config: Config) -> int:
    """Read the rows, load the model, draw the groups."""
    return run_job(config, "style_aligned")


if __name__ == "__main__":
    run(main)
