"""infer.generate around a stand-in for the pipeline: files, messages and exit statuses, in milliseconds."""

import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from infer.flags import Config
from infer.generate import main
from infer.job import choose_mesh, collect_rows, draw
from infer.manifest import Manifest
from infer.measure import CompileClock
from infer.methods.registry import Methods
from infer.png import read_settings, setting_chunks, write_png
from jaxmix.command import parse
from jaxmix.schedule import NoiseSchedule
from jaxmix.types import InputError
from tests.jobs import only, unmarked


class StandIn:
    """Draw a flat colour that is a function of the row's settings; counts what it was asked for."""

    default_steps = 4
    default_guidance_scale = 3.0
    sampler = "ddim"
    latent_shape = (4, 4, 2)
    schedule = NoiseSchedule()
    vae = SimpleNamespace(config=SimpleNamespace(factor=4))
    most = 8  # images in memory at once

    def __init__(self):
        self.calls = []

    encoders = ()
    text_encoder_2 = None

    def chunks(self, encoder, prompts, reading):
        return [SimpleNamespace(ids=[0] * max(1, -(-len(prompt.split()) // 5))) for prompt in prompts]

    def draw(self, request, methods, mesh, tile, output):
        assert output == "device" and not methods
        if len(request.prompts) > self.most:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")
        assert len(request.prompts) == len(request.seeds) == len(request.guidance_scale) == len(request.negatives)
        self.calls.append((request.steps, list(request.seeds)))
        self.request = request
        latents = np.array([np.full((4, 4, 2), (seed * 7 + request.steps) % 256) for seed in request.seeds], np.float32)
        return self.decode(latents)

    def has_layers(self, text):
        return False

    def check_size(self, h, w, tile, encodes, guided):
        pass

    def decode(self, latents):
        return np.repeat(latents.repeat(4, 1).repeat(4, 2)[..., :1], 3, axis=-1) / np.float32(255)


def job(tmp_path, text, name="p.jsonl", pipe=None, **settings):
    path = tmp_path / name
    path.write_text(text)
    config = Config(prompts=str(path), out=str(tmp_path / "out"), **settings)
    pipe = pipe or StandIn()
    methods = Methods(config)
    rows, bad = collect_rows(config, methods)
    return draw(config, rows, bad, lambda: pipe, None, methods), pipe, tmp_path / "out"


def lines_of(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def test_every_row_gets_a_png_with_its_own_settings(tmp_path):
    text = '{"prompt": "a cat", "seed": 5}\n'
    text += '{"prompt": "a dög, one", "steps": 2, "negative_prompt": "blur", "id": "d"}\n'
    status, _, out = job(tmp_path, text, seed=100)
    assert status == 0
    first, second = (read_settings(only(out, name)) for name in ("0000_seed5.png", "0001_seed101.png"))
    assert (first["prompt"], first["seed"], first["steps"], first["guidance_scale"]) == ("a cat", 5, 4, 3.0)
    assert (second["prompt"], second["steps"], second["id"]) == ("a dög, one", 2, "d")
    with Image.open(only(out, "0001_seed101.png")) as image:
        assert np.asarray(image)[0, 0, 0] == (101 * 7 + 2) % 256  # the picture of this row, not of its neighbour
        assert image.info["parameters"].split("\n") == [
            "a dög, one",
            "Negative prompt: blur",
            "Steps: 2, Sampler: DDIM, CFG scale: 3, Seed: 101, Size: 16x16, Model: mini",
        ]
    assert [(line["status"], unmarked(line["file"]), line["latents"]) for line in lines_of(out)] == [
        ("ok", "0000_seed5.png", [4, 4, 2]),
        ("ok", "0001_seed101.png", [4, 4, 2]),
    ]
    assert (out / "contact_sheet.png").exists()
    assert not list(out.glob(".*"))


def test_rows_are_batched_by_steps_and_a_short_batch_is_filled_up(tmp_path):
    text = "\n".join(json.dumps({"prompt": "x", "steps": 2 + 5 * (k == 1)}) for k in range(6))
    _, pipe, out = job(tmp_path, text, batch_size=2)
    assert pipe.calls == [(2, [0, 2]), (2, [3, 4]), (2, [5, 5]), (7, [1])]
    assert len(list(out.glob("0*.png"))) == 6


def test_bad_rows_are_listed_and_the_others_drawn(tmp_path, capsys):
    text = '{"prompt": "a"}\nnot json\n{"prompt": "c", "steps": 1001}\n{"prompt": "d"}\n'
    status, _, out = job(tmp_path, text)
    assert status == 2
    assert sorted(unmarked(path.name) for path in out.glob("0*.png")) == ["0000_seed0.png", "0003_seed3.png"]
    errors = [line for line in lines_of(out) if line["status"] == "error"]
    assert [(line["row"], line["where"]) for line in errors] == [(1, "p.jsonl:2"), (2, "p.jsonl:3")]
    listed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bad row: ")]
    assert listed[0].startswith("bad row: p.jsonl:2: not JSON")
    assert listed[1] == "bad row: p.jsonl:3: steps: found 1001, expected a whole number from 1 to 1000"
    assert "p.jsonl:2: not JSON" in (out / "gallery.html").read_text()


@pytest.mark.parametrize(("text", "settings"), [("a\n\n", {"strict": True}), ("\n\n", {})])
def test_nothing_is_drawn_when_strict_or_all_rows_are_bad(tmp_path, capsys, text, settings):
    with pytest.raises(InputError):
        job(tmp_path, text, name="p.txt", **settings)
    assert not (tmp_path / "out").exists()
    assert "empty line" in capsys.readouterr().err


def test_long_prompts_are_drawn_unless_the_flag_says_how_long_they_may_be(tmp_path, capsys):
    text = "one two three four five six seven\na cat\n(a cat:nan)\n"
    status, pipe, out = job(tmp_path, text, name="p.txt")
    assert status == 2 and len(pipe.calls) == 2  # a program for each number of chunks
    long, short, bad = sorted(lines_of(out), key=lambda r: r["row"])
    assert (long["chunks"], long["prompt_syntax"]) == (2, "a1111") and "chunks" not in short
    assert bad["row"] == 2 and "prompt: found the weight 'nan' at character 8" in json.dumps(bad)
    (tmp_path / "more").mkdir()
    status, _, out = job(tmp_path / "more", text, name="p.txt", max_chunks=1)
    expected = "bad row: p.txt:1: prompt: found 2 chunks of tokens, expected at most 1, the flag --max-chunks"
    assert status == 2 and expected in capsys.readouterr().err.splitlines()


def test_what_a_picture_depends_on_is_told_and_nothing_else(tmp_path):
    rows = [
        {"prompt": "a (cat:1.2)"},
        {"prompt": "a cat", "clip_skip": 0},
        {"prompt": "a (cat:1.2)", "prompt_syntax": "plain"},
    ]
    status, pipe, out = job(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    told = sorted(lines_of(out), key=lambda r: r["row"])
    assert status == 0 and [row.get("prompt_syntax") for row in told] == ["a1111", None, None]
    assert not {"clip_skip", "prompt_2", "negative_prompt_2", "chunks"} & {key for row in told for key in row}
    assert pipe.request.syntax == "plain" and pipe.request.max_chunks is None


def test_resume_draws_only_what_is_missing_or_changed(tmp_path):
    text = "\n".join(json.dumps({"prompt": f"p{k}"}) for k in range(4)) + "\nbad\n"
    _, _, out = job(tmp_path, text, resume=True)
    only(out, "0001_seed1.png").unlink()
    whole = only(out, "0002_seed2.png").read_bytes()
    only(out, "0002_seed2.png").write_bytes(whole[:-20])
    with (out / "manifest.jsonl").open("a") as file:
        file.write('{"row": 3, "sta')  # the end of a run that was killed
    status, pipe, _ = job(tmp_path, text.replace("p3", "changed"), resume=True)
    assert status == 2
    assert pipe.calls == [(4, [1, 2, 3, 3])]  # in the batch of four that is compiled already
    assert only(out, "0002_seed2.png").read_bytes() == whole
    both = [read_settings(path)["prompt"] for path in out.glob("0003_seed3_*.png")]
    assert sorted(both) == ["changed", "p3"]  # what the row was before stays
    assert (out / "manifest.jsonl").read_text().count('"status": "error"') == 1  # not added again
    _, pipe, _ = job(tmp_path, text.replace("p3", "changed"), resume=True)
    assert pipe.calls == []
    assert (out / "gallery.html").read_text().count("<article>") == 4


def test_a_dry_run_prints_the_plan_and_writes_no_image(tmp_path, capsys):
    status, pipe, out = job(tmp_path, "a\nb\nc\n", name="p.txt", dry_run=True, batch_size=2)
    assert status == 0 and pipe.calls == []
    assert "4 steps of ddim, 16x16: 3 images in 2 batches of 2" in capsys.readouterr().out
    assert not (out / "manifest.jsonl").exists()


def test_the_last_line_tells_speed_compiling_and_how_long_the_device_waited(tmp_path, capsys):
    job(tmp_path, "a\nb\n", name="p.txt")
    captured = capsys.readouterr()
    last = captured.out.splitlines()[-1]
    assert last.startswith("2 images in ")
    for part in ("images/s", "compile ", "PNG ", "the device waited "):
        assert part in last
    assert "compile cache: on" in captured.err


def test_captions_cannot_break_the_gallery(tmp_path):
    _, _, out = job(tmp_path, "<script>@ITEMS@</script> & co\n", name="p.txt")
    page = (out / "gallery.html").read_text()
    assert "&lt;script&gt;@ITEMS@&lt;/script&gt; &amp; co" in page
    assert page.count("<article>") == 1
    assert "http" not in page  # nothing from outside


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--steps", "0"], "--steps: found 0, expected a whole number of at least 1"),
        (["--step", "3"], "unknown flag --step; did you mean 'steps'"),
        (["--seed=-2"], "--seed: found -2, expected"),
        (["--batch-size", "0"], "--batch-size: found 0, expected at least 1"),
        (["--devices", "0"], "--devices: found 0, expected at least 1"),
        (["--guidance-scale", "nan"], "--guidance_scale: found nan, expected float or null"),
        (["--prompt", "a", "--prompts", "b"], "found both, expected one of them"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, found):
    with pytest.raises(InputError) as error:
        parse(main, flags)
    assert found in str(error.value) and "\n" not in str(error.value)


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(InputError, match=r"--devices: found 1000, expected at most the \d+ here \(cpu\)"):
        choose_mesh(1000, images=1)


def test_a_single_image_takes_a_single_device():
    assert choose_mesh(None, images=1) is None


def test_the_built_in_prompts_are_all_good():
    rows, bad = collect_rows(Config(), Methods(Config()))
    assert len(rows) == 24 and not bad


def test_compile_seconds_count_nested_tracing_once():
    with CompileClock() as clock:
        jax.jit(lambda x: jax.jit(lambda y: y * 2 + len(str(clock.programs)))(x) + 1)(np.float32(1)).block_until_ready()
    spans = clock._spans
    assert clock.seconds > 0 and all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    counted = clock.seconds
    jax.jit(lambda x: x * 3)(np.float32(1)).block_until_ready()
    assert clock.seconds == counted


def test_a_model_name_with_a_comma_stays_one_value(tmp_path):
    settings = {"prompt": "x", "negative_prompt": "", "seed": 1, "steps": 2, "guidance_scale": 1.5}
    settings |= {"model": "a, b: c", "sampler": "ddim"}
    chunks = setting_chunks(settings, (8, 8))
    assert chunks["parameters"].endswith('Model: "a, b: c"')
    write_png(tmp_path / "x.png", np.zeros((8, 8, 3), np.uint8), chunks)
    assert read_settings(tmp_path / "x.png") == settings
    with Manifest(tmp_path) as manifest:
        assert manifest.holds("x.png", settings)  # though it has no line yet


def test_sizes_and_pictures_reach_the_pipeline(tmp_path):
    for name, mode in (("start.png", "RGB"), ("mask.png", "L")):
        Image.new(mode, (13, 9), 255).save(tmp_path / name)
    settings = {"image": str(tmp_path / "start.png"), "mask": str(tmp_path / "mask.png"), "strength": 0.5}
    row = {"prompt": "x", "sampler": "euler", "guidance_rescale": 0.7, **settings}
    status, pipe, out = job(tmp_path, json.dumps(row))
    assert status == 0
    # The picture is 13 x 9, which is cut down to multiples of the factor 4.
    assert pipe.request.images.shape == (1, 8, 12, 3) and pipe.request.masks.shape == (1, 8, 12)
    named = {key: getattr(pipe.request, key) for key in ("sampler", "height", "width", "strength", "guidance_rescale")}
    assert named == {"sampler": "euler", "height": 8, "width": 12, "strength": 0.5, "guidance_rescale": [0.7]}
    assert lines_of(out)[0]["image"] == settings["image"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"height": 10}, "height: found 10, expected a multiple of 4 pixels"),
        ({"strength": 0.1, "steps": 4, "image": True}, "strength is 0.1 with 4 steps: no step is left"),
        ({"image": "text"}, "not a readable picture"),
    ],
)
def test_a_row_that_the_model_cannot_draw_is_named(tmp_path, capsys, row, reason):
    Image.new("RGB", (8, 8)).save(tmp_path / "start.png")
    (tmp_path / "text.png").write_text("no picture")
    if "image" in row:
        row["image"] = str(tmp_path / ("start.png" if row["image"] is True else "text.png"))
    status, _, _ = job(tmp_path, json.dumps({"prompt": "x"}) + "\n" + json.dumps({"prompt": "y", **row}))
    assert status == 2
    assert [line for line in capsys.readouterr().err.splitlines() if reason in line]
