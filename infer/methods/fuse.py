"""MagicFusion (arXiv 2303.13126) in a job: two models, or two prompts of one, and which draws where."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from infer.checks import check_number, check_text
from infer.methods.method import BatchRows, Method
from infer.methods.method import Flags as Base
from infer.rows import Field, Row
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Flags(Base):
    """The expert, and how it is blended with the general model, which is --model.

    Attributes:
        expert: MagicFusion: a second model with the same latents and noise schedule, for all rows; default: the same
            model, with another prompt
        expert_prompt: MagicFusion: the expert's prompt; default with --expert: the row's own
        mode: MagicFusion: 1 blends once the timestep has come down to --switch, 2 blends above it and runs the general
            model after
        switch: MagicFusion: the timestep of the change, 0 to 999
        k_general: MagicFusion: inverse temperature of the general model's saliency; a larger one shrinks its area (no
            unit)
        k_expert: MagicFusion: the same for the expert (no unit)
        fuse_strength: MagicFusion: 0 is the general model alone (no unit)
        own_uncond: MagicFusion: take the expert's saliency against its own unconditional prediction, as in the paper
        own_text: MagicFusion: encode the expert's prompt with the expert's text encoder
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
        """Refuse numbers below 0."""
        super().__post_init__()
        for flag, value in (
            ("--switch", self.switch),
            ("--k-general", self.k_general),
            ("--k-expert", self.k_expert),
            ("--fuse-strength", self.fuse_strength),
        ):
            if check_number(flag, value) < 0:
                raise InputError(f"{flag}: found {value:g}, expected a number >= 0")

    def method(self) -> Method:
        """Return the method under these flags."""
        return Fuse(self)


class Fuse(Method):
    """Rows with a prompt for each of two models."""

    name = "fuse"
    switches = ("expert_prompt",)
    needs_rows = (
        "no rows, or nothing to blend: expected --prompt with --expert MODEL or --expert-prompt TEXT, or --prompts FILE"
    )

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        self.expert: Any = None
        numbers = ("k_general", "k_expert", "fuse_strength")
        self.fields = {"expert_prompt": Field(check_text, flags.expert_prompt)} | {
            name: Field(check_number, getattr(flags, name)) for name in numbers
        }

    def on(self, row: Row) -> bool:
        """Return whether a row is blended: with a second model all are, except those that reconstruct --reference."""
        return super().on(row) or (self.flags.expert is not None and row.where != "--reference")

    def open(self, pipe: Any) -> None:
        """Load the expert."""
        import jaxmix
        from jaxmix.methods.magic_fusion import fits

        if self.flags.expert is not None:
            self.expert = jaxmix.load(self.flags.expert, dtype=self.flags.dtype)  # type: ignore[attr-defined]
            fits(pipe, self.expert)

    def missing(self) -> InputError:
        """Ask for a second prompt if both models are the same."""
        return InputError("no field 'expert_prompt', expected one where both models are the same")

    def settings(self, row: Row) -> dict[str, Any]:
        """Return the flags that no row can change."""
        names = ("expert", "mode", "switch", "own_uncond", "own_text")
        return {name: getattr(self.flags, name) for name in names}

    def complete(self, row: Row, pipe: Any) -> Row:
        """Refuse a switch that is out of range, and the one field that does not work with blending."""
        most = pipe.schedule.num_train_timesteps - 1
        if self.flags.switch > most:
            raise InputError(f"--switch: found {self.flags.switch:g}, expected a timestep from 0 to {most}")
        if row.guidance_rescale:
            raise InputError(
                f"guidance_rescale: found {row.guidance_rescale:g} with {self.said(row)} (fuse), expected 0: blending "
                "has its own guidance"
            )
        return row

    def further_prompts(self, row: Row) -> Sequence[str]:
        """Return the expert's prompt."""
        return [row["expert_prompt"] or row.texts[0]]

    def said(self, row: Row) -> str:
        """Return what switched the method on."""
        return "--expert" if row["expert_prompt"] is None else "expert_prompt"

    def build(self, pipe: Any, batch: BatchRows) -> Sequence[Any]:
        """Return the blend of each row."""
        import jaxmix

        return [
            jaxmix.MagicFusion(
                [row["expert_prompt"] or row.texts[0] for row in batch.rows],
                self.expert,
                mode=self.flags.mode,
                switch=self.flags.switch,
                k_general=[row["k_general"] for row in batch.rows],
                k_expert=[row["k_expert"] for row in batch.rows],
                strength=[row["fuse_strength"] if self.on(row) else 0.0 for row in batch.rows],
                own_text=self.flags.own_text,
                own_uncond=self.flags.own_uncond,
            )
        ]

    def shown(self, row: Row) -> dict[str, str]:
        """Show the expert's prompt and the temperatures."""
        return {"expert": row["expert_prompt"] or row.texts[0], "k": f"{row['k_general']:g}, {row['k_expert']:g}"}
