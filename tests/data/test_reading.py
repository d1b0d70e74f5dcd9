"""`jaxmix.pictures` reads a picture as a viewer shows it, and whatever is wrong with one is one kind of error."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from infer.pictures import mask_of, open_cropped, open_picture, picture_size
from jaxmix.pictures import UnreadableError, load, read, shown_size
from jaxmix.types import InputError

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (4, 6, 3), np.uint8)
RAMP = np.arange(256, dtype=np.float64).reshape(16, 16)
# What is stored under an EXIF orientation -> what is shown (EXIF 2.3, tag 0x0112).
TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


def read_mask(content):
    return np.asarray(load(content, mask=True))


def stored(image, kind="PNG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("orientation", TURNS)
def test_a_picture_and_its_size_and_a_mask_are_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content, shown = stored(COLOURS, exif=exif), TURNS[orientation](COLOURS)
    np.testing.assert_array_equal(read(content), shown)
    assert shown_size(io.BytesIO(content)) == shown.shape[:2]
    np.testing.assert_array_equal(read_mask(content), np.asarray(Image.fromarray(shown).convert("L")))
    (tmp_path / "a.png").write_bytes(content)
    assert picture_size(str(tmp_path / "a.png"), 2) == shown.shape[:2]
    np.testing.assert_array_equal(open_picture(str(tmp_path / "a.png"), *shown.shape[:2]), shown)
    np.testing.assert_array_equal(open_cropped(str(tmp_path / "a.png"), *shown.shape[:2]), shown)


def test_an_orientation_that_follows_the_pixels_is_seen_where_a_picture_is_drawn_at_its_own_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = stored(COLOURS, exif=exif)
    at = content.index(b"eXIf") - 4
    size = 12 + int.from_bytes(content[at : at + 4], "big")
    content = content[:at] + content[at + size : -12] + content[at : at + size] + content[-12:]
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert picture_size(str(path), 2) == (6, 4)
    np.testing.assert_array_equal(open_picture(str(path), 6, 4), TURNS[6](COLOURS))


def test_highlights_of_floats_are_clipped_and_leave_the_rest_as_it_is():
    values = (RAMP / 255).astype(np.float32)
    values[-1, -1] = 4.0
    np.testing.assert_array_equal(read_mask(stored(values, "TIFF")), RAMP)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((RAMP * 257).astype(np.uint16), "PNG"),
        ((RAMP * 257).astype(np.uint16), "TIFF"),
        ((RAMP * 257).astype(np.int32), "TIFF"),
        ((RAMP * 2**23).astype(np.int32), "TIFF"),
        ((RAMP / 255).astype(np.float32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 257).astype(np.float32), "TIFF"),
    ],
    ids=str,
)
def test_deep_greys_are_scaled_and_not_clipped(values, kind):
    content = stored(values, kind)
    np.testing.assert_array_equal(read(content), np.repeat(RAMP[..., None], 3, -1))
    np.testing.assert_array_equal(read_mask(content), RAMP)


def test_transparency_is_white_whatever_lies_below_it():
    junk = np.dstack([COLOURS, np.full((4, 6), 255, np.uint8)])
    junk[:, 3:, 3] = 0
    white = COLOURS.copy()
    white[:, 3:] = 255
    np.testing.assert_array_equal(read(stored(junk)), white)
    half = np.full((2, 2, 4), (0, 0, 0, 128), np.uint8)
    assert (read(stored(half)) == 127).all()
    assert (read(stored(Image.new("LA", (2, 2), (40, 0)))) == 255).all()
    palette = Image.fromarray(np.asarray([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([200, 10, 10, 10, 200, 10])
    assert read(stored(palette, transparency=0)).tolist() == [[[255, 255, 255], [10, 200, 10]]]


def test_a_mask_painted_on_a_transparent_layer_is_what_was_painted(tmp_path):
    layer = np.full((8, 8, 4), (255, 255, 255, 0), np.uint8)
    layer[:4, :4, 3] = 255
    (tmp_path / "mask.png").write_bytes(stored(layer))
    assert mask_of(str(tmp_path / "mask.png"), 8, 8).mean() == 0.25
    layer[:4, :4] = (255, 255, 255, 100)
    assert read_mask(stored(layer)).max() == 100


@pytest.mark.parametrize(
    ("mode", "kind"), [("1", "PNG"), ("L", "PNG"), ("P", "GIF"), ("RGB", "BMP"), ("CMYK", "JPEG"), ("YCbCr", "TIFF")]
)
def test_every_mode_is_read(mode, kind):
    content = stored(Image.fromarray(COLOURS).convert(mode), kind)
    assert read(content).shape == (4, 6, 3) and read_mask(content).shape == (4, 6)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_is_read(kind):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (read(content) == (255, 0, 0)).all()


def text_bomb():
    """Return a PNG whose compressed text is longer than Pillow takes."""
    info = PngImagePlugin.PngInfo()
    info.add_text("x", "a" * (2 << 20), zip=True)
    return stored(COLOURS, pnginfo=info)


def huge():
    """Return a PNG that says that it has 400 million pixels."""
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    whole = stored(COLOURS)
    return whole[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[33:]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a picture that Pillow knows"),
        (b"<html>", "not a picture that Pillow knows"),
        (stored(COLOURS)[:-40], "truncated"),
        (text_bomb(), "too large"),
        (huge(), "exceeds limit"),
        (stored(np.full((2, 2), np.nan, np.float32), "TIFF"), "not finite"),
        (stored(np.full((2, 2), 1e9, np.float32), "TIFF"), "expected numbers to 1, to 255 or to 65535"),
    ],
    ids=["empty", "text", "cut", "text chunk", "huge", "nan", "1e9"],
)
def test_whatever_is_wrong_with_a_picture_is_one_kind_of_error(tmp_path, content, words):
    for reader in (read, read_mask):
        with pytest.raises(UnreadableError, match=words) as error:
            reader(content)
        assert "\n" not in str(error.value)
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.png: not a readable picture: .*{words}"):
        open_picture(str(path), 4, 6)


def test_a_picture_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png: no such file"):
        open_picture(str(tmp_path / "gone.png"), 4, 6)
    with pytest.raises(InputError, match="found a folder, expected a picture"):
        picture_size(str(tmp_path), 2)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damaged_files_are_read_or_refused(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    whole, rng = stored(COLOURS, kind, **options), np.random.default_rng(1)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about what it reads all the same
        for _ in range(60):
            content = bytearray(whole[: rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else whole)
            for at in rng.integers(0, len(content), rng.integers(1, 6)):
                content[at] = rng.integers(256)
            try:
                assert read(bytes(content)).dtype == np.uint8
                assert read_mask(bytes(content)).ndim == 2
            except UnreadableError:
                refused += 1
    assert refused
