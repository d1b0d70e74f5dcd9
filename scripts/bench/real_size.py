"""Run one UNet forward pass at the released size, with random weights: Stable Diffusion 1.5 against torch, or SDXL.

sd15 builds the model in torch diffusers, saves it, loads the file here, and prints the largest relative error and the
seconds of both. sdxl makes bfloat16 weights leaf by leaf and prints seconds and memory. Each engine runs in its own
process, so that its peak memory can be told apart. Nothing is downloaded.

    python -m scripts.bench.real_size sd15
    python -m scripts.bench.real_size sdxl --dtype bfloat16
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxmix import command
from jaxmix.models import AddedCond, UNet2DConditionModel, UNetConfig
from jaxmix.released import RELEASED
from jaxmix.testing import quick_params
from jaxmix.types import InputError
from jaxmix.weights import load_tree

RUNS = 3  # timed, after the first call
CONFIGS = {name: UNetConfig.from_dict(RELEASED[name]["unet"]) for name in ("sd15", "sdxl")}


@dataclasses.dataclass
class Config:
    """What to run.

    Attributes:
        model: sd15 (against torch) or sdxl (alone).
        latents: side of the square latents in cells of 8 pixels; the model's own size if null.
        dtype: of our weights and computation; torch runs in float32. float32 for sd15 and bfloat16 for sdxl if null.
    """

    model: Literal["sd15", "sdxl"]
    latents: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None


@dataclasses.dataclass
class Measured:
    """The result of one engine: output NHWC, seconds of the first call and of a later one, peak resident GiB."""

    output: np.ndarray
    first: float
    median: float
    peak: float

    def line(self, name: str) -> str:
        return f"{name}: {self.median:.2f} s per forward pass, first call {self.first:.1f} s, peak {self.peak:.1f} GiB"


def inputs(cfg: UNetConfig, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, AddedCond | None]:
    """Return latents (1, side, side, 4), timestep (1,), context (1, 77, d) and SDXL's added conditioning."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, side, side, cfg.in_channels), np.float32)
    context = rng.standard_normal((1, 77, cfg.cross_attention_dim), np.float32)
    added = None
    if cfg.addition_embed_type:
        numbers = np.asarray([[8 * side, 8 * side, 0, 0, 8 * side, 8 * side]], np.float32)
        added = AddedCond(rng.standard_normal((1, 1280), np.float32), numbers)
    return x, np.asarray([500], np.int32), context, added


def measure(run: Callable[[], np.ndarray]) -> Measured:
    """Time a forward pass, the first call separately."""
    seconds = []
    for _ in range(1 + RUNS):
        start = time.perf_counter()
        output = run()
        seconds.append(time.perf_counter() - start)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return Measured(output, seconds[0], statistics.median(seconds[1:]), peak)


def run_torch(side: int, folder: str) -> Measured:
    """Build Stable Diffusion 1.5's UNet in torch, save it, run it in float32."""
    import diffusers
    import torch

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(cross_attention_dim=768).eval()
    unet.save_pretrained(folder)
    x, t, context, _ = inputs(CONFIGS["sd15"], side)
    args = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(t), torch.from_numpy(context)

    def run() -> np.ndarray:
        with torch.inference_mode():
            return unet(*args).sample.numpy().transpose(0, 2, 3, 1)

    return measure(run)


def run_ours(model: str, side: int, dtype: str, folder: str | None) -> Measured:
    """Run our UNet with the weights in a folder, or random ones."""
    kind = jnp.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    unet = UNet2DConditionModel(CONFIGS[model], kind)
    target = unet.abstract_params()
    params = load_tree(folder, target, kind) if folder else quick_params(target, 1, kind)
    forward = jax.jit(lambda params, x, t, context, added: unet.apply({"params": params}, x, t, context, (), added))
    args = jax.device_put(inputs(CONFIGS[model], side))
    return measure(lambda: np.asarray(forward(params, *args)))


def main(cfg: Config) -> int:
    """Run the engines one after another and print their seconds and memory."""
    side = cfg.latents or CONFIGS[cfg.model].sample_size
    dtype = cfg.dtype or {"sd15": "float32", "sdxl": "bfloat16"}[cfg.model]
    assert isinstance(side, int)
    if side < 1:
        raise InputError(f"latents: found {side}, expected a positive number of cells")
    print(f"{cfg.model}: latents {side}x{side}, batch 1, {os.cpu_count()} CPU cores", flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool,
    ):
        theirs = None
        if cfg.model == "sd15":
            theirs = pool.submit(run_torch, side, folder).result()
            print(theirs.line("torch float32"), flush=True)
        ours = pool.submit(run_ours, cfg.model, side, dtype, folder if theirs else None).result()
    spread = f"output {ours.output.shape}, standard deviation {ours.output.std():.3g}"
    print(f"{ours.line(f'jaxmix {dtype}')}; {spread}")
    if theirs is not None:
        error = float(np.abs(ours.output - theirs.output).max() / np.abs(theirs.output).max())
        print(f"largest error: {error:.1e} of the largest output")
        print(f"seconds of jaxmix / torch: {ours.median / theirs.median:.2f}")
    if not np.isfinite(ours.output).all():
        print("error: the output is not finite", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model", *arguments]
    command.run(main, arguments)
