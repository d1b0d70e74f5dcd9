"""What CLIP sees in pictures, kept in files: written once, read without the encoder, refused from another one."""

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from jaxmix import EmbeddingFolder, Embeddings, ImageEncoder, InputError, Request
from jaxmix.models import CLIPVisionConfig, CLIPVisionModel
from jaxmix.testing import random_params
from tests.methods.test_ip_adapter import VISION, picture, random_adapter


def encoder_of(seed=0, **changes):
    model = CLIPVisionModel(CLIPVisionConfig.from_dict(VISION | changes))
    return ImageEncoder(model, random_params(model.abstract_params(), seed))


@pytest.fixture(scope="module")
def encoder():
    return encoder_of()


@pytest.fixture(scope="module")
def base(one_level, encoder):
    return random_adapter(one_level, encoder)


@pytest.fixture(scope="module")
def plus(one_level, encoder):
    return random_adapter(one_level, encoder, "plus")


@pytest.fixture
def paths(tmp_path):
    """Return three pictures, of which the last has the bytes of the first."""
    for i in range(2):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    return [tmp_path / name for name in ("0.png", "1.png", "copy.png")]


def same(one, other):
    np.testing.assert_array_equal(one.shown, other.shown)
    np.testing.assert_array_equal(one.none, other.none)


def test_a_folder_gives_what_the_encoder_gives_bit_for_bit_and_encodes_once(encoder, base, plus, paths, tmp_path):
    folder = EmbeddingFolder(tmp_path / "seen", encoder)
    assert folder.missing(paths, [base.takes]) == paths[:2]
    same(folder.read(paths, base.takes), base.embed(paths))
    assert len(list((tmp_path / "seen").iterdir())) == 3 and load_file(folder.file(paths[0])).keys() == {"projected"}
    assert not folder.missing(paths, [base.takes]) and folder.missing(paths, [plus.takes]) == paths[:2]
    same(folder.read(paths, plus.takes), plus.embed(paths))  # the same files, with more in them
    alone = EmbeddingFolder(tmp_path / "seen")
    for adapter in (base, plus):
        same(alone.read(paths[::-1], adapter.takes), adapter.embed(paths[::-1]))


def test_what_is_seen_does_not_depend_on_the_pictures_beside_it(encoder):
    pixels = encoder.pixels([picture(i) for i in range(9)])
    whole = encoder(pixels)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[7:], y), whole, encoder(pixels[7:]))


def test_embeddings_are_saved_and_loaded(base, tmp_path):
    seen = base.embed([picture(0), picture(1)], negative=picture(2))
    seen.save(tmp_path / "x.safetensors")
    same(Embeddings.load(tmp_path / "x.safetensors"), seen)
    save_file({"shown": seen.shown}, tmp_path / "x.safetensors")
    with pytest.raises(
        InputError, match=r"x\.safetensors: found \{'shown': \(2, 12\)\}, expected 'shown' \(n, \.\.\.\)"
    ):
        Embeddings.load(tmp_path / "x.safetensors")


def test_what_does_not_fit_is_one_line(one_level, encoder, base, plus, paths, tmp_path):
    there = tmp_path / "seen"
    folder = EmbeddingFolder(there, encoder)
    folder.add(paths[:1], [plus.takes])
    alone, file = EmbeddingFolder(there), folder.file(paths[0])
    kept = file.read_bytes()
    (tmp_path / "broken.png").write_bytes(b"x")
    wide = base.takes._replace(width=13)
    bare = encoder_of(architectures=["CLIPVisionModel"])

    def damaged(content):
        file.write_bytes(content)
        return EmbeddingFolder(there).read(paths[:1], base.takes)

    def changed(**more):
        save_file(load_file(file) | more, file, EmbeddingFolder(there).identity)
        return EmbeddingFolder(there).read(paths[:1], base.takes)

    def request(seen):
        one_level.check(Request(prompts=["a cat"], steps=2), (base.on(seen),))

    for do, message in (
        (lambda: EmbeddingFolder(tmp_path / "nowhere"), "nowhere: found no none.safetensors, expected a folder"),
        (lambda: EmbeddingFolder(paths[0]), "0.png: found a file, expected a folder"),
        (lambda: EmbeddingFolder(there, encoder_of(1)), "made by another image encoder: weights: found"),
        (lambda: EmbeddingFolder(there, encoder_of(hidden_act="gelu")), "another image encoder: config: found"),
        (
            lambda: EmbeddingFolder(there, ImageEncoder(encoder.model.clone(dtype="bfloat16"), encoder.params)),
            "dtype: found 'float32', expected 'bfloat16'",
        ),
        (lambda: alone.read(paths, base.takes), r"1\.png: found no 'projected' of it in .*\(its projection of 12\)"),
        (lambda: alone.read([tmp_path / "no.png"], base.takes), "no.png: no such file"),
        (lambda: folder.read([tmp_path / "broken.png"], base.takes), "broken.png: not a picture"),
        (lambda: alone.read(paths[:1], wide), r"found 'projected' \(12,\), expected 13 channels for IP-Adapter"),
        (lambda: EmbeddingFolder(tmp_path / "other", bare).read(paths, base.takes), "an image encoder that gives 0"),
        (lambda: request(Embeddings(np.zeros((1, 9)), np.zeros(9))), r"\(1, 9\) .*expected \(pictures, 12\)"),
        (lambda: request(plus.embed([picture(0)])), r"found embeddings \(1, 5, 16\)"),
        (lambda: damaged(kept[:-4]), "truncated"),
        (lambda: damaged(b"x"), "not a safetensors file"),
        (lambda: damaged(kept) and changed(projected=np.full(12, np.nan, "f4")), "found numbers that are not finite"),
        (lambda: changed(projected=np.zeros(12, "f8")), "found float64 in 'projected', expected finite float32"),
        (lambda: save_file({"x": np.ones(2)}, file) or alone.read(paths[:1], base.takes), "no config of an image"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message) as error:
            do()
        assert "\n" not in str(error.value)
