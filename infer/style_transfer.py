"""Give pictures the style of others: StyleID (arXiv 2312.09008). Every content with every style, no prompt.

This is infer.generate for rows that all have `content` and `style`.

Examples: python -m infer.style_transfer --content photos/ --style paintings/ --out gallery
          python -m infer.style_transfer --prompts rows.jsonl      (rows with "content" and "style" instead of a prompt)
"""

import dataclasses

from infer.flags import Config as Plain
from infer.job import run_job
from jaxmix.command import run


@dataclasses.dataclass(frozen=True)
class Config(Plain):
    """What to restyle, how, and where; the flags of infer.generate, of which prompts and guidance have no effect here.

    Attributes:
        adain: StyleID: whether the start noise takes the mean and standard deviation of the style's noise
    """

    adain: bool = True


def main(config: Config) -> int:
    """Read the rows, load the model, invert the pictures, draw every pair."""
    return run_job(config, "style_transfer")


if __name__ == "__main__":
    run(main)
