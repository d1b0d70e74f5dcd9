"""Maps for ControlNets: OpenCV's numbers, the command, what it keeps, and what it says of mistakes."""

import sys

import numpy as np
import pytest
from PIL import Image

from infer import preprocess as tool
from jaxmix import command, preprocessors
from jaxmix.preprocessors import parse, preprocess
from jaxmix.types import InputError


def run_command(argv):
    """Return the exit status of the command."""
    with pytest.raises(SystemExit) as end:
        command.run(tool.main, argv)
    return end.value.code or 0


def picture(h=37, w=52):
    y, x = np.mgrid[:h, :w]
    bars = np.stack([(x // 9) % 2 * 200, (y // 7) % 2 * 160, x * 3], -1)
    return (bars + np.random.default_rng(0).integers(0, 20, bars.shape)).astype(np.uint8)


def test_maps_are_those_of_opencv():
    cv2 = pytest.importorskip("cv2")
    image = picture()
    np.testing.assert_array_equal(preprocess(image, "canny")[..., 1], cv2.Canny(image, 100, 200))
    np.testing.assert_array_equal(preprocess(image, "canny:20,60")[..., 0], cv2.Canny(image, 20, 60))
    grey = image.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(preprocess(image, "gray")[..., 0] - grey).max() <= 1
    np.testing.assert_array_equal(preprocess(image, "blur:3"), cv2.GaussianBlur(image, (0, 0), 3))
    np.testing.assert_array_equal(preprocess(image, "none"), image)
    for how in ("canny", "tile", "tile:2", "blur", "gray", "recolor", "recolor:0.5", "scribble"):
        made = preprocess(image, how)
        assert made.dtype == np.uint8 and made.shape == image.shape, how
        assert made.std() > 0, how
    assert set(np.unique(preprocess(image, "scribble"))) == {0, 255}
    np.testing.assert_array_equal(preprocess(np.full((40, 40, 3), 90, np.uint8), "tile"), 90)
    even = image[:36, :52]  # of whole squares
    small = cv2.resize(even, (13, 9), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(preprocess(even, "tile:4"), cv2.pyrUp(cv2.pyrUp(small)))
    light = np.full((9, 9, 3), 128, np.uint8)
    assert abs(int(preprocess(light, "recolor")[0, 0, 0]) - 137) <= 1  # L of mid grey is 53.6 of 100


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("edges", "found 'edges', expected one of canny, tile, blur, gray, recolor, scribble, none"),
        ("canny:1", r"found 'canny:1', expected such as canny:100,200 \(low and high threshold\)"),
        ("canny:a,b", "expected such as canny:100,200"),
        ("tile:nan", "expected such as tile:8"),
        ("gray:1", "expected such as gray without numbers"),
        ("none:1", "expected such as none without numbers"),
        ("tile:6", "found a rate of 6, expected 2, 4, 8, 16"),
        ("blur:0", "found 0, expected a standard deviation above 0"),
        ("recolor:-1", "found -1, expected a gamma above 0"),
    ],
)
def test_a_wrong_name_or_number_is_one_line(how, words):
    with pytest.raises(InputError, match=words):
        preprocess(picture(), how)


def test_without_opencv_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        InputError, match=r"canny: found no OpenCV, expected the extra: pip install 'jaxmix-diffusion\["
    ):
        preprocess(picture(), "canny")
    assert preprocess(picture(), "none").shape == picture().shape


def test_the_command_writes_each_map_once_and_goes_on(tmp_path, capsys):
    pytest.importorskip("cv2")
    folder, out = tmp_path / "photos", tmp_path / "maps"
    folder.mkdir()
    for name in ("a.png", "b.jpg"):
        Image.fromarray(picture()).save(folder / name)
    argv = ["--pictures", str(folder), "--preprocess", "canny:20,60", "--out", str(out)]
    assert run_command(argv) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(out / "a.png")), preprocess(picture(), "canny:20,60"))
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (folder / "c.png").write_bytes(b"not a picture")
    capsys.readouterr()
    assert run_command(argv) == 1  # what can be read is kept, what cannot is named
    shown = capsys.readouterr().out
    assert "c.png: not a readable picture" in shown and "wrote 0 maps" in shown and "2 were there, 1 failed" in shown
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (folder / "c.png").unlink()
    Image.fromarray(picture()[::-1]).save(folder / "a.png")  # another picture under the same name
    assert run_command(argv) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(out / "a.png")), preprocess(picture()[::-1], "canny:20,60"))


def test_mistakes_of_the_command_are_one_line(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(picture()).save(folder / "a.png")
    Image.fromarray(picture()).save(folder / "a.jpg")
    (tmp_path / "file").write_text("x")
    for argv, words in (
        ([], "--pictures: not given, expected a folder of pictures"),
        (["--pictures", str(tmp_path / "gone")], "no such file or folder"),
        (["--pictures", str(folder), "--preprocess", "edges"], "--preprocess: found 'edges', expected one of"),
        (["--pictures", str(folder), "--out", str(tmp_path / "o")], "found two pictures of one name"),
        (["--pictures", str(folder / "a.png"), "--out", str(folder)], "--out: found the folder of"),
        (["--pictures", str(folder / "a.png"), "--out", str(tmp_path / "file")], "found a file, expected a folder"),
    ):
        assert run_command(argv) != 0
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said, said


def test_every_name_is_told_apart():
    assert [parse(name)[0] for name in preprocessors.NAMES] == list(preprocessors.NAMES)
    assert parse(" canny:1,2 ") == ("canny", (1.0, 2.0))
