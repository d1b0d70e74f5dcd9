"""VMix is free where it is used: a step of the compiled sampler does the same work with it and without."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from jaxmix import VMix
from jaxmix.pipeline.job import denoise
from jaxmix.samplers import make_solver
from jaxmix.types import InputError
from scripts.bench.programs import program
from scripts.bench.rows import BenchRow
from tests.jobs import plain_job

LABELS = {"color": ("vibrant color", "[V]"), "focus": ("sharp focus", "[T]")}
MOVES = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast"}  # name memory, and do nothing


@pytest.fixture(scope="module")
def loops(tiny_pipeline):
    """Return what the loop of the compiled sampler does, bare and with VMix."""
    pipe, n = tiny_pipeline, 2
    adapter = VMix.init(jax.random.key(0), pipe, LABELS)
    params = jax.tree.map(lambda x: x + 0.1, adapter.params)  # nothing of it is zero
    bound = VMix(adapter.config, params).bind(pipe, ["all", "color"], [1.0, 0.5])
    context = jnp.ones((n, 2, pipe.text_length, pipe.unet.config.cross_attention_dim))
    noise, scale = jnp.ones((n, *pipe.latent_shape)), jnp.full((n,), 4.0)
    solver = make_solver("ddim", pipe.schedule, 5)

    def compiled(*controls):
        job = plain_job(pipe.unet, pipe.params["unet"], noise, context, scale, controls)
        lowered = denoise.lower(job, solver)
        # What XLA makes of the program stays the same; its machine code, which nobody runs here, is not optimised.
        return lowered.compile({"xla_backend_optimization_level": "0"}).as_text()

    return {"bare": loop(compiled()), "vmix": loop(compiled(bound))}


def loop(text):
    """Return (instructions of the denoising loop, the arrays that it carries) of an HLO module."""
    known, name = {}, None
    for line in text.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = opened[1]
            known[name] = []
        elif line.startswith("}"):
            name = None
        elif name is not None and " = " in line:
            known[name].append(line)

    def reach(name):
        called = {
            m for line in known[name] for m in re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line)
        }
        return {name}.union(*(reach(other) for other in called))

    whiles = [line for lines in known.values() for line in lines if " while(" in line]
    inside = {line: reach(re.search(r"body=%?([\w.\-]+)", line)[1]) for line in whiles}
    outer = max(whiles, key=lambda line: sum(len(known[name]) for name in inside[line]))
    counts = {}
    for line in (line for name in inside[outer] for line in known[name]):
        result, operation = re.search(r" = (\(.*?\)|\S+) ([\w\-]+)\(", line).groups()
        if operation not in MOVES:
            key = operation, without_layout(result)
            counts[key] = counts.get(key, 0) + 1
    carried = re.search(r" = (\(.*?\)) while\(", outer)[1]
    return counts, sorted(re.findall(r"\w+\[[\d,]*\]", without_layout(carried)))


def without_layout(shape):
    return re.sub(r"\{[^}]*\}", "", shape)


def test_the_loop_runs_the_same_operations_on_the_same_shapes_with_vmix(loops):
    """The same operations with results of the same shapes: the same FLOPs and bytes."""
    bare, vmix = loops["bare"][0], loops["vmix"][0]
    assert sum(bare.values()) > 300 and any(name in ("dot", "convolution", "custom-call") for name, _ in bare)
    assert vmix == bare


def test_the_loop_carries_the_same_arrays_with_vmix(loops):
    assert len(loops["bare"][1]) > 50
    assert loops["vmix"][1] == loops["bare"][1]


def test_one_more_operation_in_a_loop_would_show():
    def compiled(extra):
        def body(x, i):
            return jnp.sin(x) @ x + (jnp.cos(x) @ x * i if extra else 0.0), None

        return (
            jax.jit(lambda x: jax.lax.scan(body, x, jnp.arange(5.0))[0]).lower(jnp.ones((64, 64))).compile().as_text()
        )

    without, with_extra = (loop(compiled(extra))[0] for extra in (False, True))
    assert sum(with_extra.values()) > sum(without.values()) > 0


def scans(jaxpr):
    """Return all scans of a jaxpr, those inside of scans left out."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn.params["jaxpr"].jaxpr
        else:
            for inner in jaxprs_in_params(eqn.params):
                yield from scans(getattr(inner, "jaxpr", inner))


def operations(jaxpr):
    """Return the operations of a jaxpr in order, each with the shapes of its results."""
    found = []
    for eqn in jaxpr.eqns:
        found.append((eqn.primitive.name, *(str(v.aval) for v in eqn.outvars)))
        for inner in jaxprs_in_params(eqn.params):
            found += operations(getattr(inner, "jaxpr", inner))
    return found


def test_the_loop_is_written_without_vmix():
    """Before any compiler moves what does not change out of the loop: VMix is not in it."""

    def written(engine):
        made = program(engine, BenchRow("mini", "sample", 8, 1, "float32", 3, tiny=True))
        return max(
            (operations(body) for body in scans(jax.make_jaxpr(made.fn)(made.params, made.inputs).jaxpr)), key=len
        )

    bare = written("ours")
    assert len(bare) > 300
    assert written("ours-vmix") == bare


def test_the_flops_of_vmix_do_not_grow_with_the_steps():
    def flops(engine, steps):
        return program(engine, BenchRow("sdxl", "sample", 8, 1, "float32", steps, tiny=True)).flops()

    extra = [flops("ours-vmix", steps) - flops("ours", steps) for steps in (2, 7)]
    assert extra[0] == extra[1] > 0
    assert flops("ours", 7) > 3 * flops("ours", 2) > 0


def test_a_row_without_a_sampler_has_no_vmix():
    with pytest.raises(InputError, match="expected --tasks sample"):
        program("ours-vmix", BenchRow("mini", "unet", 8, 1, "float32", 0, tiny=True))
