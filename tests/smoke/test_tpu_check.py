"""scripts.tpu_check: what is planned, estimated and said; a small model compiled for a v5e where libtpu is there."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from jaxmix.types import InputError
from scripts.bench.rows import ADAPTERS, METHODS
from scripts.tpu_check import __main__ as command
from scripts.tpu_check import compiling
from scripts.tpu_check.cases import CHIPS, GIB, Case, plan
from scripts.tpu_check.compiling import collectives, in_process
from scripts.tpu_check.largest import complaints, estimate, name_of, of_size, wanted
from scripts.tpu_check.table import markdown

ROOT = Path(__file__).resolve().parents[2]
PLAIN = Case("sample", "sd15", "ours", "v5e")
FULL = Case("train", "sd15", "dreambooth", "v5e")
NO_LIBTPU = importlib.util.find_spec("libtpu") is None


def program(peak, **more):
    """Return the run of a program that needs so many GiB."""
    found = {"peak_bytes": int(peak * GIB), "argument_bytes": GIB, "temp_bytes": GIB, "output_bytes": 0}
    found |= {"devices": 4, "device_kind": "TPU v5 lite", "parts": {"weights": GIB}, "flops": 1.97e12}
    return found | {"xla_flops": 1e12, "xla_bytes": 1e9, "collectives": {}, "compile_s": 1.0} | more


def linear(case, runs, grow, base, most=None):
    """Compile what is wanted of a program of base + grow x batch GiB; return the sizes, in their order."""
    asked = []
    while (size := wanted(case, runs)) is not None:
        asked.append(size)
        need = base / size[1] + grow * size[0]
        over = need > 15.75 or (most is not None and size[0] > most)
        full = {"used_bytes": int(need * GIB), "devices": 4, "parts": {"weights": int(base * GIB)}}
        runs[name_of(*size)] = full if over else program(need)
    return asked


def test_every_sampler_and_every_trainer_is_compiled_for_a_v5e_and_the_largest_for_all():
    cases = plan(["sd15", "sdxl"], ["v5e", "v5p", "v6e"], [])
    of = {chip: {(c.kind, c.name) for c in cases if c.chip == chip and c.model == "sd15"} for chip in CHIPS}
    assert {("sample", name) for name in ("ours", *ADAPTERS, *METHODS)} <= of["v5e"]
    trainers = {"vmix", "ip_adapter", "controlnet", "style_adapter", "lora", "dreambooth"}
    assert {name for kind, name in of["v5e"] if kind == "train"} >= trainers
    few = {("sample", "ours"), ("sample", "ours-together"), ("train", "dreambooth")}
    assert of["v5p"] == of["v6e"] == few
    with pytest.raises(InputError, match=r"--only: 'lorra' is not known; did you mean 'lora'"):
        plan(["sd15"], ["v5e"], ["lorra"])


def test_collectives_are_counted_with_tuples_and_starts_and_not_twice():
    text = """
  %all-reduce.1 = (f32[8]{0:T(256)}, f32[4]{0}) all-reduce(%a, %b), channel_id=1
  %all-gather-start.2 = (f32[8]{0}, f32[32]{0}) all-gather-start(f32[8]{0} %c), dimensions={0}
  %all-gather-done.2 = f32[32]{0} all-gather-done((f32[8]{0}, f32[32]{0}) %all-gather-start.2)
  %x = f32[8]{0} add(%all-reduce.1, %all-gather-done.2)
  ROOT %r = f32[8]{0:T(256)} all-reduce(%x), to_apply=%sum
"""
    assert collectives(text) == {"all-reduce": 2, "all-gather": 1}


def test_the_largest_batch_is_estimated_from_two_sizes_and_confirmed_by_one():
    runs = {}
    assert linear(PLAIN, runs, grow=0.1, base=1.75) == [(1, 1), (4, 1), (140, 1)]
    assert not complaints(PLAIN, runs)
    assert wanted(PLAIN, {"1": program(1.0), "4": program(2.0)}, confirm=False) is None


def test_an_estimate_that_does_not_fit_is_followed_by_one_below():
    runs = {}
    assert linear(PLAIN, runs, grow=0.1, base=1.75, most=130) == [(1, 1), (4, 1), (140, 1), (125, 1)]
    assert estimate(PLAIN, of_size(runs, 1)) == 139


def test_weights_of_a_step_are_split_where_it_does_not_fit_and_a_sampler_says_by_how_much():
    runs = {}
    assert linear(FULL, runs, grow=1.5, base=16)[:3] == [(1, 1), (1, 4), (2, 4)]
    assert not complaints(FULL, runs)
    runs = {}
    assert linear(PLAIN, runs, grow=1.5, base=16) == [(1, 1)]
    (line,) = complaints(PLAIN, runs)
    assert line == (
        "v5e sd15 sample plain: 1 a device needs 17.50 GiB, 1.75 GiB (1,879,048,192 bytes) more than the 15.75 of a "
        "v5e: weights 16.00, what the program holds meanwhile 1.50"
    )


def test_a_sampler_that_communicates_is_named():
    runs = {"1": program(2.0, collectives={"all-to-all": 5})}
    assert complaints(PLAIN, runs) == ["v5e sd15 sample plain: found all-to-all in a sampler, expected no collective"]


def test_what_was_compiled_is_kept_and_what_failed_is_tried_again(tmp_path, monkeypatch, capsys):
    asked, out = [], tmp_path / "found.json"

    def answer(case, batch, fsdp, told, timeout):
        asked.append((case.title, batch))
        return {"reason": "killed"} if len(asked) == 2 else program(1.75 + 0.1 * batch)

    monkeypatch.setattr(compiling, "in_process", answer)
    monkeypatch.setattr(compiling, "look_up", lambda *_: 4)
    config = command.Config(models="sd15", chips="v5e", only="plain,dense", out=str(out))
    assert command.main(config) == 1
    assert "v5e sd15 sample plain: 4: killed" in capsys.readouterr().err
    done = len(asked)
    assert command.main(config) == 0
    assert asked[done:] == [("plain", 4), ("plain", 140)]
    text = out.with_suffix(".md").read_text()
    assert "| SD 1.5 | sample: plain | 1 | 1.00 | 1.00 | 1.85 | 140 (15.75) | 1.97 | 1.0 | 10.0 (products) |" in text
    assert "- v5e, SD 1.5: sample together, sample vmix" in text
    with pytest.raises(InputError, match=r"found results of .*'effort': -1\.0.*expected those of .*'effort': 1\.0"):
        command.main(command.Config(models="sd15", effort=1.0, out=str(out)))
    out.write_text("[]")
    with pytest.raises(InputError, match="found something else than results"):
        command.main(config)


def test_the_table_says_what_is_missing_and_does_not_fit():
    told = {"jax": "0.10.2", "effort": -1.0, "tiny": False, "topology": ""}
    runs = {PLAIN.key: {"1": {"used_bytes": 20 * GIB, "devices": 4, "parts": {"weights": 2 * GIB}}}}
    text = markdown({"told": told, "date": "2026-11-27", "runs": runs})
    assert "What does not fit or compile:\n\n- v5e sd15 sample plain: 1 a device needs 20.00 GiB" in text


def test_a_topology_that_does_not_exist_is_one_line_and_status_2(tmp_path):
    arguments = ["--models=sd15", "--chips=v5e", "--only=plain", "--topology=v9z:2x2", f"--out={tmp_path / 'x.json'}"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.tpu_check", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: topology v9z:2x2: ") and "expected a name such as" in line


@pytest.mark.skipif(NO_LIBTPU, reason='no libtpu: pip install "jax[tpu]"')
def test_a_small_model_compiles_for_four_tpu_chips_without_a_collective():
    told = {"tiny": True, "topology": "", "effort": -1.0}
    found = in_process(PLAIN, 1, 1, told, 300)
    assert found.get("collectives") == {} and found["devices"] == 4, found
    assert found["peak_bytes"] > found["argument_bytes"] >= found["parts"]["weights"] > 0
    assert 0.5 < found["xla_flops"] / found["flops"] < 2


def test_results_go_to_a_json_file(tmp_path):
    with pytest.raises(InputError, match=r"--out: found .*x\.md', expected a \.json file"):
        command.main(command.Config(out=str(tmp_path / "x.md")))
