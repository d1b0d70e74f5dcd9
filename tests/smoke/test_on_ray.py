"""--engine ray without a cluster: what goes to the machines, what comes back, and what is wrong there.

On a cluster, with an actor that is killed: python -m scripts.kills --engine ray (scripts/README.md).
"""

import json
import os
import re
import sys

import pytest
from ray import cloudpickle

from infer import job, on_ray
from infer.flags import Config
from infer.job import collect_rows, draw
from infer.methods.registry import Methods
from infer.on_ray import Cluster, Opening, Painter, resources_of
from jaxmix.types import InputError
from tests.smoke.test_generate import StandIn, lines_of


class Machines(Cluster):
    """A cluster whose actor is here, and draws every batch twice, as after a machine was lost."""

    def __init__(self, config, methods, there):
        self._config, self._methods = config, cloudpickle.dumps(methods)
        self._opening = Opening(lambda devices, images: None, lambda config: there(), job.prepare)
        self.each, self.most, self.devices = {"CPU": 1}, 2, 1
        self.rows = ()

    def results(self, batches):
        painter = Painter(self._config, self._opening, self._methods, list(self.rows), self.devices, os.getcwd())
        for batch in batches:
            for _ in range(2):
                for block in painter({"batches": [json.dumps([on_ray._spec(batch)])]}):
                    for row, png, told in zip(block["row"], block["png"], block["told"], strict=True):
                        yield {"row": int(row), "png": png, "told": told}


def go(tmp_path, there=StandIn, **flags):
    text = '{"prompt": "a", "seed": -1}\n{"prompt": "b"}\n{"prompt": "c", "steps": 2}\nx\n{"prompt": "e"}\n'
    (tmp_path / "p.jsonl").write_text(text)
    config = Config(prompts=str(tmp_path / "p.jsonl"), out=str(tmp_path / "out"), batch_size=2, **flags)
    methods = Methods(config)
    rows, bad = collect_rows(config, methods)
    engine = Machines(config, methods, there) if config.on_ray else None
    return draw(config, rows, bad, StandIn, None, methods, engine=engine), tmp_path / "out"


def timeless(out):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines_of(out)]


def test_a_cluster_draws_what_this_process_draws_and_every_picture_once(tmp_path):
    status, out = go(tmp_path, engine="ray")
    drawn = {path.name: path.read_bytes() for path in out.glob("0*.png")}
    lines = timeless(out)
    assert status == 2 and len(drawn) == 4 and len(lines) == 5
    for path in out.glob("0*.png"):
        path.unlink()
    (out / "manifest.jsonl").unlink()
    status, _ = go(tmp_path)  # the engine is no part of the job: fresh seeds are the same
    assert status == 2 and drawn == {path.name: path.read_bytes() for path in out.glob("0*.png")}
    assert timeless(out) == lines


class Other(StandIn):
    default_steps = 5


class Fails(StandIn):
    def draw(self, *arguments, **more):
        raise InputError("this machine cannot")


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (Other, "row 0: found other pictures or another model than where rows are read"),
        (Fails, "this machine cannot"),
    ],
)
def test_what_is_wrong_on_a_machine_is_one_line(tmp_path, there, words):
    with pytest.raises(InputError, match=rf"--engine ray: on machine \S+: .*{re.escape(words)}"):
        go(tmp_path, there, engine="ray")


def test_resources_are_named_as_ray_names_them():
    assert resources_of("TPU=4, cpu=8") == {"TPU": 4, "CPU": 8}
    assert on_ray._options({"TPU": 4, "CPU": 8}) == {"num_cpus": 8, "resources": {"TPU": 4}}
    assert on_ray._options({"GPU": 1}) == {"num_gpus": 1}
    for text in ("TPU", "TPU=", "=4", "TPU=0", "TPU=-1", "TPU=inf", "TPU=nan", "TPU=4,TPU=8", "", "a b=1"):
        with pytest.raises(InputError, match="--resources: found"):
            resources_of(text)
    hosts = [{"CPU": 96, "TPU": 4}, {"CPU": 96, "TPU": 4}, {"CPU": 8}]
    assert on_ray._usual(hosts) == {"TPU": 4} and on_ray._usual([{"CPU": 8, "GPU": 2}]) == {"GPU": 1}
    assert on_ray._usual([{"CPU": 8}]) == {"CPU": 1}
    assert [on_ray._fitting({"TPU": 4, "CPU": 50}, host) for host in hosts] == [1, 1, 0]


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch):
    def init(**flags):
        raise ConnectionError("Ray is trying to start at 10.0.0.1:6379,\nbut it is not running")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("ray.init", init)
    words = "--engine ray: found no cluster (RAY_ADDRESS=10.0.0.1:6379): Ray is trying to start at 10.0.0.1:6379, but"
    with pytest.raises(InputError, match=re.escape(words)):
        Cluster(Config(prompt="x", engine="ray"), Opening(print, print, print))


def test_without_ray_the_engine_is_one_line_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=re.escape("pip install 'jaxmix-diffusion[ray]'")):
        Cluster(Config(prompt="x", engine="ray"), Opening(print, print, print))
