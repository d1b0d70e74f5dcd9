"""Our programs that are timed and measured: the UNet, the sampler and the decoder.

A program is a function of (params, inputs) with abstract arguments, so it can be compiled without any weights, for this
machine or another; `materialize` makes real arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmix.sharding import replicated, rows_over
from jaxmix.testing import quick_params
from jaxmix.tuning.flops import model_flops
from scripts.bench.rows import BenchRow, added_width, configs

GUIDANCE = 7.5
_CONSTANTS = {"t": 500, "time_ids": 512.0, "scale": GUIDANCE, "present": 1.0}  # inputs that are not noise


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and the shapes of its arguments; `shared` names the inputs that are not one for each row."""

    fn: Callable[..., jax.Array]
    params: Any  # tree of ShapeDtypeStruct
    inputs: dict[str, jax.ShapeDtypeStruct]
    shared: frozenset[str] = frozenset({"t", "strength"})

    def trace(self, sharding: Any = None) -> Any:
        """Trace under jit; ``sharding`` places every argument."""

        def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return x if sharding is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.jit(self.fn).trace(*jax.tree.map(place, (self.params, self.inputs)))

    def trace_over(self, mesh: Mesh) -> Any:
        """Trace under jit for the devices of a mesh, over which the rows are split."""
        whole, rows = replicated(mesh), rows_over(mesh)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), self.params)
        inputs = {
            k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole if k in self.shared else rows)
            for k, x in self.inputs.items()
        }
        return jax.jit(self.fn).trace(params, inputs)

    def flops(self) -> float:
        """Return the FLOPs of the program's products and convolutions, counted before it is compiled."""
        return model_flops(jax.make_jaxpr(self.fn)(self.params, self.inputs))


def unet_of(row: BenchRow) -> Any:
    """Return the UNet module of a row, in the row's dtype."""
    from jaxmix.models import UNet2DConditionModel, UNetConfig

    return UNet2DConditionModel(UNetConfig.from_dict(configs(row.model, row.tiny)["unet"]), jnp.dtype(row.dtype))


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def inputs_of(row: BenchRow, found: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the inputs' shapes, NHWC, rows branch minor: a `unet` step sees two rows per image, for guidance."""
    unet, n, side = found["unet"], row.batch, row.latents
    rows = 1 if row.task == "decode" else 2
    dtype = jnp.dtype(row.dtype)
    channels = found["vae"]["latent_channels"] if row.task == "decode" else unet["in_channels"]
    x_rows = 2 * n if row.task == "unet" else n
    out = {"latents": jax.ShapeDtypeStruct((x_rows, side, side, channels), jnp.float32)}
    if row.task == "decode":
        return out
    out["context"] = jax.ShapeDtypeStruct((n * rows, found["text_length"], unet["cross_attention_dim"]), dtype)
    if width := added_width(unet):
        out["text_embeds"] = jax.ShapeDtypeStruct((n * rows, width), dtype)
        out["time_ids"] = jax.ShapeDtypeStruct((n * rows, 6), jnp.float32)
    if row.task == "unet":
        out["t"] = jax.ShapeDtypeStruct((), jnp.int32)
    else:
        out["scale"] = jax.ShapeDtypeStruct((n,), jnp.float32)
    return out


def ours(row: BenchRow, mesh: Mesh | None = None) -> Program:
    """Return our program of a row; under a mesh the sampler and the decoder run on each device's rows."""
    from jaxmix.models import AutoencoderKL, VAEConfig
    from jaxmix.models.unet import AddedCond
    from jaxmix.pipeline.job import denoise
    from jaxmix.pipeline.programs import decode
    from jaxmix.samplers import make_solver
    from jaxmix.schedule import NoiseSchedule

    found, dtype = configs(row.model, row.tiny), jnp.dtype(row.dtype)
    inputs = inputs_of(row, found)
    if row.task == "decode":
        vae = AutoencoderKL(VAEConfig.from_dict(found["vae"]), dtype)
        return Program(
            lambda params, x: decode(vae, mesh, None, params, x["latents"]), cast(vae.abstract_params(), dtype), inputs
        )

    unet = unet_of(row)
    schedule = NoiseSchedule.from_config(found["scheduler"])
    params = cast(unet.abstract_params(), dtype)

    def added(x: dict[str, Any]) -> Any:
        return None if "text_embeds" not in x else AddedCond(x["text_embeds"], x["time_ids"])

    if row.task == "unet":

        def step(params: Any, x: dict[str, Any]) -> jax.Array:
            return unet.apply({"params": params}, x["latents"], x["t"], x["context"], (), added(x))

        return Program(step, params, inputs)

    def sample(params: Any, x: dict[str, Any], controls: Any = ()) -> jax.Array:
        job = sampling_job(unet, params, x, row.batch, controls)
        return denoise(job, make_solver("ddim", schedule, row.steps), mesh=mesh)

    return Program(sample, params, inputs)


def sampling_job(unet: Any, params: Any, x: dict[str, Any], n: int, controls: Any = (), guidance: Any = ()) -> Any:
    """Return the job of the sampler's inputs, as `_inputs` names them; "other" is a further prompt per image."""
    from jaxmix.pipeline.job import Denoiser, Job
    from jaxmix.rows import Text, tile
    from jaxmix.samplers import ClassifierFree, stack

    fields = [x[k].reshape(n, 2, *x[k].shape[1:]) if k in x else None for k in ("context", "text_embeds", "time_ids")]
    if "other" in x:
        # SDXL's added conditioning is the same for the further prompt as for the first.
        more = [x["other"][:, None], *(None if y is None else y[:, 1:] for y in fields[1:])]
        fields = [None if y is None else jnp.concatenate([y, z], 1) for y, z in zip(fields, more, strict=True)]
    model = Denoiser(unet, params, Text(*fields), tile(tuple(controls), n))
    return Job(x["latents"], model, stack((ClassifierFree(x["scale"]), *guidance)))


def materialize(made: Program, seed: int = 0, params: Any = None) -> tuple[Any, dict[str, Any]]:
    """Return device arrays for a program: weights by `quick_params` (unless given), normals and fixed numbers."""
    rng = np.random.default_rng(seed)

    def feed(name: str, x: jax.ShapeDtypeStruct) -> jax.Array:
        if name in _CONSTANTS:
            return jnp.full(x.shape, _CONSTANTS[name], x.dtype)
        return jnp.asarray(rng.standard_normal(x.shape, np.float32), x.dtype)

    weights = quick_params(made.params, rng) if params is None else params
    return weights, {k: feed(k, v) for k, v in made.inputs.items()}
