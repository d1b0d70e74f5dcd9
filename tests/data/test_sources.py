import gzip
import io
import json

import numpy as np
import pytest
from PIL import Image

from jaxmix.types import InputError
from tests.data.made import DIMENSIONS, encoded, make_folder, make_tars, picture, row, write_tar
from train.data import BadRow, ImageFolder, WebDataset, open_source
from train.data.rows import decode
from train.data.webdataset import expand_braces

SIZES = [(12, 16), (16, 12), (9, 9), (8, 20), (12, 16)]


def metadata(folder, *rows):
    """Return a folder with these lines, and one good picture 000.png."""
    make_folder(folder, SIZES[:1])
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(r)}\n" if isinstance(r, dict) else r for r in rows))
    return folder


def assert_same_rows(one, other):
    assert len(one) == len(other)
    for i in range(len(one)):
        a, b = one[i], other[i]
        np.testing.assert_array_equal(a["image"], b["image"])
        assert (a["text"], a["labels"], one.size(i)) == (b["text"], b["labels"], other.size(i))


def test_a_folder_gives_pictures_texts_labels_and_ids(tmp_path):
    source = ImageFolder(make_folder(tmp_path, SIZES), labels=DIMENSIONS)
    assert len(source) == 5
    for i, size in enumerate(SIZES):
        found = source[i]
        np.testing.assert_array_equal(found["image"], picture(i, size))
        assert found["text"] == f"picture number {i}"
        assert found["labels"] == tuple(row(i)["labels"])
        assert found["id"] == f"{i:03d}.png"
        assert source.size(i) == size


def test_labels_in_a_list_and_in_columns_are_the_same(tmp_path):
    listed = ImageFolder(make_folder(tmp_path / "a", SIZES), labels=DIMENSIONS)
    columns = ImageFolder(make_folder(tmp_path / "b", SIZES, columns=True), labels=DIMENSIONS)
    assert_same_rows(listed, columns)
    assert listed[3]["labels"] == ("color", "light")


def test_labels_that_were_not_asked_for_are_not_read(tmp_path):
    folder = metadata(tmp_path, {"file_name": "000.png", "text": "a", "labels": ["no such"]})
    assert ImageFolder(folder)[0]["labels"] == ()


@pytest.mark.parametrize("pattern", ["{000..001}.tar", "*.tar", "{000,001}.tar", ""])
def test_tars_equal_the_folder(tmp_path, pattern):
    folder = ImageFolder(make_folder(tmp_path / "folder", SIZES), labels=DIMENSIONS)
    tars = make_tars(tmp_path / "tars", SIZES, 2)
    source = WebDataset(tars / pattern, labels=DIMENSIONS)
    assert_same_rows(folder, source)
    assert source[0]["id"] == "000.tar/000"
    assert source[4]["id"] == "001.tar/004"


def test_a_tar_takes_captions_from_txt_and_keys_end_at_the_first_dot(tmp_path):
    image = encoded(picture(0))
    path = write_tar(
        tmp_path / "a.tar", {"x/1.png": image, "x/1.seg.png": image, "x/1.txt": b" a cat\n", "2.json": b'{"text": "b"}'}
    )
    source = WebDataset(path)
    assert source[0] | {"image": 0} == {"image": 0, "text": "a cat", "labels": (), "id": "a.tar/x/1"}
    with pytest.raises(BadRow, match="no picture of this key"):
        source[1]


def test_captions_beside_pictures_are_read_where_there_is_no_metadata(tmp_path):
    (tmp_path / "b.png").write_bytes(encoded(picture(1)))
    (tmp_path / "b.txt").write_text("a dog\n")
    (tmp_path / "c.png").write_bytes(encoded(picture(2)))
    source = open_source(tmp_path)
    assert source[0]["text"] == "a dog"
    with pytest.raises(BadRow, match=r"found no c\.txt beside it"):
        source[1]


def test_braces_expand_as_in_a_shell():
    assert expand_braces("d/{08..10}.tar") == ["d/08.tar", "d/09.tar", "d/10.tar"]
    assert expand_braces("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    with pytest.raises(InputError, match=r"expected an ascending one"):
        expand_braces("{3..1}.tar")


def stored(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_exif_orientation_is_applied_to_picture_and_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(picture(0, (8, 24)))
    folder = metadata(tmp_path, {"file_name": "t.jpg", "text": "a"}, {"file_name": "t.webp", "text": "a"})
    for kind in ("jpg", "webp"):
        (folder / f"t.{kind}").write_bytes(stored(image, {"jpg": "JPEG"}.get(kind, kind), exif=exif))
    source = ImageFolder(folder)
    for i in range(2):
        assert source.size(i) == (24, 8)
        assert source[i]["image"].shape == (24, 8, 3)
    # Orientation 6 is shown turned clockwise: what was left is at the top.
    turned = np.rot90(picture(0, (8, 24)), -1).astype(int)
    assert np.abs(source[0]["image"].astype(int) - turned).mean() < 5


def test_transparency_is_put_on_white_and_grey_becomes_rgb():
    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    found = decode(stored(Image.fromarray(clear)))
    assert found[0, 0].tolist() == [10, 20, 30]
    assert (found[1] == 255).all()
    grey = decode(stored(Image.fromarray(np.full((2, 3), 77, np.uint8))))
    assert grey.shape == (2, 3, 3)
    assert (grey == 77).all()
    deep = decode(stored(Image.fromarray(np.full((2, 3), 77 * 256, np.uint16))))
    assert (deep == 77).all()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"file_name": "000.png"}, "no text: found nothing in 'text'"),
        ({"file_name": "000.png", "text": "  "}, "no text: found an empty text"),
        ({"file_name": "000.png", "text": 3}, "no text: found 3"),
        ({"file_name": "other.png", "text": "a"}, "no such file"),
        ({"file_name": "metadata.jsonl", "text": "a"}, "not a picture that Pillow knows"),
        ({"text": "a"}, "no 'file_name' in this line"),
        ("{broken\n", "not readable as JSON"),
        ("[1]\n", "found list, expected a JSON object"),
    ],
)
def test_a_bad_row_says_what_is_wrong(tmp_path, line, words):
    source = ImageFolder(metadata(tmp_path, {"file_name": "000.png", "text": "good"}, line), labels=DIMENSIONS)
    assert source[0]["text"] == "good"
    for use in (source.__getitem__, source.size):
        with pytest.raises(BadRow, match=words):
            use(1)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"labels": ["colour"]}, r"metadata.jsonl:1: unknown label 'colour', expected some of color, "),
        ({"labels": ["mood"]}, r"metadata.jsonl:1: unknown label 'mood', expected some of color, "),
        ({"labels": "color"}, r"metadata.jsonl:1: labels: found 'color', expected a list"),
        ({"light": "yes"}, r"metadata.jsonl:1: light: found 'yes', expected true, false, 1 or 0"),
    ],
)
def test_labels_that_are_none_are_an_error_with_file_and_line(tmp_path, more, words):
    line = {"file_name": "000.png", "text": "a", **more}
    with pytest.raises(InputError, match=words):
        ImageFolder(metadata(tmp_path, line), labels=DIMENSIONS)
    tar = write_tar(tmp_path / "t.tar", {"k.png": encoded(picture(0)), "k.json": json.dumps(line).encode()})
    with pytest.raises(InputError, match=words.replace("metadata.jsonl:1", r"t.tar/k.json")):
        WebDataset(tar, labels=DIMENSIONS)


def test_a_picture_may_have_several_captions(tmp_path):
    lines = [{"file_name": "000.png", "text": text} for text in ("a cat", "an animal")]
    source = ImageFolder(metadata(tmp_path, *lines))
    assert [(row["text"], row["id"]) for row in (source[0], source[1])] == [
        ("a cat", "000.png"),
        ("an animal", "000.png:2"),
    ]


def test_tars_that_cannot_be_used_are_named(tmp_path):
    tar = make_tars(tmp_path, SIZES, 1) / "000.tar"
    with pytest.raises(InputError, match=r"001\.tar: no such tar \(from .*\{000\.\.001\}"):
        WebDataset(tmp_path / "{000..001}.tar")
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(InputError, match=r"packed\.tar: not readable as a tar: it is compressed.*unpack it"):
        WebDataset(packed)
    twice = write_tar(tmp_path / "twice.tar", {"k.png": b"", "k.jpg": b""})
    with pytest.raises(InputError, match=r"twice\.tar: found two pictures for k"):
        WebDataset(twice)


def test_a_tar_that_is_cut_off_is_an_error_that_names_it(tmp_path):
    tar = make_tars(tmp_path, SIZES, 1) / "000.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[:2600])
    with pytest.raises(InputError, match=r"000\.tar: not readable as a tar"):
        WebDataset(tar)


def test_what_a_path_holds_is_told_apart(tmp_path):
    assert isinstance(open_source(make_folder(tmp_path / "folder", SIZES)), ImageFolder)
    tars = make_tars(tmp_path / "tars", SIZES, 2)
    for path in (tars, tars / "000.tar", f"{tars}/*.tar"):
        assert isinstance(open_source(path), WebDataset)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.parquet").touch()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "data-00000-of-00002.array_record").touch()
    for path, words in [
        ("", "train_data_dir: not given"),
        (tmp_path / "none", "none: found no such folder, expected a folder of pictures"),
        (tmp_path / "empty", "found an empty folder, expected pictures with a metadata.jsonl, tars, or a cache"),
        (tmp_path / "other", r"found a\.parquet, expected"),
        (tmp_path / "other" / "a.parquet", "found a file"),
        (tmp_path / "half", "it is not finished: run train.cache_latents again"),
    ]:
        with pytest.raises(InputError, match=words):
            open_source(path)
