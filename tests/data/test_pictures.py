import json

import numpy as np
import pytest

from jaxmix.tuning.data import iterate, make_dataset
from jaxmix.types import InputError
from tests.data.made import DIMENSIONS, make_folder, picture, spoil
from train.data import BadRow, ImageFolder, PictureConfig, Pictures

WIDE, TALL, SQUARE = (16, 24), (24, 16), (20, 20)
SIZES = [WIDE, TALL, SQUARE, WIDE, TALL, WIDE, SQUARE, WIDE] * 3
BUCKETS = {"resolution": 20, "enable_bucket": True, "min_bucket_reso": 8, "max_bucket_reso": 32, "bucket_reso_steps": 4}


def arrays(row, rng):
    present = np.asarray([name in row["labels"] for name in DIMENSIONS], np.float32)
    return {"image": row["image"], "present": present, "time_ids": row["time_ids"], "id": row["id"]}


def open_pictures(folder, **changes):
    return Pictures(ImageFolder(folder, labels=DIMENSIONS), PictureConfig(**{"center_crop": True, **changes}))


def shown(pictures, steps, batch_size=3, seed=0):
    dataset = make_dataset(pictures, batch_size, seed, arrays)
    return [dataset[step] for step in range(steps)]


def test_batches_have_one_size_each_and_ids(tmp_path):
    pictures = open_pictures(make_folder(tmp_path, SIZES), **BUCKETS)
    assert pictures.buckets == [(16, 24), (20, 20), (24, 16)]
    assert [len(group) for group in pictures.groups] == [12, 6, 6]
    batches = shown(pictures, 8)
    assert {batch["image"].shape[1:3] for batch in batches} == {(16, 24), (20, 20), (24, 16)}
    for batch in batches:
        for image, name, present, time_ids in zip(
            *(batch[k] for k in ("image", "id", "present", "time_ids")), strict=True
        ):
            number = int(name[:3])
            np.testing.assert_array_equal(image, picture(number, SIZES[number]))
            assert present.tolist() == [number >> i & 1 for i in range(3)]
            assert time_ids.tolist() == [*SIZES[number], 0, 0, *SIZES[number]]
    assert len({name for batch in batches for name in batch["id"]}) == len(SIZES)
    assert pictures.describe().endswith("24 rows, height x width 16x24: 12, 20x20: 6, 24x16: 6")


def test_without_buckets_all_pictures_are_squares_and_no_header_is_read_ahead(tmp_path, monkeypatch):
    folder = make_folder(tmp_path, SIZES)
    monkeypatch.setattr(ImageFolder, "size", lambda *_: pytest.fail("read a header"))
    pictures = open_pictures(folder, resolution=12)
    assert {batch["image"].shape for batch in shown(pictures, 8)} == {(3, 12, 12, 3)}


def test_random_crops_and_flips_repeat_with_the_seed_and_the_step(tmp_path):
    folder = make_folder(tmp_path, SIZES)
    one, other = (
        shown(open_pictures(folder, resolution=12, center_crop=False, random_flip=True), 16) for _ in range(2)
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
    lefts = {tuple(ids) for batch in one for ids in batch["time_ids"][:, 2:4].tolist()}
    assert len(lefts) > 3
    # The pictures get brighter to the right, and darker where they are mirrored.
    rises = [line[-1, 1] > line[0, 1] for batch in one for line in batch["image"][:, 0]]
    assert 0.2 < np.mean(rises) < 0.8


def test_bad_rows_are_reported_once_and_replaced_alike_every_time(tmp_path, capsys):
    folder = make_folder(tmp_path, SIZES)
    bad = spoil(folder, 3)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[5] = json.dumps({"file_name": "005.png"})
    (folder / "005.png").unlink()
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    runs = [shown(open_pictures(folder, **BUCKETS), 24) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(a["id"], b["id"])
        np.testing.assert_array_equal(a["image"], b["image"])
    ids = [name for batch in runs[0] for name in batch["id"]]
    assert len(ids) == 72
    assert not {bad, "005.png"} & set(ids)
    reported = capsys.readouterr().err.splitlines()
    assert sum(line.startswith(f"bad row {bad}: cannot be decoded") for line in reported) == 2  # once a run
    assert sum(line == "bad row 005.png: no text: found nothing in 'text'" for line in reported) == 2


def test_a_bad_row_changes_no_other_place(tmp_path):
    sound = shown(open_pictures(make_folder(tmp_path / "a", SIZES), **BUCKETS), 16)
    folder = make_folder(tmp_path / "b", SIZES)
    bad = spoil(folder, 3)
    replaced = 0
    for a, b in zip(sound, shown(open_pictures(folder, **BUCKETS), 16), strict=True):
        for here, there in zip(a["id"], b["id"], strict=True):
            if here == bad:
                replaced += 1
                assert SIZES[int(there[:3])] == SIZES[3]
            else:
                assert here == there
    assert replaced >= 2


def test_too_many_bad_rows_stop_the_run_through_the_threads(tmp_path):
    folder = make_folder(tmp_path, SIZES)
    names = [spoil(folder, number) for number in (1, 2, 3)]
    pictures = open_pictures(folder, resolution=12, max_bad_rows=2)
    with pytest.raises(InputError, match=r"found 3 bad rows, expected at most 2 \(max_bad_rows\); the last is 00") as e:
        for batch in iterate(make_dataset(pictures, 3, 0, arrays), threads=4):
            assert not set(batch["id"]) & set(names)
    assert "cannot be decoded" in str(e.value)
    assert "\n" not in str(e.value)


def test_the_limit_is_one_per_cent_and_ten_at_least(tmp_path):
    pictures = open_pictures(make_folder(tmp_path, SIZES), resolution=12)
    assert pictures.bad.limit == 10
    pictures.source.entries = pictures.source.entries * 100
    assert Pictures(pictures.source, pictures.cfg).bad.limit == 24


def test_a_size_of_which_no_row_is_usable_is_an_error(tmp_path):
    folder = make_folder(tmp_path, [WIDE, TALL])
    for number in range(2):
        spoil(folder, number)
    with pytest.raises(InputError, match=r"none of the 1 rows of (24x16|16x24) is usable"):
        shown(open_pictures(folder, **BUCKETS), 2, batch_size=1, seed=2)


def test_a_row_by_its_index_is_cut_from_the_middle(tmp_path):
    folder = make_folder(tmp_path, SIZES)
    (folder / "001.png").write_bytes(b"")
    pictures = open_pictures(folder, **BUCKETS)
    np.testing.assert_array_equal(pictures[0]["image"], picture(0, WIDE))
    with pytest.raises(BadRow, match="not a picture"):
        pictures[1]


def test_asking_for_labels_that_no_row_has_is_noted(tmp_path, capsys):
    folder = make_folder(tmp_path, SIZES[:1])
    Pictures(ImageFolder(folder, labels=DIMENSIONS), PictureConfig(resolution=12))
    assert "no row has a label; known: color, light, focus" in capsys.readouterr().err
