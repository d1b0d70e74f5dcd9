"""Our sampler with adapters, one or several, and InstantStyle-Plus with its inversion, as programs."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmix.controls import controlnet, deadiff, ip_adapter, layer_prompts, vmix
from jaxmix.controls.vmix import VMixConfig, label_pairs
from jaxmix.models import VAEConfig
from jaxmix.models.controlnet import ControlNetConfig, ControlNetModel
from jaxmix.models.unet import sites, subtree
from jaxmix.pipeline.blocks import PRESETS
from jaxmix.pipeline.inverted import invert_rows
from jaxmix.pipeline.job import denoise
from jaxmix.samplers import DDIMInversion, ReNoise, make_solver
from jaxmix.schedule import NoiseSchedule
from jaxmix.tuning import lora
from jaxmix.types import InputError
from scripts.bench.ours import Program, cast, ours, sampling_job, unet_of
from scripts.bench.rows import NETS, PICTURES, TOGETHER, BenchRow, configs

RANK = 16  # of the LoRA
STYLE = r"^up_blocks\.0\.attentions\.1\."  # the style block of SD 1.5 and SDXL, in diffusers' names
_LORA = r"attn[12]\.to_(q|k|v|out\.0)$"


@dataclasses.dataclass(frozen=True)
class Part:
    """What an adapter adds to a program: its weights and inputs, by name, and the controls that come of them."""

    params: dict[str, Any]
    inputs: dict[str, jax.ShapeDtypeStruct]
    bind: Callable[[Any, dict[str, Any]], Sequence[Any]]


def adapter_program(engine: str, row: BenchRow, mesh: Mesh | None = None) -> Program:
    """Return our sampler with the adapters of an engine's name; raises `InputError` for other rows than samplers.

    Under a mesh each device has rows of its own.
    """
    if row.task != "sample":
        raise InputError(f"{row.name}: {engine} has a part in the sampler alone, expected --tasks sample")
    plain = ours(row, mesh)
    if engine == "ours-instantstyle-plus":
        return _instantstyle_plus(row, plain, mesh)
    made = {
        "ours-vmix": lambda: [_vmix(row, plain)],
        "ours-deadiff": lambda: [_two_slots(row, plain)],
        "ours-layers": lambda: [_layer_prompts(row, plain)],
        **{name: functools.partial(lambda k: [_picture(row, plain, k)], k) for name, k in PICTURES.items()},
        **{name: functools.partial(lambda k: [_nets(row, k)], k) for name, k in NETS.items()},
        TOGETHER: lambda: [_vmix(row, plain), _picture(row, plain, PICTURES["ours-ip"]), _nets(row, 1)],
    }
    parts = made[engine]()
    low_rank = lora.init(jax.random.key(0), plain.params, _LORA, RANK) if engine == TOGETHER else {}

    def sample(params: Any, x: dict[str, Any]) -> jax.Array:
        # Merged within the call: the base stays beside it, as it does in a pipeline.
        unet = lora.merge(params["unet"], [params["lora"]], [x["strength"]]) if low_rank else params["unet"]
        return plain.fn(unet, x, tuple(control for part in parts for control in part.bind(params, x)))

    params, inputs = {"unet": plain.params}, dict(plain.inputs)
    for part in parts:
        params, inputs = {**params, **part.params}, {**inputs, **part.inputs}
    if low_rank:
        params["lora"] = cast(low_rank, jnp.float32)
        inputs["strength"] = jax.ShapeDtypeStruct((), jnp.float32)
    return Program(sample, params, inputs)


def vmix_config(unet: Any, params: Any, tokens: int, labels: Any = None) -> VMixConfig:
    """Return the configuration of a VMix adapter for a UNet's shapes; the paper's labels if None are given."""
    return VMixConfig(
        labels=label_pairs(labels),
        tokens=tokens,
        context_dim=unet.config.cross_attention_dim,
        sites=tuple((name, subtree(params, name)["to_v"]["kernel"].shape[-1]) for name in _attn2(unet)),
    )


def _attn2(unet: Any) -> list[str]:
    return [site.name for site in sites(unet.config, (8, 8)) if site.name.endswith(".attn2")]


def _vmix(row: BenchRow, plain: Program) -> Part:
    """VMix on all attn2, bound to the prompts' labels in each call."""
    config = vmix_config(unet_of(row), plain.params, configs(row.model, row.tiny)["text_length"])
    return Part(
        {"adapter": vmix.abstract_params(config)},
        {"present": jax.ShapeDtypeStruct((row.batch, len(config.labels)), jnp.float32)},
        lambda params, x: [vmix.bind(params["adapter"], x["present"], jnp.ones((row.batch,)))],
    )


def _picture(row: BenchRow, plain: Program, tokens: int, name: str = "shown", only: str = ".", held: str = "") -> Part:
    """Return an IP-Adapter, including the keys and values of a picture's tokens: at all attn2, or some ``only``.

    ``held`` names the weights of another part that are its own, too.
    """
    unet = unet_of(row)
    names = [site for site in _attn2(unet) if re.search(only, site)]
    base = {site: subtree(plain.params, site) for site in _attn2(unet)}
    layers = {site: {x: {"kernel": base[site][x]["kernel"]} for x in ("to_k", "to_v")} for site in base}

    def bind(params: Any, x: dict[str, Any]) -> Sequence[Any]:
        own = {site: params[held or name][site] for site in names}
        scale, at_site = jnp.ones((row.batch, 1)), dict.fromkeys(names, 1.0)
        return [ip_adapter.bind(own, x[name], x[f"no {name}"], scale=scale, at_site=at_site)]

    seen = jax.ShapeDtypeStruct((row.batch, 1, tokens, unet.config.cross_attention_dim), jnp.dtype(row.dtype))
    return Part({} if held else {name: layers}, {name: seen, f"no {name}": seen}, bind)


def _two_slots(row: BenchRow, plain: Program) -> Part:
    """Return DEADiff with 16 tokens in both of its slots, including their keys and values."""
    unet = unet_of(row)
    names = _attn2(unet)
    base = {site: subtree(plain.params, site) for site in names}
    layers = {site: {x: {"kernel": base[site][x]["kernel"]} for x in ("to_k", "to_v")} for site in names}
    slots = {site: "content" if re.search(deadiff.CONTENT, site) else "style" for site in names}

    def bind(params: Any, x: dict[str, Any]) -> Sequence[Any]:
        tokens = {slot: x[slot] for slot in deadiff.SLOTS}
        return [deadiff.bind(params["slots"], tokens, slots, scale=jnp.ones((row.batch,)))]

    shape = (row.batch, 16, unet.config.cross_attention_dim)
    seen = jax.ShapeDtypeStruct(shape, jnp.dtype(row.dtype))
    return Part({"slots": layers}, dict.fromkeys(deadiff.SLOTS, seen), bind)


def _layer_prompts(row: BenchRow, plain: Program) -> Part:
    """Return a prompt of their own for half of the attn2."""
    context = plain.inputs["context"]
    names = _attn2(unet_of(row))[::2]

    def bind(params: Any, x: dict[str, Any]) -> Sequence[Any]:
        return [layer_prompts.bind(x["layers"], dict.fromkeys(names, np.ones(row.batch, int)))]

    states = jax.ShapeDtypeStruct((row.batch, 1, *context.shape[1:]), context.dtype)
    return Part({}, {"layers": states}, bind)


def _nets(row: BenchRow, count: int) -> Part:
    """Return ControlNets in all steps, including what they make of their pictures."""
    factor = VAEConfig.from_dict(configs(row.model, row.tiny)["vae"]).factor
    channels = (16, 32, 96, 256)[: factor.bit_length()]
    dtype = jnp.dtype(row.dtype)
    net = ControlNetModel(ControlNetConfig.of_unet(unet_of(row).config, channels), dtype)

    def bind(params: Any, x: dict[str, Any]) -> Sequence[Any]:
        scale, guess = jnp.ones((row.batch,)), np.zeros(row.batch, bool)
        held = enumerate(params["nets"])
        return [controlnet.bind(net, own, x[f"map{i}"], scale=scale, guess=guess) for i, own in held]

    side = row.latents * factor
    maps = {f"map{i}": jax.ShapeDtypeStruct((row.batch, side, side, 3), jnp.float32) for i in range(count)}
    return Part({"nets": (cast(net.abstract_params(), dtype),) * count}, maps, bind)


def _instantstyle_plus(row: BenchRow, plain: Program, mesh: Mesh | None) -> Program:
    """Invert contents by ReNoise and draw them anew, with the tile net and one IP-Adapter for both pictures."""
    schedule, unet = NoiseSchedule.from_config(configs(row.model, row.tiny)["scheduler"]), unet_of(row)
    known = ("sdxl", "sd15", "mini").index(row.model)
    style = "^up_blocks" if row.tiny else PRESETS["style"][known]
    tokens = PICTURES["ours-ip"]
    parts = [_nets(row, 1), _picture(row, plain, tokens), _picture(row, plain, tokens, "style", style, held="shown")]

    def transfer(params: Any, x: dict[str, Any]) -> jax.Array:
        inversion = DDIMInversion.create(schedule, row.steps, "next")
        refined = ReNoise().bind(schedule, row.steps, row.batch)
        captions = sampling_job(unet, params["unet"], x, row.batch).model
        states, _ = invert_rows(captions, x["latents"], None, inversion, refine=refined, mesh=mesh)
        controls = tuple(control for part in parts for control in part.bind(params, x))
        job = sampling_job(unet, params["unet"], {**x, "latents": states[:, -1]}, row.batch, controls)
        return denoise(job, make_solver("ddim", schedule, row.steps), mesh=mesh)

    params, inputs = {"unet": plain.params}, dict(plain.inputs)
    for part in parts:
        params, inputs = {**params, **part.params}, {**inputs, **part.inputs}
    return Program(transfer, params, inputs)
