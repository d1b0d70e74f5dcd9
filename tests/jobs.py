"""What tests below `Pipeline.draw` share: one prediction, the plainest job of the sampler, a run that was killed."""

import dataclasses
import functools
import re
import shutil
from pathlib import Path

import jax

from jaxmix import Guidance, Method, dataclass
from jaxmix.pipeline.job import Denoiser, Job
from jaxmix.rows import Text, tile
from jaxmix.samplers import ClassifierFree

TWO_STEPS = {
    "train_batch_size": 4,
    "devices": 1,
    "max_train_steps": 2,
    "checkpointing_steps": 1,
    "lr_warmup_steps": 0,
    "lr_cooldown_steps": 0,
    "log_steps": 1,
}
"""The keys of a trainer that make a run of two steps, each saved."""


@functools.partial(jax.jit, static_argnames=("unet", "mutable"))
def predict(unet, params, x, t, context, controls=(), extra=None, mutable=False):
    """Return what a UNet predicts, and what it records if told to.

    Compiled: op by op, JAX would compile hundreds of small programs, which takes several times as long.
    """
    return unet.apply({"params": params}, x, t, context, controls, extra, mutable=mutable)


def plain_job(unet, params, noise, context, scale, controls=(), guidance=()):
    """Return the job of guided images (n, h, w, c) from text states (n, branches, s, d)."""
    n = noise.shape[0]
    return Job(
        noise, Denoiser(unet, params, Text(context), tile(tuple(controls), n)), (ClassifierFree(scale), *guidance)
    )


@dataclass
class _Unconditional(Guidance):
    def __call__(self, model, solver, hw):
        both = model.branches((0, 1), hw)
        return lambda x, t, step: both(x, t, step)[:, 0]


class Unconditional(Method):
    """Draw by the unconditional branch alone, which what acts on the prompt must leave as it is."""

    def apply(self, pipe, request):
        return request.add(guidance=(_Unconditional(),))


def unmarked(name):
    """Return the name of a picture without what stands in it for its settings: 0001_seed7.png."""
    return re.sub(r"(?<=\d)_[0-9a-f]{8}(?=[._])", "", name)


def only(folder, name):
    """Return the one picture of a folder that is called so, `unmarked`."""
    (path,) = (path for path in folder.glob("*.png") if unmarked(path.name) == name)
    return path


def with_context(pipe, request, context):
    """Return a request whose conditional branches are told ``context`` (n, s, d) in place of their prompts' states."""
    states = request.checked(pipe).states(pipe)
    spliced = dataclasses.replace(states, context=states.context.at[:, 1].set(context))
    return dataclasses.replace(request, text=spliced)


def killed_after(step: int, whole: Path, parts: Path, exported: str) -> None:
    """Copy a run's folder as it was once ``step`` was saved, without what it ``exported`` at its end."""

    def later(folder: str, names: list[str]) -> set[str]:
        inside = Path(folder).name == "checkpoints"
        return {name for name in names if name == exported or (inside and name.isdigit() and int(name) > step)}

    shutil.copytree(whole, parts, ignore=later)
    assert (parts / "checkpoints" / str(step)).is_dir() and not (parts / exported).exists()
