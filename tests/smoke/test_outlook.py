"""What the plan says before anything is compiled: programs, padding, memory, time."""

import dataclasses

from infer.batches import plan
from infer.drawing import Drawing, Started
from infer.flags import Config
from infer.job import collect_rows, complete, draw
from infer.manifest import Manifest
from infer.methods.registry import Methods
from infer.outlook import devices_of, outlook
from tests.smoke.test_generate import StandIn


def test_the_plan_says_what_a_job_takes_and_a_second_run_how_long(tmp_path, tiny_pipeline, capsys):
    rows = "".join(f'{{"prompt": "a", "steps": {2 + k // 5}}}\n' for k in range(8))
    (tmp_path / "p.jsonl").write_text(rows)
    config = Config(prompts=str(tmp_path / "p.jsonl"), out=str(tmp_path / "out"), batch_size=4)
    assert draw(config, *collect_rows(config, Methods(config)), StandIn) == 0
    out, told = capsys.readouterr()
    assert "2 buckets: 2 programs to draw with and 1 to decode with" in out
    assert "padding: 1 of 9 places (11%)" in out  # five rows are two batches of three, not four and one
    assert "expected time: unknown until the first batch is drawn" in out
    assert "for the other 5 images, as this batch took" in told
    held = [*Manifest(tmp_path / "out").images()]
    assert all(line["seconds"] >= 0 and line["devices"] == devices_of(1) for line in held)

    config = dataclasses.replace(config, out=None)
    methods = Methods(config)
    whole, _ = complete(collect_rows(config, methods)[0], tiny_pipeline, methods)
    batches = plan(config, tmp_path, whole, whole, 1, methods, tiny_pipeline)

    class Before:
        def images(self):
            settings = {**methods.settings(whole[0]), "height": 16, "width": 16}
            return [{**settings, "seconds": 90.0, "devices": devices_of(1)}]

    programs, memory, time = outlook(batches, Before(), methods, tiny_pipeline, 1, None)
    assert programs.startswith("2 buckets: 2 programs to draw with and 1 to decode")
    assert memory.startswith("memory per device: at least 0.0") and "GiB for the largest batch" in memory
    assert time.startswith("expected time: 7 min 30 s for 5 images, unknown for the other 3, as pictures here took")


def test_a_batch_beside_which_another_was_compiled_has_no_time():
    """Nor is the time of its own compiling, before the device began, counted."""
    drawing = Drawing(None, None, None, Methods(Config()), None, None, {})
    measured = drawing._measured
    alone = Started(None, None, None, since=100.0, compiled=5.0, compiling=40.0)
    assert measured(alone, now=142.0, compiled=45.0) == 2.0
    assert measured(alone, now=190.0, compiled=95.0) is None  # the next one took 50 s to compile meanwhile
    drawing._ended = 190.0, 95.0
    second = Started(None, None, None, since=140.0, compiled=45.0, compiling=50.0)
    assert measured(second, now=193.0, compiled=95.0) == 3.0
