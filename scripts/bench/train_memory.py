"""What a step of an adapter's trainer needs for SD 1.5, 2.1 or SDXL: parameters, bytes and FLOPs, without weights.

    python -m scripts.bench.train_memory --model sd15 --topology v5e:2x2 --per_device_batch 8
    python -m scripts.bench.train_memory --model sdxl --topology v5e:4x4 --fsdp 4 --cached true
    python -m scripts.bench.train_memory --trainer ip_adapter --model sd15 --per_device_batch 8
    python -m scripts.bench.train_memory --trainer controlnet --model sd15 --per_device_batch 4
    python -m scripts.bench.train_memory --model sd15 --platform cpu --steps 3      # runs it here, with random weights

The step is the trainer's own (`train.vmix`, `train.ip_adapter`, `train.controlnet`, ...) with the keys of
configs/TRAINER_MODEL.yaml, compiled from shapes alone.
Compiling for a TPU needs no TPU, only libtpu: pip install "jax[tpu]". The status is 1 if the compiled step holds
something twice, or the optimiser holds more than the adapter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmix import command
from jaxmix.sharding import fsdp_specs, replicated, rows_over, train_mesh
from jaxmix.testing import quick_params
from jaxmix.tuning.flops import model_flops
from jaxmix.tuning.update import TrainState, make_optimizer, make_update
from jaxmix.types import InputError
from scripts.bench.apart import NO_TPU
from scripts.bench.train_shapes import TRAINERS, abstract_batch, abstract_pipeline
from train import dreambooth
from train.adapters import AdapterConfig
from train.diffusion import make_loss

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
_UNUSED = ("decoder", "post_quant_conv")  # of the autoencoder: the step encodes, validation decodes


@dataclasses.dataclass
class Config:
    """What to compile, and for what. Null takes the recipe's value.

    Attributes:
        trainer: vmix, ip_adapter (whose pictures CLIP ViT-H/14 reads), style_adapter (CLIP ViT-L/14), controlnet, lora,
            dreambooth, b_lora or textual_inversion.
        model: sd15, sd21 (the 512 px base) or sdxl.
        recipe: YAML file of the trainer; configs/TRAINER_MODEL.yaml if empty (SD 2.1 has that of SD 1.5).
        platform: tpu (compile only), or cpu (this machine).
        topology: of the TPU, such as v5e:2x2, v5p:2x2x1, v6e:2x4.
        devices: of them; 0: all. On the CPU always one.
        per_device_batch: rows of one device in one micro-batch.
        accumulate: micro-batches of a step.
        fsdp: devices over which the weights are split.
        cached: latents and text states come from a cache, so that no encoder is in the step.
        latents: side of the square latents, in cells of 8 px; the model's own if null.
        rank: vmix, lora, dreambooth, b_lora: rank of the LoRA; 0 for none (vmix).
        lora_targets: of the LoRA: regular expression over the UNet's modules.
        kind: ip_adapter: base, plus or full.
        mixed_precision: "no" or bf16.
        gradient_checkpointing: recompute activations in the backward pass.
        effort: XLA's effort from -1 (fast compiling) to 1, for a TPU.
        steps: on the CPU: run this many steps with random weights.
        tiny: shrink the model, to see that the script works.
        out: JSON file for the numbers; none if empty.
    """

    trainer: Literal[
        "vmix", "ip_adapter", "style_adapter", "controlnet", "lora", "dreambooth", "b_lora", "textual_inversion"
    ] = "vmix"
    model: Literal["sd15", "sd21", "sdxl"] = "sd15"
    recipe: str = ""
    platform: Literal["tpu", "cpu"] = "tpu"
    topology: str = "v5e:2x2"
    devices: int = 0
    per_device_batch: int = 1
    accumulate: int = 1
    fsdp: int = 1
    cached: bool = False
    latents: int | None = None
    rank: int | None = None
    lora_targets: str | None = None
    kind: Literal["base", "plus", "full"] | None = None
    mixed_precision: Literal["no", "bf16"] | None = None
    gradient_checkpointing: bool | None = None
    effort: float = -1.0
    steps: int = 0
    tiny: bool = False
    out: str = ""

    def __post_init__(self) -> None:
        """Refuse numbers that no run can have."""
        for name in ("per_device_batch", "accumulate", "fsdp"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: found {getattr(self, name)}, expected 1 or more")
        if self.steps and self.platform != "cpu":
            raise InputError(f"steps: found {self.steps} with platform {self.platform}, expected platform cpu to run")
        if self.platform == "cpu" and self.fsdp > 1:
            raise InputError(f"fsdp: found {self.fsdp}, expected 1 on the one device of platform cpu")


@dataclasses.dataclass(frozen=True)
class Step:
    """The trainer's update and the shapes of its arguments; ``spare`` is held beside it, for validation."""

    update: Any
    state: TrainState
    frozen: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    spare: Any
    parts: dict[str, Any]


def trainer_config(config: Config) -> AdapterConfig:
    """Return the trainer's configuration from the recipe, with the overrides of the command line.

    Only the keys of the step are read: the trainer itself checks the others.
    """
    name = "sdxl" if config.model == "sdxl" else "sd15"
    path = Path(config.recipe) if config.recipe else ROOT / "configs" / f"{config.trainer}_{name}.yaml"
    if not path.is_file():
        raise InputError(f"recipe {path}: no such file")
    told = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(told, dict):
        raise InputError(f"recipe {path}: found {type(told).__name__}, expected keys and values")
    kind = TRAINERS[config.trainer][0]
    fields = {field.name for field in dataclasses.fields(kind)}
    keys = {key: value for key, value in told.items() if key in fields}
    for key in ("rank", "lora_targets", "kind", "mixed_precision", "gradient_checkpointing"):
        if getattr(config, key) is None:
            continue
        if key not in fields:
            raise InputError(f"{key}: found it with trainer {config.trainer}, which has no such key")
        keys[key] = getattr(config, key)
    if "with_prior_preservation" in keys:  # the step is the same; its rows need not be pairs on one device
        keys |= {"with_prior_preservation": False, "class_prompt": ""}
    rows = config.per_device_batch * config.accumulate
    keys |= {"output_dir": "unused", "train_batch_size": rows, "gradient_accumulation_steps": config.accumulate}
    return kind(**keys)


def make_step(config: Config, cfg: AdapterConfig, devices: int = 1) -> Step:
    """Return the trainer's update for a model, and its arguments as shapes."""
    pipe = abstract_pipeline(config.model, cfg.dtype, config.tiny)
    rows = cfg.train_batch_size * devices
    side = config.latents or pipe.latent_shape[0]
    made = TRAINERS[config.trainer][1](pipe, cfg, rows, side, config.cached, config.tiny)
    optimizer = make_optimizer(cfg)
    state = jax.eval_shape(lambda params: TrainState.create(params, optimizer, ema=cfg.ema_decay > 0), made.learns)
    batch = abstract_batch(pipe, rows, side, config.cached) | made.batch
    encoders = {name: tree for name, tree in pipe.params.items() if name != "unet"}
    spare: Any = encoders
    encoders = {name: tree for name, tree in encoders.items() if name not in made.learnt}
    frozen: dict[str, Any] = {} if "unet" in made.learnt else {"unet": pipe.params["unet"]}
    frozen |= made.frozen
    if config.cached:
        empty = {name: batch[name].shape[1:] for name in ("context", "pooled") if name in batch}
        frozen["empty"] = {name: jax.ShapeDtypeStruct((1, *shape), jnp.float16) for name, shape in empty.items()}
    else:
        spare = {name: tree for name, tree in encoders["vae"].items() if name in _UNUSED}
        frozen |= encoders | {"vae": {name: tree for name, tree in encoders["vae"].items() if name not in _UNUSED}}
    loss_fn = make_loss(pipe, cfg, made.predict, made.weigh)
    by_layer = dreambooth.MODELS if made.learnt else ()
    update = make_update(loss_fn, optimizer, cfg.ema_decay, cfg.gradient_accumulation_steps, by_layer)
    return Step(update, state, frozen, batch, spare, made.parts)


# Bytes ----------------------------------------------------------------------------------------------------------------


def count(tree: Any) -> int:
    """Return the number of values of a tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def size(tree: Any) -> int:
    """Return the bytes of a tree on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += int(np.prod(shape)) * leaf.dtype.itemsize
    return total


def placed(tree: Any, mesh: Mesh | None, specs: Any) -> Any:
    """Return a tree of shapes placed by specs: a tree, or one for all leaves."""
    if mesh is None:
        return tree
    if isinstance(specs, NamedSharding):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=specs), tree)

    def place(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree, specs)


def trace_step(step: Step, devices: Sequence[Any] | None, fsdp: int) -> tuple[Step, Any]:
    """Trace a step for the devices of a topology (None: for this machine) as `jaxmix.tuning.fit` does for real ones.

    Returns the step with placements, and what was traced.
    """
    mesh = None if devices is None else train_mesh(fsdp, devices)
    key, update = jax.eval_shape(lambda: jax.random.key(0)), step.update
    if mesh is not None:
        weights = [placed(tree, mesh, fsdp_specs(tree, mesh)) for tree in (step.state, step.frozen, step.spare)]
        batch = placed(step.batch, mesh, rows_over(mesh))
        step = dataclasses.replace(step, state=weights[0], frozen=weights[1], spare=weights[2], batch=batch)
        key = placed(key, mesh, replicated(mesh))
        # Outputs placed like the inputs, so that the next step takes them as they are.
        outputs = (jax.tree.map(lambda leaf: leaf.sharding, step.state), replicated(mesh))
        update = jax.jit(update, donate_argnums=0, out_shardings=outputs)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return step, update.trace(step.state, step.frozen, step.batch, key)


def compile_step(step: Step, devices: Sequence[Any] | None, fsdp: int) -> tuple[Step, Any, dict[str, Any]]:
    """Compile a step, see `trace_step`; return it with placements, the program, and its numbers for one device."""
    began = time.perf_counter()
    step, traced = trace_step(step, devices, fsdp)
    compiled = traced.lower(lowering_platforms=None if devices is None else ("tpu",)).compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    kinds = ("argument", "output", "alias", "temp")
    found: dict[str, Any] = {f"{kind}_bytes": getattr(memory, f"{kind}_size_in_bytes") for kind in kinds}
    new = found["output_bytes"] - found["alias_bytes"]
    found["peak_bytes"] = found["argument_bytes"] + new + found["temp_bytes"]
    parts = {"frozen": step.frozen, "state": step.state, "batch": step.batch, "spare": step.spare}
    found |= {f"{name}_bytes": size(tree) for name, tree in parts.items()}
    found["parameters"] = {name: count(tree) for name, tree in step.parts.items()}
    found["frozen_parameters"] = count(step.frozen)
    found["state_values"] = count(step.state)
    found["averaged"] = step.state.ema is not None
    found["rows"] = int(step.batch["dropped"].shape[0])
    found["flops"] = model_flops(traced.jaxpr)  # recomputation does not count as work
    found["compile_s"] = seconds
    return step, compiled, found


def checks(found: dict[str, Any]) -> dict[str, bool]:
    """Return what must hold of a compiled step: everything once, and the optimiser for the adapter alone."""
    parts = sum(found[f"{name}_bytes"] for name in ("frozen", "state", "batch"))
    adapter = sum(found["parameters"].values())
    copies = 4 if found["averaged"] else 3  # weights, two moments, and their average if there is one
    # A TPU pads the last two axes to whole tiles, which matters for the narrow pieces of split weights.
    slack = 0.1 if found["fsdp"] > 1 else 0.01
    return {
        f"arguments are frozen + state + batch, to {slack:.0%}": abs(found["argument_bytes"] - parts) <= slack * parts,
        f"the state is written in place, to {slack:.0%}": abs(found["alias_bytes"] - found["state_bytes"])
        <= slack * found["state_bytes"],
        f"the state is {copies} times the adapter": 0 <= found["state_values"] - copies * adapter < 16,
    }


# Running --------------------------------------------------------------------------------------------------------------


def run(step: Step, compiled: Any, steps: int) -> dict[str, Any]:
    """Run a compiled step on this machine with random weights; return seconds of each step, and peak process memory."""
    rng = np.random.default_rng(0)
    frozen = quick_params(step.frozen, rng)
    params = quick_params(step.state.params, rng)
    rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), step.state.replace(params=None, ema=None))
    ema = None if step.state.ema is None else jax.tree.map(jnp.array, params)
    state = rest.replace(params=params, ema=ema)
    batch = {name: _feed(name, leaf, rng) for name, leaf in step.batch.items()}
    seconds, losses, key = [], [], jax.random.key(0)
    for _ in range(steps):
        began = time.perf_counter()
        state, metrics = compiled(state, frozen, batch, key)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - began)
        print(f"step {len(seconds)}: {seconds[-1]:.1f} s, loss {losses[-1]:.4f}", flush=True)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"step_s": seconds, "losses": losses, "peak_rss_bytes": peak}


def _feed(name: str, leaf: jax.ShapeDtypeStruct, rng: np.random.Generator) -> jax.Array:
    if leaf.dtype == jnp.uint8:
        return jnp.asarray(rng.integers(0, 256, leaf.shape), jnp.uint8)
    if leaf.dtype == jnp.int32:
        return jnp.asarray(rng.integers(0, 16, leaf.shape), jnp.int32)
    if name in ("dropped", "present", "unseen", "unstyled"):
        return jnp.full(leaf.shape, float(name == "present"), leaf.dtype)
    if name == "time_ids":
        return jnp.full(leaf.shape, 512.0, leaf.dtype)
    return jnp.asarray(rng.standard_normal(leaf.shape, np.float32), leaf.dtype)


def tpu_devices(config: Config) -> list[Any]:
    """Return the devices of the topology that the step is compiled for."""
    from jax.experimental import topologies

    for name, value in NO_TPU.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_exec_time_optimization_effort", config.effort)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=config.topology).devices
    except Exception as error:  # whatever libtpu raises, or its absence
        said = str(error).strip().splitlines()
        raise InputError(
            f"topology {config.topology}: {said[0] if said else type(error).__name__}: expected libtpu (pip install "
            '"jax[tpu]") and a name such as v5e:2x2'
        ) from None
    if not 0 <= config.devices <= len(found):
        raise InputError(f"devices: found {config.devices}, expected 0 (all) to the {len(found)} of {config.topology}")
    return list(found[: config.devices or len(found)])


def report(config: Config, cfg: AdapterConfig, found: dict[str, Any]) -> str:
    """Return the numbers in words."""
    gib = {name[: -len("_bytes")]: value / GIB for name, value in found.items() if name.endswith("_bytes")}
    learns = found["parameters"]
    where = "this CPU" if config.platform == "cpu" else f"{found['devices']} x {config.topology}, fsdp {config.fsdp}"
    source = "cached latents and text states" if config.cached else "pictures and token ids"
    dtype = "bfloat16" if cfg.mixed_precision == "bf16" else "float32"
    what = getattr(cfg, "kind", "") if not hasattr(cfg, "rank") else f"rank {cfg.rank}" if cfg.rank else "all weights"
    remat = "on" if cfg.gradient_checkpointing else "off"
    average = "its average, " if found["averaged"] else ""
    lines = [
        f"{config.trainer}, {config.model}{' (tiny)' if config.tiny else ''} on {where}: "
        f"{found['rows']} rows per step, "
        f"{source}, {dtype}, {what}, gradient checkpointing {remat}, compiled in {found['compile_s']:.0f} s",
        f"trains {sum(learns.values()):,}: " + ", ".join(f"{name} {n:,}" for name, n in learns.items()),
        f"frozen {found['frozen_parameters']:,}: {gib['frozen']:.3f} GiB (held beside it: {gib['spare']:.3f})",
        f"state {gib['state']:.3f} GiB: the adapter, {average}two moments, float32",
        f"batch {gib['batch']:.3f} GiB",
        f"compiled: arguments {gib['argument']:.3f} GiB, outputs {gib['output']:.3f} of which in place "
        f"{gib['alias']:.3f}, temporaries {gib['temp']:.3f}, peak {gib['peak']:.3f}",
        f"{found['flops'] / 1e12:.3f} TFLOP per step, {found['flops'] / 1e12 / found['rows']:.3f} per row",
    ]
    lines += [f"{'ok' if holds else 'NOT SO'}: {name}" for name, holds in found["checks"].items()]
    if "step_s" in found:
        # The first step is the first to touch its memory.
        rest = found["step_s"][1:] or found["step_s"]
        lines.append(f"{statistics.median(rest):.1f} s per step, peak memory of the process {gib['peak_rss']:.2f} GiB")
    return "\n".join(lines)


def main(config: Config) -> int:
    """Compile the step, print what it needs, run it if asked."""
    if config.out and not Path(config.out).absolute().parent.is_dir():
        raise InputError(f"--out {config.out}: no such folder")
    jax.config.update("jax_platforms", "cpu")  # this needs no device, even if there is one
    cfg = trainer_config(config)
    devices = tpu_devices(config) if config.platform == "tpu" else None
    made = make_step(config, cfg, len(devices or [0]))
    step, compiled, found = compile_step(made, devices, config.fsdp)
    found |= {"devices": len(devices or [0]), "fsdp": config.fsdp}
    found |= {"checks": checks(found), "config": dataclasses.asdict(config)}
    if config.steps:
        found |= run(step, compiled, config.steps)
    print(report(config, cfg, found))
    if config.out:
        Path(config.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(found["checks"].values()) else 1


if __name__ == "__main__":
    command.run(main)
