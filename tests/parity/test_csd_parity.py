"""CSD's checkpoint and the pictures that guidance sees, against torch."""

import jax
import numpy as np
import pytest
from safetensors.torch import save_file

from jaxmix import CSD, ImageEncoder, InputError
from jaxmix.pictures import CLIP_MEAN, CLIP_STD
from jaxmix.pipeline.descriptors import described, eye_of, seen_pixels
from tests.parity.oracle import assert_close
from tests.parity.test_vision_parity import PIXELS, as_open_clip, theirs

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def model():
    return theirs(True)


def checkpoint(model, outer):
    """Return the tensors of CSD: the trunk in OpenAI's layout without its projection, and two matrices."""
    whole = as_open_clip({key: x.contiguous() for key, x in model.state_dict().items()})
    trunk = {key.removeprefix("visual."): x for key, x in whole.items() if key.startswith("visual.")}
    first = trunk.pop("proj")
    made = {f"backbone.{key}": x for key, x in trunk.items()}
    made |= {"last_layer_style": first.clone(), "last_layer_content": first.flip(0).contiguous()}
    return {f"{outer}{key}": x for key, x in made.items()}


@pytest.mark.parametrize("outer", ["module.", ""])
def test_style_and_content_are_those_of_torch(model, outer, tmp_path, tiny_pipeline):
    state = checkpoint(model, outer)
    save_file(state, tmp_path / "csd.safetensors")
    csd = CSD.load(tmp_path / "csd.safetensors")
    with torch.no_grad():
        pooled = model.vision_model(torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())).pooler_output
        expected = [
            torch.nn.functional.normalize(pooled @ state[f"{outer}last_layer_{x}"]) for x in ("style", "content")
        ]
    eye = eye_of(tiny_pipeline, csd, "guide")
    for got, there in zip(described(eye, PIXELS), expected, strict=True):
        assert_close(got, there.numpy())
    style, content = jax.jit(lambda z: eye(z))(np.ones((1, 8, 8, 4), "f4"))
    assert style.shape == content.shape == (1, 10)
    assert "10 channels each" in repr(csd)


def test_without_heads_both_are_the_projection(model, tmp_path, tiny_pipeline):
    model.save_pretrained(tmp_path)
    eye = eye_of(tiny_pipeline, ImageEncoder.load(tmp_path), "guide")
    with torch.no_grad():
        found = model(torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())).image_embeds
    for got in described(eye, PIXELS):
        assert_close(got, torch.nn.functional.normalize(found).numpy())


@pytest.mark.parametrize(("hw", "size"), [((40, 40), 28), ((24, 48), 28)])
def test_pictures_are_resized_as_tensors_of_torch_are(hw, size):
    images = np.random.default_rng(0).random((1, *hw, 3)).astype("f4")
    there = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    there = torch.nn.functional.interpolate(there, (size, size), mode="bilinear", align_corners=False)
    expected = (there.numpy().transpose(0, 2, 3, 1) - np.asarray(CLIP_MEAN)) / np.asarray(CLIP_STD)
    assert_close(seen_pixels(images, size), expected)


def test_other_files_are_refused_in_one_line(model, tmp_path):
    with pytest.raises(InputError, match="found no such file, expected a checkpoint of CSD"):
        CSD.load(tmp_path / "nowhere.safetensors")
    (tmp_path / "csd.pth").write_bytes(b"x")
    with pytest.raises(InputError, match=r"Python pickle.*d\.get\('model_state_dict', d\).*csd\.safetensors"):
        CSD.load(tmp_path / "csd.pth")
    state = checkpoint(model, "")
    save_file({key: x for key, x in state.items() if key != "last_layer_style"}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"expected a checkpoint of CSD \(backbone"):
        CSD.load(tmp_path / "a.safetensors")
    save_file({key: x for key, x in state.items() if key != "last_layer_content"}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"last_layer_content is not there, expected \(64, p\)"):
        CSD.load(tmp_path / "b.safetensors")
