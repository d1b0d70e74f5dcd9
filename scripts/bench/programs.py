"""The program of an engine: ours, ours under a method, or that of diffusers' Flax models."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from scripts.bench.adapters import adapter_program
from scripts.bench.methods import method_program
from scripts.bench.ours import Program, cast, inputs_of, ours, unet_of
from scripts.bench.rows import ADAPTERS, METHODS, BenchRow, configs


def program(engine: str, row: BenchRow, mesh: Mesh | None = None) -> Program:
    """Return the program of one of our engines or of "flax" for a row; under a mesh, ours for its devices.

    Raises ImportError if diffusers has no Flax models, and `InputError` for a row that does not involve the method.
    """
    if engine in METHODS:
        return method_program(engine, row, ours(row, mesh), unet_of(row), mesh)
    if engine in ADAPTERS:
        return adapter_program(engine, row, mesh)
    return _flax(row) if engine == "flax" else ours(row, mesh)


def _flax(row: BenchRow) -> Program:
    """Drive diffusers' Flax modules as its Flax pipelines do: branches concatenated, a fori_loop."""
    from diffusers import FlaxAutoencoderKL, FlaxDDIMScheduler, FlaxUNet2DConditionModel

    found, dtype = configs(row.model, row.tiny), jnp.dtype(row.dtype)
    inputs = inputs_of(row, found)
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

        return Program(decode, cast(jax.eval_shape(vae.init_weights, key), dtype), inputs)

    # Its norms have 32 groups, whatever the configuration says, where mini's otherwise have 16.
    unet = FlaxUNet2DConditionModel(**known(FlaxUNet2DConditionModel, found["unet"]), dtype=dtype)
    params = cast(jax.eval_shape(unet.init_weights, key), dtype)

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
