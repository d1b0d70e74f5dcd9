import numpy as np
import pytest

from jaxmix.types import InputError
from train.data.encoded import MOMENTS, TEXTS, encode_once

PLAN = {"scenes": {"size": 4}, "vae": "a"}


class Pictures:
    """Picture i is filled with i; its caption is "i" with a line break and a letter of two bytes."""

    def __len__(self):
        return 100

    def __getitem__(self, i):
        return {"image": np.full((4, 4, 3), i, np.uint8), "text": f"ü\n{i}"}


class Encode:
    """Moments of a picture: its value and value + 1; fails at call `fails`."""

    def __init__(self, fails=99):
        self.calls, self.fails = 0, fails

    def __call__(self, images):
        assert images.shape == (4, 4, 4, 3)
        self.calls += 1
        if self.calls == self.fails:
            raise KeyboardInterrupt
        return np.stack([images[:, :2, :2, 0], images[:, :2, :2, 0] + 1], -1).astype(np.float16)


def check(rows, count):
    assert len(rows) == count
    for i in range(count):
        assert rows[i]["text"] == f"ü\n{i}"
        np.testing.assert_array_equal(rows[i]["latents_mean"], np.full((2, 2, 1), i, np.float16))
        np.testing.assert_array_equal(rows[i]["latents_std"], np.full((2, 2, 1), i + 1, np.float16))


def test_pictures_are_encoded_once_and_more_are_added(tmp_path):
    encode = Encode()
    check(encode_once(Pictures(), 6, tmp_path, PLAN, encode, 4), 6)
    assert encode.calls == 3  # one for the shape, two batches
    check(encode_once(Pictures(), 6, tmp_path, PLAN, encode, 4), 6)
    assert encode.calls == 4
    check(encode_once(Pictures(), 9, tmp_path, PLAN, encode, 4), 9)
    check(encode_once(Pictures(), 5, tmp_path, PLAN, encode, 4), 5)  # fewer than there are


def test_a_stopped_or_torn_folder_goes_on_from_what_is_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        encode_once(Pictures(), 12, tmp_path, PLAN, Encode(fails=3), 4)
    assert (tmp_path / TEXTS).read_bytes().count(b"\n") == 4
    with open(tmp_path / MOMENTS, "ab") as file:
        file.write(b"half a row")
    with open(tmp_path / TEXTS, "ab") as file:
        file.write(b'"half a li')
    check(encode_once(Pictures(), 12, tmp_path, PLAN, Encode(), 4), 12)
    with open(tmp_path / MOMENTS, "r+b") as file:
        file.truncate(5 * 16 + 3)
    check(encode_once(Pictures(), 12, tmp_path, PLAN, Encode(), 4), 12)


def test_another_plan_other_files_and_damaged_latents_are_refused(tmp_path):
    encode_once(Pictures(), 4, tmp_path / "a", PLAN, Encode(), 4)
    with pytest.raises(InputError, match="another vae: found a, expected b"):
        encode_once(Pictures(), 4, tmp_path / "a", {**PLAN, "vae": "b"}, Encode(), 4)
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="expected an empty folder"):
        encode_once(Pictures(), 4, tmp_path, PLAN, Encode(), 4)
    with pytest.raises(InputError, match="not finite"):
        encode_once(Pictures(), 4, tmp_path / "b", PLAN, lambda x: np.full((4, 2, 2, 2), np.inf), 4)
