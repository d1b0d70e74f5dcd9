"""infer.style_transfer with InstantStyle-Plus, on a small random pipeline: rows, captions, settings, and mistakes."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import jaxmix
from infer.job import run_job
from infer.png import read_settings
from infer.style_transfer import Config
from jaxmix.models import CLIPVisionConfig, CLIPVisionModel
from jaxmix.testing import moved, random_params
from jaxmix.types import InputError
from jaxmix.weights import save_tree, write_config
from tests.jobs import only
from tests.methods.test_ip_adapter import VISION


@pytest.fixture(scope="module", autouse=True)
def loaded(one_level):
    """Let jobs have the pipeline without reading it: how models are read is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxmix, "load", lambda *_, **__: one_level)
        yield


@pytest.fixture(scope="module")
def files(one_level, tmp_path_factory):
    """Return a folder with an adapter and its encoder, a net, contents with captions, and a style."""
    path = tmp_path_factory.mktemp("plus")
    model = CLIPVisionModel(CLIPVisionConfig.from_dict(VISION))
    encoder = jaxmix.ImageEncoder(model, random_params(model.abstract_params(), 0))
    save_tree(encoder.params, path / "clip" / "model.safetensors")
    write_config(model.config.to_dict(), path / "clip" / "config.json")
    jaxmix.IPAdapter.init(jax.random.key(0), one_level, encoder).save(path / "ip.safetensors")
    net = jaxmix.ControlNet.init(jax.random.key(1), one_level)
    dataclasses.replace(net, params=moved(net.params, jax.random.key(2), 0.2)).save(path / "tile")
    rng = np.random.default_rng(0)
    (path / "contents").mkdir()
    for name in ("contents/a", "contents/b", "style", "alone"):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path / f"{name}.png")
    (path / "contents" / "a.txt").write_text("a cat\n")
    (path / "contents" / "b.txt").write_text("a dog on\nthe sea\n")
    return path


def flags(files, out, **more):
    given = {"content": str(files / "contents"), "style": str(files / "style.png"), "transfer": "instantstyle_plus"}
    given |= {"style_ip": str(files / "ip.safetensors"), "image_encoder": str(files / "clip")}
    return Config(
        **{**given, "model": "model", "out": str(out), "steps": 2, "devices": 1, "style_blocks": None, **more}
    )


def test_every_content_meets_the_style_under_its_caption_and_a_part_changes_it(files, tmp_path):
    def drawn(out, **more):
        assert run_job(flags(files, out, **more), "style_transfer") == 0
        names = [f"{i:04d}_seed{i}.png" for i in range(2)]
        return [only(out, name) for name in names]

    parts = {"content_ip": str(files / "ip.safetensors"), "tile_net": str(files / "tile")}
    found = drawn(tmp_path / "a", **parts)
    settings = [read_settings(path) for path in found]
    assert [s["prompt"] for s in settings] == ["a cat", "a dog on the sea"]
    assert settings[0]["method"] == "instantstyle_plus" and settings[0]["renoise"] == 1
    assert (settings[0]["guidance_scale"], settings[0]["sampler"]) == (5.0, "ddim")
    assert settings[0]["negative_prompt"].startswith("lowres")
    off = drawn(tmp_path / "b", **parts, tile_scale=0.0)
    pixels = [[np.asarray(Image.open(path)).astype(int) for path in some] for some in (found, off)]
    assert all(np.abs(a - b).max() > 0 for a, b in zip(*pixels, strict=True))
    gallery = (tmp_path / "a" / "gallery.html").read_text()
    assert "content 0.2, style 1.2, tile 0.4" in gallery and f"{found[0].stem}_content.png" in gallery


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transfer": "instant"}, '--transfer: found text "instant", expected one of style_id, instantstyle_plus'),
        (
            {"style_ip": None, "image_encoder": None},
            "--style-ip, --guide: found neither, expected what follows the style",
        ),
        ({"style_ip": "gone"}, "--style-ip: gone: no such file or folder, expected an IP-Adapter or mini-ip"),
        ({"tile_net": "mini-ip"}, "--tile-net: mini-ip: it is for --ip-adapter, expected a ControlNet"),
        ({"guide": "gone"}, "--guide: gone: no such file or folder, expected a CSD, a CLIP or mini-clip"),
        ({"tile_map": "tiles"}, "--tile-map: found 'tiles', expected one of canny"),
        ({"renoise": -1}, "--renoise: found -1, expected a number of iterations from 0"),
        ({"image_encoder": None}, "holds no image encoder"),
        ({"transfer": None}, "--style-ip: found .* no row whose transfer is instantstyle_plus"),
    ],
)
def test_a_mistake_of_the_job_is_one_line(files, tmp_path, changes, words):
    with pytest.raises(InputError, match=words) as error:
        run_job(flags(files, tmp_path / "out", **changes), "style_transfer")
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "manifest.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"content": "alone.png"}, "prompt: found none, expected a caption of "),
        ({"sampler": "euler"}, "sampler: found euler, expected ddim, which the method inverts"),
        ({"style_guidance": 0.5}, "style_guidance, content_guidance: found one without --guide"),
    ],
)
def test_a_row_that_cannot_be_drawn_says_why(files, tmp_path, capsys, changes, words):
    held = {key: str(files / value) if key == "content" else value for key, value in changes.items()}
    with pytest.raises(InputError, match="no row can be drawn"):
        run_job(flags(files, tmp_path / "out", **held), "style_transfer")
    told = capsys.readouterr()
    assert words in told.out + told.err
