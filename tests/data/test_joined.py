"""Folders of kohya's scripts, regularisation pictures and trigger words, as tables of rows."""

import numpy as np
import pytest

from jaxmix.types import InputError
from tests.data.made import encoded, make_folder, picture
from train.data import PictureConfig, Pictures, Regular, open_source


def put(folder, count, captions=()):
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(encoded(picture(i)))
    for i, text in dict(captions).items():
        (folder / f"{i}.txt").write_text(text)


def table(source):
    return {e.id: (e.text, e.repeats, e.regular) for e in source.entries}


def test_folders_give_repeats_and_the_captions_of_pictures_without_one(tmp_path, capsys):
    put(tmp_path / "10_sks dog", 2, {1: "sks dog asleep"})
    put(tmp_path / "2_cat", 1)
    put(tmp_path / "notes", 1)
    source = open_source(tmp_path)
    assert table(source) == {
        "10_sks dog/0.png": ("sks dog", 10, False),
        "10_sks dog/1.png": ("sks dog asleep", 10, False),
        "2_cat/0.png": ("cat", 2, False),
    }
    assert capsys.readouterr().err == f"{tmp_path}: left out what is not in a folder named like 10_name: notes\n"
    assert [source[i]["id"] for i in range(3)] == list(table(source))
    rows = Pictures(source, PictureConfig(resolution=8))
    np.testing.assert_array_equal(np.bincount(rows.groups[0]), [10, 10, 2])
    assert "3 rows, 22 with their repeats" in rows.describe()
    # Every row as often as it is repeated, in a pass of 22 rows.
    stream = rows.in_batches(2, 0)
    ids = [stream[i]["id"] for i in range(22)]
    assert sorted(map(ids.count, table(source))) == [2, 10, 10]


def test_regularisation_pictures_are_as_many_as_the_others(tmp_path, capsys):
    put(tmp_path / "train" / "3_sks dog", 2)
    put(tmp_path / "few" / "1_dog", 4)
    put(tmp_path / "many", 9)
    few = table(open_source(tmp_path / "train", regular=Regular(str(tmp_path / "few"))))
    assert [few[f"reg/1_dog/{i}.png"] for i in range(4)] == [("dog", n, True) for n in (2, 2, 1, 1)]
    many = table(open_source(tmp_path / "train", regular=Regular(str(tmp_path / "many"), "a dog")))
    assert [many[f"reg/{i}.png"] for i in range(9)] == [("a dog", int(i < 6), True) for i in range(9)]
    assert "3 of 9 regularisation pictures are left out" in capsys.readouterr().out
    with pytest.raises(InputError, match="many: found no usable row among 9, expected pictures with captions"):
        open_source(tmp_path / "train", regular=Regular(str(tmp_path / "many")))


def test_a_trigger_word_is_put_before_captions_that_lack_it(tmp_path):
    folder = make_folder(tmp_path / "pictures", [(8, 8)] * 2)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join([lines[0], '{"file_name": "001.png"}', lines[1], "{"]))
    source = open_source(folder, trigger_word="Number")
    assert [e.text for e in source.entries] == ["picture number 0", "Number", "picture number 1", ""]
    assert source.entries[3].fault.startswith("not readable as JSON")
    source = open_source(folder, trigger_word="zwx")
    assert [e.text for e in source.entries][:2] == ["zwx, picture number 0", "zwx"]


def test_no_repeats_are_refused(tmp_path):
    put(tmp_path / "0_dog", 1)
    with pytest.raises(InputError, match="0_dog: found 0 repeats in its name, expected 1 or more"):
        open_source(tmp_path)
