"""The embedded ControlNets: they open by name, pictures follow their maps, and scale 0 is the model itself."""

import numpy as np
import pytest

import jaxmix
from jaxmix.methods.controlnet import EMBEDDED
from jaxmix.types import InputError
from scripts.effects.controlnets import MAPS, edges_f1, little_psnr
from train.controlnet import MASKS, scene_hint
from train.scenes import Scenes
from train.segmenter import load_segmenter

STEPS, N = 6, 8


@pytest.fixture(scope="module")
def pipe():
    return jaxmix.load("mini")


@pytest.fixture(scope="module")
def scenes():
    held = Scenes(split="held_out_pairs", seed=32, two_objects=0.0, three_objects=0.0)
    return [held[i] for i in range(N)]


@pytest.fixture(scope="module")
def plain(pipe, scenes):
    return pipe.generate([scene["caption"] for scene in scenes], range(N), STEPS)


def iou(images, wanted):
    there, masks = load_segmenter()(images) > 0.5, np.stack([scene["masks"].any(0) for scene in wanted])
    return (there & masks).sum((1, 2)) / (there | masks).sum((1, 2))


def real(scenes):
    return np.stack([scene["image"] for scene in scenes])


FIDELITY = {
    "edges": lambda images, scenes: edges_f1(images, real(scenes)),
    "tile": lambda images, scenes: little_psnr(images, real(scenes)) / 30,
    "masks": iou,
}


GAIN = {"edges": 0.08, "tile": 0.04, "masks": 0.08}  # about half of what scripts.effects.controlnets measures


@pytest.mark.parametrize("kind", MAPS)
def test_pictures_follow_their_map_and_scale_0_is_the_model_itself(pipe, scenes, plain, kind):
    if MAPS[kind] != MASKS:
        pytest.importorskip("cv2")
    net = jaxmix.ControlNet.load(f"mini-{kind}", pipe)
    captions, maps = [scene["caption"] for scene in scenes], [scene_hint(scene, MAPS[kind]) for scene in scenes]
    off, on = (pipe.generate(captions, range(N), STEPS, methods=(net.on(maps, scale),)) for scale in (0.0, 1.0))
    np.testing.assert_array_equal(off, plain)
    before, after = (FIDELITY[kind](images, scenes).mean() for images in (plain, on))
    assert after > before + GAIN[kind]


def test_all_are_there_and_another_model_is_one_clear_line(tiny_pipeline):
    assert set(EMBEDDED) == {f"mini-{kind}" for kind in MAPS}
    with pytest.raises(InputError, match="a ControlNet for another base") as error:
        jaxmix.ControlNet.load("mini-edges", tiny_pipeline)
    assert "\n" not in str(error.value)
