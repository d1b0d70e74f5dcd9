"""Blend two models, or two prompts of one: MagicFusion (arXiv 2303.13126). The expert draws where it has more to say.

Examples: python -m infer.fuse --expert FOLDER --prompt "a 3d render of a cat" --expert-prompt "pixel art of a cat"
          python -m infer.fuse --prompts rows.jsonl --mode 1 --switch 850      (rows with "expert_prompt")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from infer.generate import Config as Plain
from infer.generate import job
from infer.method import Method
from infer.rows import Field, Row, check_number, check_text
from jaxmix.command import run
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Config(Plain):
    """What to draw with which two models, and where to; the flags of infer.generate, and these.

    Attributes:
        model: the general model, as for infer.generate; prompt and controls are its own
        expert: the second model, of the same latents and noise schedule; default: the same one, with another prompt
        expert_prompt: the expert's prompt, for rows that name none; default: the row's own
        mode: 1 blends once the timestep has come down to --switch, 2 blends above it and runs the general model after
        switch: the timestep of the change, 0 to 999
        k_general: inverse temperature of the general model's saliency; a larger one shrinks its area (no unit)
        k_expert: that of the expert's (no unit)
        fuse_strength: 0 is the general model alone (no unit)
        own_uncond: take the expert's saliency against its own unconditional prediction, as the paper has it
        own_text: encode the expert's prompt with the expert's text encoder
    """

    expert: str | None = None
    expert_prompt: str | None = None
    mode: Literal[1, 2] = 2
    switch: float = 600
    k_general: float = 1.0
    k_expert: float = 1.0
    fuse_strength: float = 1.0
    own_uncond: bool = False
    own_text: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, value in (
            ("--switch", self.switch),
            ("--k-general", self.k_general),
            ("--k-expert", self.k_expert),
            ("--fuse-strength", self.fuse_strength),
        ):
            if check_number(flag, value) < 0:
                raise InputError(f"{flag}: expected a number >= 0, found {value:g}")
        if self.expert is None and self.expert_prompt is None and self.prompts is None:
            raise InputError("nothing to blend: expected --expert MODEL, --expert-prompt TEXT, or rows with one")


class Fuse(Method):
    """Rows with a prompt for each of two models."""

    needs_rows = "no rows: expected --prompt, or --prompts FILE"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.expert: Any = None
        numbers = ("k_general", "k_expert", "fuse_strength")
        self.fields = {"expert_prompt": Field(check_text, config.expert_prompt)} | {
            name: Field(check_number, getattr(config, name)) for name in numbers
        }

    def open(self, pipe: Any) -> None:
        """Load the expert."""
        import jaxmix
        from jaxmix.methods.magic_fusion import fits

        if self.config.expert is not None:
            self.expert = jaxmix.load(self.config.expert, dtype=self.config.dtype)
            fits(pipe, self.expert)

    def settings(self) -> dict[str, Any]:
        """Return the flags that no row can change."""
        names = ("expert", "mode", "switch", "own_uncond", "own_text")
        return {"method": "fuse"} | {name: getattr(self.config, name) for name in names}

    def complete(self, row: Row, pipe: Any) -> Row:
        """Refuse a row with nothing to blend, or whose switch is out of range."""
        if row["expert_prompt"] is None and self.expert is None:
            raise InputError("no field 'expert_prompt', expected one where both models are the same")
        most = pipe.schedule.num_train_timesteps - 1
        if self.config.switch > most:
            raise InputError(f"--switch: expected a timestep from 0 to {most}, found {self.config.switch:g}")
        if row.guidance_rescale:
            raise InputError("guidance_rescale: expected 0, blending has its own guidance")
        return row

    def draw(self, pipe: Any, rows: Sequence[Row], arguments: dict[str, Any]) -> np.ndarray:
        """Draw rows with both models."""
        from jaxmix import MagicFusion

        fusion = MagicFusion(
            [row["expert_prompt"] or row.prompt for row in rows],
            self.expert,
            mode=self.config.mode,
            switch=self.config.switch,
            k_general=[row["k_general"] for row in rows],
            k_expert=[row["k_expert"] for row in rows],
            strength=[row["fuse_strength"] for row in rows],
            own_text=self.config.own_text,
            own_uncond=self.config.own_uncond,
        )
        return pipe.generate([row.prompt for row in rows], fusion=fusion, **arguments)

    def shown(self, row: Row) -> dict[str, str]:
        """Say the expert's prompt and the temperatures."""
        return {"expert": row["expert_prompt"] or row.prompt, "k": f"{row['k_general']:g}, {row['k_expert']:g}"}


def main(config: Config) -> int:
    """Read the rows, load both models, draw."""
    return job(config, Fuse(config))


if __name__ == "__main__":
    run(main)
