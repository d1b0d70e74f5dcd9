"""The trainers of image prompts: a CLIP of the scenes, and an IP-Adapter that reads with it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxmix
from jaxmix import InputError
from jaxmix.command import parse
from jaxmix.controls import ip_adapter as maths
from jaxmix.weights.files import ASSETS
from tests.data.made import make_folder, picture
from tests.jobs import TWO_STEPS, killed_after, predict
from train import cache_latents, clip, ip_adapter
from train.data import LatentCache
from train.diffusion import make_tokenize

CONFIGS = Path(__file__).parents[2] / "configs"


def config(module, name, folder, **changes):
    cfg = parse(module.main, ["--config", str(CONFIGS / name), "--output_dir", str(folder)])
    return dataclasses.replace(cfg, **{**TWO_STEPS, **changes})


def small_clip(folder, **changes):
    """Return the committed config of the CLIP at the size of the tiny base's pictures."""
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    cfg = config(clip, "mini_clip.yaml", folder)
    return dataclasses.replace(
        cfg,
        vision={**cfg.vision, **tower, "image_size": 16},
        text_encoder={**cfg.text_encoder, **tower},
        tokenizer=str(ASSETS / "mini" / "tokenizer"),
        projection_dim=12,
        scenes={**cfg.scenes, "objects": 4},
        eval_scenes=8,
        **changes,
    )


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Return a folder with two runs of two steps: `whole`, and `parts`, killed after the first and resumed."""
    root = tmp_path_factory.mktemp("clip")
    assert clip.main(small_clip(root / "whole")) == 0
    killed_after(1, root / "whole", root / "parts", exported="clip")
    assert clip.main(small_clip(root / "parts", resume_from_checkpoint="1")) == 0
    return root


@pytest.fixture(scope="module")
def seen_by(encoders):
    return str(encoders / "whole" / "clip")


@pytest.fixture(scope="module")
def base(one_level, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    one_level.save(folder)
    return str(folder)


def shrunk(base, seen_by, folder, **changes):
    """Return the committed config at the size of the tiny base."""
    cfg = config(ip_adapter, "ip_adapter_mini.yaml", folder)
    small = {
        "pretrained_model_name_or_path": base,
        "image_encoder": seen_by,
        "scenes": {**cfg.scenes, "size": 16, "objects": 4},
        "validation_steps": 0,
        "validation_prompts": cfg.validation_prompts[:1],
        "validation_scales": [1.0],
        "validation_batch_size": 6,
    }
    return dataclasses.replace(cfg, **{**small, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base, seen_by):
    root = tmp_path_factory.mktemp("runs")
    assert ip_adapter.main(shrunk(base, seen_by, root / "whole", validation_steps=2)) == 0
    killed_after(1, root / "whole", root / "parts", exported=ip_adapter.FILE)
    assert ip_adapter.main(shrunk(base, seen_by, root / "parts", resume_from_checkpoint="1")) == 0
    return root


def test_a_clip_resumes_bit_for_bit_and_tells_pictures_from_texts(encoders):
    whole, parts = ((encoders / name / "clip" / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    encoder = jaxmix.ImageEncoder.load(encoders / "whole" / "clip")
    cfg = small_clip(encoders)
    scenes = clip.InTurns(dataclasses.replace(cfg, arrangements=["anywhere"]), 3, two_objects=0.0, three_objects=0.0)
    right = clip.tell(encoder, [scenes[i] for i in range(8)])
    assert {kind: x.shape for kind, x in right.items()} == dict.fromkeys(clip.KINDS, (8,))


def test_the_contrastive_loss_is_that_of_the_paper_and_forgives_twins():
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((2, 5, 7))
    logits = np.asarray(clip.similarities(jnp.asarray(images), jnp.asarray(texts), jnp.asarray(1.0)))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts)]
    np.testing.assert_allclose(logits, np.e * unit[0] @ unit[1].T, rtol=1e-5)

    def loss(ids):
        return float(clip.contrast(jnp.asarray(logits), jnp.asarray(ids)[:, None])[0])

    by_hand = -0.5 * sum(
        np.diag(np.log(np.exp(x) / np.exp(x).sum(1, keepdims=True))).mean() for x in (logits, logits.T)
    )
    assert loss(range(5)) == pytest.approx(by_hand, rel=1e-5)
    same = np.stack([logits[0], logits[0], *logits[2:]])
    same[:, 1] = same[:, 0]
    best = float(clip.contrast(jnp.asarray(same), jnp.asarray([0, 0, 2, 3, 4])[:, None])[0])
    assert best < float(clip.contrast(jnp.asarray(same), jnp.arange(5)[:, None])[0]) + 1e-6


def test_stopping_and_resuming_gives_the_same_file_bit_for_bit(runs, one_level, seen_by):
    whole, parts = ((runs / name / ip_adapter.FILE).read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    adapter = jaxmix.IPAdapter.load(runs / "whole" / ip_adapter.FILE, one_level, seen_by)
    fresh = jaxmix.IPAdapter.init(jax.random.key(0), one_level, adapter.image_encoder)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), dict(adapter.layers), dict(fresh.layers))
    assert min(jax.tree.leaves(moved)) > 0  # every layer learnt, from a copy of the text's
    assert max(jax.tree.leaves(moved)) < 0.1
    (sheet,) = (runs / "whole" / "pictures").iterdir()
    with Image.open(sheet) as image:  # the picture to follow, the prompt, the picture alone, and both
        assert image.width == 4 * 128 and image.height == 128 + 16


def test_the_step_predicts_what_sampling_does(one_level, base, seen_by, tmp_path):
    pipe, encoder = one_level, jaxmix.ImageEncoder.load(seen_by)
    shown = [picture(0), picture(9)]
    batch = {"pixels": encoder.pixels(shown), "unseen": np.asarray([0, 1], "f4")}
    for kind in ("plus", "base"):
        cfg = shrunk(base, seen_by, tmp_path, kind=kind)
        adapter = ip_adapter.make_adapter(pipe, encoder, cfg)
        params = {"projection": adapter.projection, "layers": adapter.layers}
        frozen = {"unet": pipe.params["unet"], **ip_adapter.freeze_encoder(encoder, None, cfg)}
        seen = adapter.embed(shown)
        tokens = maths.project(kind, adapter.projection, jnp.stack([seen.shown[0], seen.none]))
        found = jax.jit(ip_adapter.make_tokens(encoder, cfg))(params, frozen, batch)
        np.testing.assert_allclose(found, tokens, atol=2e-5)
    x, t = np.random.default_rng(0).standard_normal((2, *pipe.latent_shape)).astype("f4"), jnp.asarray([500, 500])
    context = pipe.encode_prompt(["a cat", "a dog"]).context
    found = jax.jit(ip_adapter.make_predict(pipe, encoder, cfg))(params, frozen, batch, x, t, context, None)
    at_site, scale = dict.fromkeys(adapter.layers, 1.0), np.ones((2, 1))
    control = maths.bind(adapter.layers, tokens[:, None], 0 * tokens[:, None], scale=scale, at_site=at_site)
    wanted = predict(pipe.unet, pipe.params["unet"], x, t, context, (control,))
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_pictures_and_captions_are_left_out_in_their_shares(base, seen_by, tmp_path):
    cfg = shrunk(base, seen_by, tmp_path, image_dropout_rate=0.2, caption_dropout_rate=0.3, both_dropout_rate=0.1)
    row = ip_adapter.make_rows(lambda text: {"input_ids": np.asarray([len(text)], np.int32)}, cfg)
    source = {"image": np.zeros((2, 2, 3), np.uint8), "text": "a cat", "pixels": np.ones((2, 2, 3)), "id": "one"}
    made = [row(source, np.random.default_rng(seed)) for seed in range(3000)]
    unseen, dropped = (np.asarray([r[name] for r in made]) for name in ("unseen", "dropped"))
    for share, wanted in (
        ((unseen * (1 - dropped)).mean(), 0.2),
        ((dropped * (1 - unseen)).mean(), 0.3),
        ((unseen * dropped).mean(), 0.1),
    ):
        assert share == pytest.approx(wanted, abs=0.03)
    assert [int(r["input_ids"][0]) for r in made] == [0 if gone else 5 for gone in dropped]


def test_a_cache_holds_what_the_image_encoder_sees(tmp_path, base, seen_by, one_level):
    sizes = [(16, 24), (20, 12), (16, 16)]
    folder = make_folder(tmp_path / "pictures", sizes)
    options = {"pretrained_model_name_or_path": base, "train_data_dir": str(folder), "resolution": 16, "batch_size": 2}
    out = str(tmp_path / "cache")
    made = cache_latents.Config(out=out, image_encoder=seen_by, image_states=True, random_flip=True, **options)
    assert cache_latents.main(made) == 0
    rows, encoder = LatentCache(out), jaxmix.ImageEncoder.load(seen_by)
    states = encoder(encoder.pixels([picture(i, size) for i, size in enumerate(sizes)]))  # whole, and not mirrored
    for i in range(len(sizes)):
        found = rows.read(i, flip=True)
        np.testing.assert_allclose(found["clip_projected"], states.projected[i], atol=2e-3)
        np.testing.assert_allclose(found["clip_penultimate"], states.penultimate[i], atol=2e-3)
    cfg = shrunk(base, seen_by, tmp_path / "run", scenes={}, train_data_dir=out, resolution=16, kind="plus")
    opened = ip_adapter.open_rows(cfg, one_level, encoder)
    made = ip_adapter.make_rows(make_tokenize(one_level), cfg)(opened[0], np.random.default_rng(0))
    assert made["seen"].shape == (5, 16) and "pixels" not in made and "image" not in made
    frozen = ip_adapter.freeze_encoder(encoder, opened, cfg)
    grey = jaxmix.IPAdapter.init(jax.random.key(0), one_level, encoder, "plus").embed([picture(0)]).none
    assert set(frozen) == {"grey"}  # no image encoder in the step
    np.testing.assert_allclose(frozen["grey"], grey, atol=2e-3)
    # Trainers without image prompts take the cache as well, and an adapter refuses one without.
    rows.check(one_level)
    bare = str(tmp_path / "bare")
    assert cache_latents.main(cache_latents.Config(out=bare, **options)) == 0
    with pytest.raises(InputError, match=r"image_encoder\.config: found none, expected"):
        ip_adapter.open_rows(dataclasses.replace(cfg, train_data_dir=bare), one_level, encoder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_encoder": ""}, "image_encoder: not given, expected the CLIP that reads the pictures"),
        ({"image_encoder": "no/such"}, "no/such: found no such file or folder"),
        ({"kind": "full", "tokens": 4}, "tokens: found 4 for full"),
        ({"image_dropout_rate": 0.9, "caption_dropout_rate": 0.2}, "found a sum above 1"),
        ({"validation_images": ["a.png"]}, "validation_images: found 1, expected one for each of 0"),
        ({"pretrained_ip_adapter": "no/such.safetensors"}, "no/such.safetensors: found no such file"),
        ({"scenes": {}}, "train_data_dir, scenes: found neither, expected one of them"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, base, seen_by, changes, words):
    with pytest.raises(InputError) as e:
        ip_adapter.main(shrunk(base, seen_by, tmp_path, **changes))
    assert words in str(e.value) and "\n" not in str(e.value)
