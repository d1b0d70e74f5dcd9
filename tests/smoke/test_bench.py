"""scripts.bench and scripts.bench.memory on shrunk models: rows, reasons, statistics, and one real run."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxmix.types import InputError
from scripts.bench import profile
from scripts.bench.changes import CHANGES, without
from scripts.bench.ours import Program
from scripts.bench.programs import program
from scripts.bench.rows import MODELS, PRESETS, BenchRow, configs, names, numbers, plan
from scripts.bench.table import markdown, peak_tflops, ratio, summary

ROOT = Path(__file__).resolve().parents[2]


def rounds(*pairs):
    return [{"wall_s": wall, "cpu_s": cpu} for wall, cpu in pairs]


def run(*arguments):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_round_without_its_cores_is_marked_and_left_out():
    found = summary(rounds((1.0, 2.0), (1.1, 2.2), (3.0, 3.0)))
    assert found == {"median_s": 1.05, "min_s": 1.0, "max_s": 1.1, "timed": 2, "disturbed": 1}


def test_disturbed_rounds_stay_where_they_are_the_most():
    found = summary(rounds((1.0, 2.0), (3.0, 3.0), (4.0, 4.0)))
    assert found["median_s"] == 3.0 and found["timed"] == 3 and found["disturbed"] == 2


def test_rounds_of_a_gpu_are_never_marked():
    assert summary(rounds((1.0, 1.0), (1.0, 0.1)), cores=False)["disturbed"] == 0


def test_a_ratio_above_one_means_that_ours_is_faster():
    assert ratio({"ours": {"median_s": 2.0}, "flax": {"median_s": 3.0}}, "flax") == 1.5
    assert ratio({"ours": {"median_s": 2.0}, "flax": {"reason": "absent"}}, "flax") is None


def test_the_peak_is_that_of_the_named_device_in_bfloat16():
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4
    assert peak_tflops("NVIDIA H100 PCIe", "bfloat16") == 756
    assert peak_tflops("NVIDIA H100 80GB HBM3", "float32") is None
    assert peak_tflops("cpu", "bfloat16") is None


def test_an_empty_cell_has_its_reason_below_the_table():
    row = {"model": "sd15", "task": "unet", "latents": 64, "batch": 1, "steps": 0, "tiny": False}
    cell = {"median_s": 2.0, "min_s": 1.0, "max_s": 3.0, "disturbed": 0, "peak_bytes": 2**30}
    machine = {"device": "cpu", "cpu": "c", "cores": 2, "memory_gb": 1.0}
    text = markdown(
        {
            "engines": ["ours", "flax"],
            "rows": [{**row, "engines": {"ours": cell, "flax": {"reason": "diffusers is not installed"}}}],
            "machine": machine,
            "versions": {},
            "date": "",
            "dtype": "float32",
        }
    )
    assert "| sd15 | unet | 64x64 | 1 | 2 s (1 s-3 s) |  |  |" in text
    assert "- flax, all rows: diffusers is not installed" in text


def test_the_gpu_preset_has_every_row_of_its_goals_with_decoding_last():
    preset = PRESETS["gpu"]
    rows = plan(preset, ("sd15", "sdxl"), ("unet", "sample", "decode"), (), (), "bfloat16", 25, False)
    goals = {
        (m, t, s, n) for m, s in (("sd15", 64), ("sdxl", 128)) for t in ("unet", "sample", "decode") for n in (1, 8)
    }
    assert {(r.model, r.task, r.latents, r.batch) for r in rows} == goals
    assert [r.task == "decode" for r in rows] == [False] * 8 + [True] * 4
    assert preset.max_seconds < 600


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tiny", [False, True])
def test_our_models_take_the_configurations_that_are_timed(model, tiny):
    from jaxmix.models import UNetConfig, VAEConfig

    found = configs(model, tiny)
    UNetConfig.from_dict(found["unet"])
    VAEConfig.from_dict(found["vae"])


def test_flops_of_loops_and_nested_functions_are_counted_in_full():
    def fn(params, inputs):
        w = params["kernel"]
        x = jax.lax.fori_loop(0, 3, lambda i, x: jax.jit(jnp.dot)(x, w), inputs["x"])
        image = x.reshape(1, 4, 4, 1)
        return jax.lax.conv_general_dilated(
            image, jnp.ones((3, 3, 1, 2)), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    made = Program(fn, {"kernel": shape}, {"x": shape})
    assert made.flops() == 3 * 2 * 4 * 4 * 4 + 2 * (4 * 4 * 2) * 9


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: names("engines", "our", ("ours", "flax")), "did you mean 'ours'"),
        (lambda: names("models", " ,", ("mini",)), "expected one or more of mini"),
        (lambda: numbers("latents", "64,x"), "expected positive integers"),
        (lambda: numbers("batch", "0"), "expected positive integers"),
    ],
)
def test_a_bad_list_names_its_flag(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_every_row_has_a_name_of_its_own():
    preset = PRESETS["cpu"]
    rows = plan(preset, MODELS, ("unet", "sample", "decode"), (), (), "float32", 25, False)
    assert len({row.name for row in rows}) == len(rows) == 12


def test_a_bad_engine_is_one_line_and_status_2():
    done = run("scripts.bench", "--engines", "ours,flox")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: --engines: 'flox' is not known; did you mean 'flax'?\n"


@pytest.mark.slow
def test_a_tiny_run_times_ours_and_writes_its_rounds(tmp_path):
    out = tmp_path / "bench.json"
    done = run("scripts.bench", "--tiny", "--engines=ours", "--tasks=unet", "--rounds=2", f"--out={out}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    cell = row["engines"]["ours"]
    assert len(cell["rounds"]) == 2 and 0 < cell["min_s"] <= cell["median_s"] <= cell["max_s"]
    assert cell["first_call_s"] > cell["second_process_s"] > 0
    assert "| mini (tiny) | unet | 8x8 | 4 |" in done.stdout


def test_memory_of_a_tiny_program_is_told_for_the_cpu(tmp_path):
    out = tmp_path / "memory.json"
    arguments = (
        "--target=cpu",
        "--tiny",
        "--models=mini",
        "--tasks=sample",
        "--engines=ours,ours-dense",
        "--batch=1",
        "--steps=2",
    )
    done = run("scripts.bench.memory", *arguments, "--dtype=float32", f"--out={out}")
    assert done.returncode == 0, done.stderr
    cells = json.loads(out.read_text())["rows"][0]["engines"]
    assert cells["ours-dense"]["peak_bytes"] > cells["ours"]["peak_bytes"] > cells["ours"]["weight_bytes"] > 0
    assert BenchRow("mini", "sample", 8, 1, "float32", 2, True).name in done.stderr


def lowered(platform):
    # 32x32: attention over 1024 tokens, means of large images, convolutions down to 4x4.
    row = BenchRow("sd15", "unet", 32, 1, "float32", 0)
    return program("ours", row).trace().lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture(scope="module")
def now():
    return {platform: lowered(platform) for platform in ("cpu", "tpu")}


@pytest.mark.parametrize("name", [*CHANGES, "all"])
def test_an_undone_change_is_another_program(name, now):
    platform = "tpu" if name == "products" else "cpu"
    with without(name):
        assert lowered(platform) != now[platform]


def test_what_was_undone_comes_back(now):
    with without("all"):
        pass
    assert lowered("cpu") == now["cpu"]


def test_changes_of_a_tiny_program_are_timed_one_by_one(tmp_path):
    out = tmp_path / "changes.json"
    arguments = (
        "--tiny",
        "--models=mini",
        "--latents=8",
        "--rounds=1",
        "--changes=small-convolutions,means",
        f"--out={out}",
    )
    done = run("scripts.bench.changes", *arguments)
    assert done.returncode == 0, done.stderr
    variants = json.loads(out.read_text())["rows"][0]["variants"]
    assert list(variants) == ["", "small-convolutions"] and all(cell["median_s"] > 0 for cell in variants.values())
    assert "without the column that keeps convolutions" in done.stdout
    assert "without products for the means of norms: the same program, not timed" in done.stderr


def test_an_unknown_change_is_one_line_and_status_2():
    done = run("scripts.bench.memory", "--without=product")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: --without: 'product' is not known; did you mean 'products'?\n"


def test_a_profile_names_every_convolution_and_its_work(capsys):
    assert profile.main(profile.Config(tiny=True, latents=8, batch=1, calls=2)) == 0
    told = capsys.readouterr().out
    assert "| convolutions |" in told and "| products |" in told and "GFLOP/s" in told
    text = """
  %x = f32[2,8,8,3]{3,2,1,0} parameter(0)
  %k = f32[3,3,3,5]{3,2,1,0} parameter(1)
  ROOT %conv = f32[2,8,8,5]{3,2,1,0} convolution(%x, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"""
    assert profile.convolutions(text) == {"conv": 2 * 2 * 8 * 8 * 5 * 9 * 3}
    with pytest.raises(InputError, match="calls: found 0, expected 1 or more"):
        profile.Config(calls=0)
