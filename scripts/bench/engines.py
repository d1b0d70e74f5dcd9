"""The worker process of one engine: stdin tells it what to prepare and when to run, and it answers in JSON.

One process per engine, so that thread pools, allocators and peak memory are separate. Each line of stdin is an order:

    {"op": "compile", "row": {...}}   compile only (torch.compile: compile and run once); fills the persistent cache
    {"op": "prepare", "row": {...}}   compile, make weights and inputs, run once
    {"op": "run"}                     run once more and time it
    {"op": "count", "row": {...}}     count the FLOPs of the program (ours, alone or with a method)

The first line of stdout is what the engine is ("versions", "device") or why it cannot run ("reason").
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from jaxmix.types import InputError
from scripts.bench.rows import ENGINES, BenchRow, added_width, configs

_ROUND = 0.3  # seconds: a round repeats shorter calls for this long


class Absent(Exception):
    """This engine cannot run here; the message says why."""


class JaxEngine:
    """Ours, also with an adapter or a method, or diffusers' Flax models, compiled ahead of time: one program."""

    def __init__(self, name: str, device: str) -> None:
        import jax

        self.name, self.device = name, device
        self.versions = {"jax": jax.__version__}
        if name == "flax":
            try:
                import diffusers
            except ImportError:
                raise Absent("diffusers is not installed") from None
            self.versions["diffusers"] = diffusers.__version__
            if not hasattr(diffusers, "FlaxUNet2DConditionModel"):
                raise Absent(f"diffusers {diffusers.__version__} has no Flax models: 0.39 was the last with them")
        try:
            first = jax.devices()[0]
        except RuntimeError as error:
            raise Absent(f"no {device} that JAX can use ({str(error).splitlines()[0][:120]})") from None
        if first.platform != device:
            raise Absent(f"no {device} that JAX can use, it found {first.platform}")
        self.device_name = first.device_kind
        folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
        if folder:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        self._programs: dict[BenchRow, tuple[Any, Any]] = {}
        self._params: dict[Any, Any] = {}  # of each model and part: rows of one process share them

    def compile(self, row: BenchRow) -> dict[str, Any]:
        """Trace, lower and compile without weights."""
        from scripts.bench.programs import program

        started = time.perf_counter()
        made = program(self.name, row)
        self._programs[row] = made, made.trace().lower().compile()
        return {"compile_s": time.perf_counter() - started}

    def prepare(self, row: BenchRow) -> tuple[dict[str, Any], Callable[[], Any]]:
        """Compile, make the arguments, and return the call that runs the program and waits for it."""
        import jax

        from scripts.bench.ours import materialize

        before = row in self._programs
        told = {"compile_s": 0.0, "compiled_before": True} if before else self.compile(row)
        made, compiled = self._programs[row]
        part = (row.model, row.tiny, row.dtype, row.task == "decode")
        params, inputs = materialize(made, params=self._params.get(part))
        self._params[part] = params
        jax.block_until_ready((params, inputs))
        memory = compiled.memory_analysis()
        sizes = [getattr(memory, f"{kind}_size_in_bytes", 0) for kind in ("argument", "temp", "output")]
        return {**told, "program_bytes": sum(sizes)}, lambda: jax.block_until_ready(compiled(params, inputs))

    def finite(self, out: Any) -> bool:
        """Return whether a result holds numbers only."""
        import jax.numpy as jnp

        return bool(jnp.isfinite(out).all())

    def peak(self) -> int | None:
        """Return the most bytes of device memory held since the process began; None on a CPU (see the process)."""
        import jax

        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use") if self.device == "gpu" else None


class TorchEngine:
    """torch diffusers' UNet2DConditionModel, DDIMScheduler and AutoencoderKL, eager or through torch.compile."""

    def __init__(self, name: str, device: str) -> None:
        try:
            import diffusers
            import torch
        except ImportError as error:
            raise Absent(f"{error.name} is not installed") from None
        if not hasattr(diffusers, "UNet2DConditionModel"):
            raise Absent("diffusers is not installed")
        if device == "gpu" and not torch.cuda.is_available():
            raise Absent("no GPU that torch can use")
        self.compiled = name == "torch-compile"
        if self.compiled and not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")):
            raise Absent("no C++ compiler, which torch.compile needs")
        self.device = "cuda" if device == "gpu" else "cpu"
        self.device_name = torch.cuda.get_device_name() if device == "gpu" else "cpu"
        self.versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        self._modules: dict[Any, Any] = {}
        self._called: set[BenchRow] = set()

    def compile(self, row: BenchRow) -> dict[str, Any]:
        """Make everything and run once: torch compiles when it is called."""
        _, call = self.prepare(row)
        started = time.perf_counter()
        call()
        self._called.add(row)
        return {"compile_s": time.perf_counter() - started, "with_run": True}

    def _module(self, row: BenchRow, part: str) -> Any:
        """Build a model on the meta device and fill it: kernels with variance 1 / fan-in, norms 1, biases 0."""
        import diffusers
        import torch

        key = (row.model, row.tiny, row.dtype, part)
        if key in self._modules:
            return self._modules[key]
        kind = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
        config = {k: v for k, v in configs(row.model, row.tiny)[part].items() if not k.startswith("_")}
        if part == "vae":
            config.pop("mid_block_add_attention", None)  # true, as in every model here; old releases lack the key
        with torch.device("meta"):
            module = kind(**config)
        module = module.to(getattr(torch, row.dtype)).to_empty(device=self.device).eval().requires_grad_(False)
        torch.manual_seed(0)
        for name, leaf in module.named_parameters():
            if leaf.ndim > 1:
                leaf.normal_(0, leaf[0].numel() ** -0.5)
            else:
                leaf.fill_(1.0 if name.endswith("weight") else 0.0)
        if self.device == "cuda":
            module = module.to(memory_format=torch.channels_last)  # what diffusers' own guide to speed does
        if self.compiled:
            # On a GPU with CUDA graphs: otherwise small batches are bound by launches.
            mode = os.environ.get("BENCH_TORCH_COMPILE_MODE") or ("reduce-overhead" if self.device == "cuda" else None)
            if part == "unet":
                module = torch.compile(module, mode=mode, fullgraph=True, dynamic=False)
            else:
                module.decode = torch.compile(module.decode, dynamic=False)
        self._modules[key] = module
        return module

    def prepare(self, row: BenchRow) -> tuple[dict[str, Any], Callable[[], Any]]:
        """Build the model and the inputs, and return the call that runs it and waits for it."""
        import torch

        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = configs(row.model, row.tiny)
        module = self._module(row, "vae" if row.task == "decode" else "unet")
        dtype = getattr(torch, row.dtype)
        rows = 2 * row.batch

        def normal(*shape: int) -> Any:
            return torch.randn(*shape, device=self.device).to(dtype)

        channels = found["vae"]["latent_channels"] if row.task == "decode" else found["unet"]["in_channels"]
        latents = normal(rows if row.task == "unet" else row.batch, channels, row.latents, row.latents)
        keywords: dict[str, Any] = {}
        if row.task != "decode":
            keywords["encoder_hidden_states"] = normal(rows, found["text_length"], found["unet"]["cross_attention_dim"])
        if row.task != "decode" and (width := added_width(found["unet"])):
            times = torch.full((rows, 6), 512.0, device=self.device, dtype=dtype)
            keywords["added_cond_kwargs"] = {"text_embeds": normal(rows, width), "time_ids": times}

        def predict(x: Any, t: Any) -> Any:
            if self.compiled and self.device == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            return module(x, t, **keywords, return_dict=False)[0]

        told = {"compiled_before": row in self._called}
        if row.task == "unet":
            t = torch.tensor(500, device=self.device)
            return told, self._waiting(lambda: predict(latents, t))
        if row.task == "decode":
            factor = found["vae"]["scaling_factor"]
            return told, self._waiting(
                lambda: (module.decode(latents / factor, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
            )

        from diffusers import DDIMScheduler

        config = {k: v for k, v in found["scheduler"].items() if v is not None}

        def sample() -> Any:
            scheduler = DDIMScheduler.from_config(config)
            scheduler.set_timesteps(row.steps, device=self.device)
            x = latents
            for t in scheduler.timesteps:
                uncond, cond = predict(torch.cat([x, x]), t).chunk(2)
                x = scheduler.step(uncond + 7.5 * (cond - uncond), t, x, return_dict=False)[0]
            return x

        return told, self._waiting(sample)

    def _waiting(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        import torch

        def call() -> Any:
            with torch.inference_mode():
                out = fn()
            if self.device == "cuda":
                torch.cuda.synchronize()
            return out

        return call

    def finite(self, out: Any) -> bool:
        """Return whether a result holds numbers only."""
        return bool(out.isfinite().all())

    def peak(self) -> int | None:
        """Return the most bytes of device memory held since `prepare`; None on a CPU."""
        import torch

        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None


def serve(engine: JaxEngine | TorchEngine, reply: Callable[[dict[str, Any]], None]) -> None:
    """Answer the orders on stdin until it closes; if a row fails, the reason is its answer."""
    call: Callable[[], Any] | None = None
    for line in sys.stdin:
        order = json.loads(line)
        row = BenchRow(**order["row"]) if "row" in order else None
        try:
            if order["op"] == "run":
                assert call is not None, "run before prepare"
                wall, cpu, calls = time.perf_counter(), time.process_time(), 0
                while calls == 0 or time.perf_counter() - wall < _ROUND:
                    call()
                    calls += 1
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                reply({"wall_s": wall / calls, "cpu_s": cpu / calls})
            elif order["op"] == "compile":
                assert row is not None
                reply(engine.compile(row))
            elif order["op"] == "count":
                from scripts.bench.programs import program

                assert row is not None
                reply({"flops": program(engine.name, row).flops()})
            else:
                assert row is not None
                call = None  # releases the last row's arrays
                told, call = engine.prepare(row)
                wall, cpu = time.perf_counter(), time.process_time()
                out = call()
                told |= {"first_run_s": time.perf_counter() - wall, "first_cpu_s": time.process_time() - cpu}
                told |= {"finite": engine.finite(out), "peak_bytes": engine.peak() or _peak_rss()}
                del out
                reply(told)
        except Exception as error:  # whatever it is, the other rows continue
            text = f"{type(error).__name__}: {error}".splitlines()
            reply({"reason": (text[0] if text else type(error).__name__)[:200]})


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def main(name: str, device: str) -> None:
    """Be the worker of one engine on "cpu" or "gpu"."""
    if name not in ENGINES:
        raise InputError(f"engine {name!r} is not known")
    # Libraries print to stdout, which is reserved for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        engine = (JaxEngine if name.startswith("ours") or name == "flax" else TorchEngine)(name, device)
    except Absent as absent:
        reply({"reason": str(absent)})
        return
    reply({"versions": engine.versions, "device": engine.device_name})
    with contextlib.suppress(KeyboardInterrupt):
        serve(engine, reply)


if __name__ == "__main__":
    main(*sys.argv[1:])
