"""The JAX programs that are timed and measured: ours, and the same of diffusers' Flax models.

A program is a function of (params, inputs) with abstract arguments, so it can be compiled without any weights, for this
machine or for another; `materialize` makes arguments of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.testing import quick_params
from jaxmix.tuning.flops import model_flops
from scripts.bench.rows import METHODS, Row, added_width, configs

GUIDANCE = 7.5
_CONSTANTS = {"t": 500, "time_ids": 512.0, "scale": GUIDANCE, "present": 1.0}  # inputs that are not noise


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and the shapes of its arguments."""

    fn: Callable[..., jax.Array]
    params: Any  # tree of ShapeDtypeStruct
    inputs: dict[str, jax.ShapeDtypeStruct]

    def trace(self, sharding: Any = None) -> Any:
        """Trace under jit; ``sharding`` places every argument."""

        def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return x if sharding is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.jit(self.fn).trace(*jax.tree.map(place, (self.params, self.inputs)))

    def flops(self) -> float:
        """Return the FLOPs of the program's products and convolutions, counted before it is compiled."""
        return model_flops(jax.make_jaxpr(self.fn)(self.params, self.inputs))


def program(engine: str, row: Row) -> Program:
    """Return the program of one of our engines or of "flax" for a row.

    Raises ImportError if diffusers has no Flax models, and `InputError` for a row that a method has no part in.
    """
    if engine in METHODS:
        from scripts.bench.methods import method_program

        return method_program(engine, row, _ours(row), unet_of(row))
    return {"ours": _ours, "ours-vmix": _ours_with_vmix, "flax": _flax}[engine](row)


def unet_of(row: Row) -> Any:
    """Return the UNet module of a row, in the row's dtype."""
    from jaxmix.models import UNet2DConditionModel, UNetConfig

    return UNet2DConditionModel(UNetConfig.from_dict(configs(row.model, row.tiny)["unet"]), jnp.dtype(row.dtype))


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def _inputs(row: Row, found: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what is fed, NHWC and rows branch minor: a `unet` step sees two rows an image, as under guidance."""
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


def _ours(row: Row) -> Program:
    from jaxmix.models import AutoencoderKL, VAEConfig
    from jaxmix.models.unet import AddedCond
    from jaxmix.pipeline.job import denoise
    from jaxmix.pipeline.programs import decode
    from jaxmix.samplers import make_solver
    from jaxmix.schedule import NoiseSchedule

    found, dtype = configs(row.model, row.tiny), jnp.dtype(row.dtype)
    inputs = _inputs(row, found)
    if row.task == "decode":
        vae = AutoencoderKL(VAEConfig.from_dict(found["vae"]), dtype)
        return Program(
            lambda params, x: decode(vae, None, None, params, x["latents"]), _cast(vae.abstract_params(), dtype), inputs
        )

    unet = unet_of(row)
    schedule = NoiseSchedule.from_config(found["scheduler"])
    params = _cast(unet.abstract_params(), dtype)

    def added(x: dict[str, Any]) -> Any:
        return None if "text_embeds" not in x else AddedCond(x["text_embeds"], x["time_ids"])

    if row.task == "unet":

        def step(params: Any, x: dict[str, Any]) -> jax.Array:
            return unet.apply({"params": params}, x["latents"], x["t"], x["context"], (), added(x))

        return Program(step, params, inputs)

    def sample(params: Any, x: dict[str, Any], controls: Any = ()) -> jax.Array:
        return denoise(sampling_job(unet, params, x, row.batch, controls), make_solver("ddim", schedule, row.steps))

    return Program(sample, params, inputs)


def sampling_job(unet: Any, params: Any, x: dict[str, Any], n: int, controls: Any = (), guidance: Any = ()) -> Any:
    """Return the job of the sampler's inputs, as `_inputs` names them; "other" is a further prompt an image."""
    from jaxmix.pipeline.job import Denoiser, Job
    from jaxmix.rows import Text, tile
    from jaxmix.samplers import ClassifierFree, stack

    fields = [x[k].reshape(n, 2, *x[k].shape[1:]) if k in x else None for k in ("context", "text_embeds", "time_ids")]
    if "other" in x:
        # What SDXL is told besides is for the further prompt what it is for the first.
        more = [x["other"][:, None], *(None if y is None else y[:, 1:] for y in fields[1:])]
        fields = [None if y is None else jnp.concatenate([y, z], 1) for y, z in zip(fields, more, strict=True)]
    model = Denoiser(unet, params, Text(*fields), tile(tuple(controls), n))
    return Job(x["latents"], model, stack((ClassifierFree(x["scale"]), *guidance)))


def vmix_config(unet: Any, params: Any, tokens: int, labels: Any = None) -> Any:
    """Return the configuration of a VMix adapter for a UNet's shapes; the paper's labels if None are given."""
    from jaxmix.controls.vmix import VMixConfig, label_pairs
    from jaxmix.models.unet import sites, subtree

    names = [site.name for site in sites(unet.config, (8, 8)) if site.name.endswith(".attn2")]
    return VMixConfig(
        labels=label_pairs(labels),
        tokens=tokens,
        context_dim=unet.config.cross_attention_dim,
        sites=tuple((name, subtree(params, name)["to_v"]["kernel"].shape[-1]) for name in names),
    )


def _ours_with_vmix(row: Row) -> Program:
    """Our sampler under an adapter: binding it to the prompts' labels is part of the call, as nothing is left out."""
    from jaxmix.controls import vmix
    from jaxmix.models import UNet2DConditionModel, UNetConfig
    from jaxmix.types import InputError

    if row.task != "sample":
        raise InputError(f"{row.name}: VMix has a part in the sampler alone, expected --tasks sample")
    plain, found = _ours(row), configs(row.model, row.tiny)
    unet = UNet2DConditionModel(UNetConfig.from_dict(found["unet"]))
    config = vmix_config(unet, plain.params, found["text_length"])

    def sample(params: Any, x: dict[str, Any]) -> jax.Array:
        control = vmix.bind(params["adapter"], x["present"], jnp.ones((row.batch,)))
        return plain.fn(params["unet"], x, (control,))

    params = {"unet": plain.params, "adapter": vmix.abstract_params(config)}
    present = jax.ShapeDtypeStruct((row.batch, len(config.labels)), jnp.float32)
    return Program(sample, params, {**plain.inputs, "present": present})


def _flax(row: Row) -> Program:
    """diffusers' Flax modules, driven as its Flax pipelines drive them: branches concatenated, a fori_loop."""
    from diffusers import FlaxAutoencoderKL, FlaxDDIMScheduler, FlaxUNet2DConditionModel

    found, dtype = configs(row.model, row.tiny), jnp.dtype(row.dtype)
    inputs = _inputs(row, found)
    key = jax.random.PRNGKey(0)

    def known(kind: Any, config: dict[str, Any]) -> dict[str, Any]:
        names = kind.__dataclass_fields__
        return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in names and v is not None}

    if row.task == "decode":
        vae = FlaxAutoencoderKL(**known(FlaxAutoencoderKL, found["vae"]), dtype=dtype)
        factor = found["vae"]["scaling_factor"]

        def decode(params: Any, x: dict[str, Any]) -> jax.Array:
            latents = x["latents"].transpose(0, 3, 1, 2) / factor
            y = vae.apply({"params": params}, latents, method=vae.decode).sample
            return jnp.clip(y / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)

        return Program(decode, _cast(jax.eval_shape(vae.init_weights, key), dtype), inputs)

    # Its norms have 32 groups, whatever the configuration says: mini's have 16 elsewhere.
    unet = FlaxUNet2DConditionModel(**known(FlaxUNet2DConditionModel, found["unet"]), dtype=dtype)
    params = _cast(jax.eval_shape(unet.init_weights, key), dtype)

    def predict(params: Any, latents: jax.Array, t: jax.Array, x: dict[str, Any]) -> jax.Array:
        added = {k: x[k] for k in ("text_embeds", "time_ids") if k in x} or None
        t = jnp.broadcast_to(t, latents.shape[:1])
        return unet.apply({"params": params}, latents, t, x["context"], added).sample

    if row.task == "unet":
        return Program(lambda params, x: predict(params, x["latents"].transpose(0, 3, 1, 2), x["t"], x), params, inputs)

    config = {k: v for k, v in found["scheduler"].items() if not k.startswith("_") and v is not None}
    scheduler = FlaxDDIMScheduler(**{k: v for k, v in config.items() if k != "timestep_spacing"})

    def sample(params: Any, x: dict[str, Any]) -> jax.Array:
        latents = x["latents"].transpose(0, 3, 1, 2)
        state = scheduler.set_timesteps(scheduler.create_state(), row.steps, latents.shape)
        scale = x["scale"][:, None, None, None]

        def body(i: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            latents, state = carry
            t = jnp.asarray(state.timesteps, jnp.int32)[i]
            uncond, cond = jnp.split(predict(params, jnp.concatenate([latents] * 2), t, x), 2)
            moved, state = scheduler.step(state, uncond + scale * (cond - uncond), t, latents, return_dict=False)
            return moved.astype(jnp.float32), state

        return jax.lax.fori_loop(0, row.steps, body, (latents, state))[0]

    return Program(sample, params, inputs)


# Arguments ------------------------------------------------------------------------------------------------------------


def materialize(made: Program, seed: int = 0, params: Any = None) -> tuple[Any, dict[str, Any]]:
    """Return device arrays for a program: weights by `quick_params` (unless given), normals and fixed numbers."""
    rng = np.random.default_rng(seed)

    def feed(name: str, x: jax.ShapeDtypeStruct) -> jax.Array:
        if name in _CONSTANTS:
            return jnp.full(x.shape, _CONSTANTS[name], x.dtype)
        return jnp.asarray(rng.standard_normal(x.shape, np.float32), x.dtype)

    weights = quick_params(made.params, rng) if params is None else params
    return weights, {k: feed(k, v) for k, v in made.inputs.items()}
