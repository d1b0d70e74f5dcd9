"""Hints of ControlNets: cropped and mirrored with their pictures, from folders, tars and caches."""

import json

import numpy as np
import pytest

from jaxmix.types import InputError
from tests.data.made import encoded, make_folder, picture, row, write_tar
from train import cache_latents
from train.data import LatentCache, PictureConfig, Pictures, hint_name, make_hint, open_batches, open_source

SIZES = [(20, 30), (24, 24), (30, 20), (24, 24)]
COLUMN = "conditioning_image"


def negative(image):
    return 255 - image


def paired(folder, sizes=SIZES, hints=None):
    """Return a folder whose hints are the negatives of its pictures."""
    make_folder(folder, sizes)
    lines = []
    for i, size in enumerate(sizes):
        name = f"hint-{i}.png"
        (folder / name).write_bytes(encoded(negative(picture(i, size))))
        lines.append(json.dumps({"file_name": f"{i:03d}.png", COLUMN: name, **row(i), **(hints or {}).get(i, {})}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def rows(source, cfg, hint, n=12):
    pictures = Pictures(source, cfg, None, hint)
    stream = pictures.in_batches(2, seed=3)
    return pictures, [stream[i] for i in range(n)]


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_a_pair_is_cropped_and_mirrored_together(tmp_path, kind):
    if kind == "folder":
        paired(tmp_path)
    else:
        members = {}
        for i, size in enumerate(SIZES):
            members[f"{i}.png"] = encoded(picture(i, size))
            members[f"{i}.{COLUMN}.png"] = encoded(negative(picture(i, size)))
            members[f"{i}.txt"] = b"a picture"
        write_tar(tmp_path / "0.tar", members)
    source = open_source(tmp_path, hint_column=COLUMN)
    cfg = PictureConfig(resolution=16, random_flip=True)
    for made in rows(source, cfg, make_hint(COLUMN, ""))[1]:
        # The resize overshoots at edges, so a negative of what was resized is nearly what is resized of a negative.
        assert made["hint"].shape == made["image"].shape == (16, 16, 3)
        assert np.abs(made["hint"].astype(int) - negative(made["image"])).max() <= 2


def test_without_a_column_the_hint_is_made_of_the_cropped_picture(tmp_path):
    pytest.importorskip("cv2")
    source = open_source(make_folder(tmp_path, SIZES))
    for made in rows(source, PictureConfig(resolution=16, random_flip=True), make_hint("", "gray"), 4)[1]:
        assert (made["hint"] == made["hint"][..., :1]).all()
        assert np.abs(made["hint"][..., 0] - made["image"] @ [0.299, 0.587, 0.114]).max() <= 1
    assert make_hint("", "") is None and make_hint("", "none") is None
    assert hint_name("", "canny") == "canny:100,200" and hint_name(COLUMN, "") == COLUMN
    assert hint_name(COLUMN, "gray") == f"gray of {COLUMN}" and hint_name("", "none") == ""


def test_a_pair_of_two_shapes_or_without_its_half_is_a_bad_row(tmp_path, capsys):
    folder = paired(tmp_path, SIZES, {1: {COLUMN: "gone.png"}, 2: {COLUMN: None}, 3: {COLUMN: "wide.png"}})
    (folder / "wide.png").write_bytes(encoded(picture(0, (10, 30))))
    cfg = PictureConfig(resolution=16)
    pictures, made = rows(open_source(folder, hint_column=COLUMN), cfg, make_hint(COLUMN, ""))
    assert {m["id"] for m in made} == {"000.png"}
    assert pictures.bad.reasons == {
        "001.png": f"{COLUMN}: no such file",
        "002.png": f"{COLUMN}: found nothing, expected a file",
        "003.png": f"{COLUMN}: found 10 x 30, expected the shape of its picture, 24 x 24",
    }


def test_a_cache_keeps_hints_of_pictures_as_they_are_and_mirrored(tiny_pipeline, tmp_path):
    tiny_pipeline.save(tmp_path / "model")
    folder = paired(tmp_path / "pictures")
    told = {"resolution": 16, "center_crop": True, "random_flip": True, "batch_size": 2, COLUMN + "_column": COLUMN}
    cfg = cache_latents.Config(
        pretrained_model_name_or_path=str(tmp_path / "model"), train_data_dir=str(folder), out=str(tmp_path / "c"),
        **told,
    )  # fmt: skip
    assert cache_latents.main(cfg) == 0
    cache = LatentCache(tmp_path / "c", random_flip=True)
    live = open_batches(folder, cfg, tiny_pipeline, hint_column=COLUMN, hint=make_hint(COLUMN, ""))
    assert cache.index.hint == COLUMN
    for i in range(len(SIZES)):
        for flip in (False, True):
            expected = live.read(i, (16, 16), flip=flip)["hint"]
            np.testing.assert_array_equal(cache.read(i, flip)["hint"], expected)
    index = tmp_path / "c" / "index.json"
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != "hint"}))
    assert LatentCache(tmp_path / "c").index.hint == ""  # as older caches are


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "a.png").write_bytes(encoded(picture(0)))
    for look, words in (
        (lambda: make_hint("", "edges"), "preprocess: found 'edges', expected one of canny"),
        (lambda: open_source(tmp_path / "alone", hint_column=COLUMN), "found no metadata.jsonl, expected one with a c"),
    ):
        with pytest.raises(InputError, match=words):
            look()
