"""Give pictures the style of others: StyleID (arXiv 2312.09008). Every content with every style, no prompt.

This is infer.generate for rows that all have `content` and `style`. With --transfer instantstyle_plus
(InstantStyle-Plus, arXiv 2407.00788) the prompt is a caption of the content: of the row, of --prompt, or in a .txt
beside the content.

Examples: python -m infer.style_transfer --content photos/ --style paintings/ --out gallery
          python -m infer.style_transfer --prompts rows.jsonl      (rows with "content" and "style" instead of a prompt)
          python -m infer.style_transfer --transfer instantstyle_plus --content photo.png --style painting.png
            --prompt "a cat on a sofa" --style-ip mini-ip --content-ip mini-ip --tile-net mini-tile --tile-map tile:8
"""

import dataclasses

from infer.flags import Config as Plain
from infer.job import run_job
from jaxmix.command import run


@dataclasses.dataclass(frozen=True)
class Config(Plain):
    """What to restyle, how, and where; the flags of infer.generate. StyleID has no use for prompts and guidance.

    Attributes:
        adain: StyleID: whether the start noise takes the mean and standard deviation of the style's noise
    """

    adain: bool = True


def main(config: Config) -> int:
    """Read the rows, load the model, invert the pictures, draw every pair."""
    return run_job(config, "style_transfer")


if __name__ == "__main__":
    run(main)
