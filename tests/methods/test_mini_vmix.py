"""The embedded adapter: it opens, it does what its labels say, and it fits the embedded model alone."""

import numpy as np
import pytest

import jaxmix
from jaxmix.types import InputError
from train.scenes import DIMENSIONS, measure

CAPTIONS = ["a 3d render of a cat by the sea", "an ink drawing of a car on a plain red background"] * 4
SEEDS = range(8)


@pytest.fixture(scope="module")
def pipe():
    return jaxmix.load("mini")


@pytest.fixture(scope="module")
def adapter():
    return jaxmix.VMix.load("mini-vmix")


def test_it_has_the_labels_of_the_scenes_and_a_lora(adapter):
    assert adapter.config.dimensions == DIMENSIONS
    assert adapter.lora is not None


def test_at_strength_0_it_is_the_embedded_model_bit_for_bit(pipe, adapter):
    plain = pipe.generate(CAPTIONS[:2], [0, 1], steps=3)
    np.testing.assert_array_equal(
        pipe.generate(CAPTIONS[:2], [0, 1], steps=3, controls=(adapter.bind(pipe, "all", 0.0),)), plain
    )


def test_each_label_moves_its_own_measure_up(pipe, adapter):
    """Saturation and luminance, whose effect is large on any few pictures; scripts.effects.vmix measures the rest."""
    merged = adapter.apply_lora(pipe)
    labels = [labels for labels in ("none", "color", "light") for _ in CAPTIONS]
    drawn = merged.generate(CAPTIONS * 3, [*SEEDS] * 3, controls=(adapter.bind(merged, labels),), batch_size=24)
    found = {label: [measure(image) for image in drawn[8 * k : 8 * k + 8]] for k, label in enumerate(labels[::8])}
    for label in ("color", "light"):
        moved = [after[label] - before[label] for after, before in zip(found[label], found["none"], strict=True)]
        assert np.mean(moved) > 0.03, label


def test_another_model_is_one_clear_line(tiny_pipeline, adapter):
    with pytest.raises(InputError, match="VMix: found a UNet with"):
        adapter.bind(tiny_pipeline)
