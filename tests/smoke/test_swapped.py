"""Whether a denoiser heeds places: each scene beside the caption that says the opposite."""

import dataclasses

import numpy as np
import pytest

import jaxmix
from jaxmix.types import InputError
from scripts.mini import swapped
from train.scenes import Plan, Scenes

CFG = swapped.Config(scenes=2, timesteps=[900], batch_size=2)
KINDS = ("one object, its place", "two objects, a place each", "two objects, their relation")


def test_the_opposite_has_the_other_place_or_the_objects_the_other_way_round():
    scenes = Scenes()
    for plan, words in (
        (Plan("3d", (0,), "sea", places=("at the top",)), "an apple at the bottom"),
        (Plan("3d", (0, 5), "sea", relation="above"), "a house above an apple"),
        (
            Plan("3d", (0, 5), "sea", places=("at the left", "at the right")),
            "a house at the left and an apple at the right",
        ),
    ):
        kind, other = swapped.swapped(plan)
        assert kind in KINDS and scenes.caption(other) == f"a 3d render of {words} by the sea"
    assert swapped.swapped(Plan("3d", (0,), "sea")) is None
    assert swapped.swapped(Plan("3d", (0,), "sea", places=("in the middle",))) is None


@pytest.fixture(scope="module")
def folder(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline.save(folder)
    return str(folder)


def test_captions_that_mean_the_same_make_no_difference(folder, capsys, monkeypatch):
    def rows():
        assert swapped.main(dataclasses.replace(CFG, model=folder)) == 0
        found = [line for line in capsys.readouterr().out.splitlines() if ", t 900: " in line]
        assert tuple(line.split(", t 900")[0] for line in found) == KINDS
        return [line.split("loss ")[1].split(", swapped ") for line in found]

    assert all(0 < float(true) < 10 for true, _ in rows())
    encode = jaxmix.Pipeline.encode_text
    monkeypatch.setattr(jaxmix.Pipeline, "encode_text", lambda pipe, texts: encode(pipe, ["a cat"] * len(texts)))
    for true, rest in rows():
        assert rest.startswith(f"{true}, difference +0.0000 ±0.0000, the true caption better in 0 %")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scenes": 1}, "scenes: found 1, expected 2 or more"),
        ({"timesteps": [5, 1000]}, r"timesteps: found \[1000\], expected 0 to 999"),
        ({"timesteps": []}, "timesteps: found none"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, change, said):
    with pytest.raises(InputError, match=said):
        swapped.main(dataclasses.replace(CFG, model=folder, **change))


def test_the_noise_is_the_same_whatever_the_caption_and_the_loss_is_not(tiny_pipeline):
    latents = np.zeros((2, *tiny_pipeline.latent_shape), np.float32)
    states = np.asarray(tiny_pipeline.encode_text(["a cat", "a car"]).last_hidden_state)
    one, two = (swapped.losses(tiny_pipeline, latents, states, 900, CFG) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert one.shape == (2,) and (one > 0).all()
    assert (swapped.losses(tiny_pipeline, latents, states[::-1], 900, CFG) != one).all()
