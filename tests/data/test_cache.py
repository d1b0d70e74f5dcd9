import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmix
from jaxmix.command import parse
from jaxmix.rows import Text
from jaxmix.tuning.data import make_dataset
from jaxmix.types import InputError
from tests.data.made import DIMENSIONS, make_folder, make_tars, row, spoil
from train import cache_latents
from train.data import ImageFolder, LatentCache, PictureConfig, Pictures, open_batches, open_source
from train.data.cache import decode_record, encode_record

WIDE, TALL = (16, 24), (24, 16)
SIZES = [WIDE, TALL, WIDE, WIDE, TALL, WIDE, TALL]
BUCKETS = {"enable_bucket": True, "min_bucket_reso": 8, "max_bucket_reso": 32, "bucket_reso_steps": 4}
BUCKETS = {"resolution": 20, "center_crop": True, **BUCKETS}


@pytest.fixture(scope="module")
def model(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return seven pictures, of which one is broken."""
    folder = make_folder(tmp_path_factory.mktemp("pictures"), SIZES)
    spoil(folder, 5)
    return folder


def config(model, pictures, out, **changes):
    made = {"batch_size": 2, "rows_per_shard": 3, "labels": list(DIMENSIONS), **BUCKETS, **changes}
    return cache_latents.Config(pretrained_model_name_or_path=model, train_data_dir=str(pictures), out=str(out), **made)


@pytest.fixture(scope="module")
def cached(model, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache")
    assert cache_latents.main(config(model, pictures, out, random_flip=True)) == 0
    return out


def assert_same_row(one, other):
    assert set(one) == set(other)
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key])


@functools.cache
def make_encode(vae):
    return jax.jit(lambda params, images: vae.apply({"params": params}, images, method="encode"))


def expected(pipe, picture_row):
    """Return moments and text states of a row, without a cache."""
    images = picture_row["image"][None] / np.float32(127.5) - 1
    mean, logvar = jax.device_get(make_encode(pipe.vae)(pipe.params["vae"], images))
    return mean[0], np.exp(0.5 * logvar)[0], pipe.encode_prompt([picture_row["text"]]).context[0]


def test_a_cache_holds_what_the_pictures_give(cached, pictures, tiny_pipeline):
    cache = LatentCache(cached, labels=DIMENSIONS)
    direct = Pictures(ImageFolder(pictures, labels=DIMENSIONS), PictureConfig(**BUCKETS))
    assert len(cache) == 6
    assert cache.buckets == direct.buckets == [WIDE, TALL]
    assert [len(group) for group in cache.groups] == [3, 3]
    for i in range(len(cache)):
        found = cache[i]
        number = int(found["id"][:3])
        wanted = direct[number]
        assert found["labels"] == wanted["labels"] == tuple(row(number)["labels"])
        np.testing.assert_array_equal(found["time_ids"], wanted["time_ids"])
        for key, value in zip(("latents_mean", "latents_std", "context"), expected(tiny_pipeline, wanted), strict=True):
            assert found[key].dtype == np.float16
            np.testing.assert_allclose(found[key], value, rtol=2e-3, atol=2e-3)


def test_the_mini_models_cache_equals_its_direct_path(tmp_path):
    pipe = jaxmix.load("mini")
    folder = make_folder(tmp_path / "pictures", [(64, 64), (80, 64)])
    changes = {"resolution": 64, "enable_bucket": False}
    cache_latents.main(config("mini", folder, tmp_path / "cache", **changes))
    cfg = PictureConfig(resolution=64, center_crop=True)
    cache = open_batches(tmp_path / "cache", cfg, pipe, DIMENSIONS)
    direct = open_batches(folder, cfg, pipe, DIMENSIONS)
    images = np.stack([direct[i]["image"] for i in range(2)]) / np.float32(127.5) - 1
    mean, logvar = jax.device_get(make_encode(pipe.vae)(pipe.params["vae"], images))
    context = pipe.encode_prompt([direct[i]["text"] for i in range(2)]).context
    for i in range(2):
        assert cache[i]["id"] == direct[i]["id"]
        # float16 has 11 bits; the rest is another batch size's rounding.
        np.testing.assert_allclose(cache[i]["latents_mean"], mean[i], rtol=6e-4, atol=1e-4)
        np.testing.assert_allclose(cache[i]["latents_std"], np.exp(0.5 * logvar)[i], rtol=6e-4, atol=1e-5)
        np.testing.assert_allclose(cache[i]["context"], context[i], rtol=6e-4, atol=1e-4)


def test_mirrored_pictures_are_cached_as_well(cached, pictures, tiny_pipeline):
    cache = LatentCache(cached, random_flip=True)
    direct = Pictures(ImageFolder(pictures), PictureConfig(**BUCKETS))
    turned = cache.read(0, True)
    wanted = direct.read(int(turned["id"][:3]), cache.buckets[0], flip=True)
    np.testing.assert_allclose(turned["latents_mean"], expected(tiny_pipeline, wanted)[0], rtol=2e-3, atol=2e-3)
    assert not np.array_equal(turned["latents_mean"], cache[0]["latents_mean"])
    stream = cache.in_batches(2, 0)
    means = {(found["id"], found["latents_mean"].tobytes()) for found in (stream[i] for i in range(60))}
    assert len(means) == 12


def test_batches_from_a_cache_are_of_one_size_and_repeat(cached):
    def transform(found, rng):
        return {"mean": found["latents_mean"], "id": found["id"]}

    datasets = [make_dataset(LatentCache(cached), 2, 5, transform) for _ in range(2)]
    shapes = set()
    for step in range(6):
        one, other = (dataset[step] for dataset in datasets)
        np.testing.assert_array_equal(one["mean"], other["mean"])
        shapes.add(one["mean"].shape)
    assert shapes == {(2, 8, 12, 4), (2, 12, 8, 4)}


def test_the_empty_captions_states_are_there(cached, tiny_pipeline):
    empty = LatentCache(cached).empty
    assert set(empty) == {"context"}
    np.testing.assert_allclose(empty["context"], tiny_pipeline.encode_prompt([""]).context[0], rtol=2e-3, atol=2e-3)


def test_two_text_encoders_give_pooled_states_as_well():
    """SDXL's pipelines have pooled states beside the context."""
    states = Text(jnp.full((2, 3, 4), 0.5), jnp.full((2, 5), 0.25))
    pipe = types.SimpleNamespace(text_encoder_2=object(), encode_prompt=lambda texts: states)
    found = cache_latents.encode_texts(pipe, ["a", "b"])
    record = decode_record(encode_record({key: x[1] for key, x in found.items()}, "é 1", ("color",)))
    assert (record["id"], record["labels"]) == ("é 1", ("color",))
    for key, shape, value in [("context", (3, 4), 0.5), ("pooled", (5,), 0.25)]:
        np.testing.assert_array_equal(record[key], np.full(shape, value, np.float16))


def test_tars_give_the_same_cache_as_the_folder(model, cached, tmp_path):
    tars = make_tars(tmp_path / "tars", SIZES, 2)
    cache_latents.main(config(model, tars, tmp_path / "cache", random_flip=True))
    one, other = LatentCache(cached), LatentCache(tmp_path / "cache")
    rows = {found["id"].rpartition("/")[2]: found for found in (other[i] for i in range(len(other)))}
    assert len(rows) == 7
    for i in range(len(one)):
        found = one[i]
        assert_same_row({**found, "id": ""}, {**rows[found["id"][:3]], "id": ""})


def test_a_stopped_run_keeps_its_finished_shards_and_gives_the_same_cache(
    model, pictures, cached, tmp_path, monkeypatch
):
    encode = cache_latents.encode_record
    made = []

    def stop(*args):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(args)
        return encode(*args)

    cfg = config(model, pictures, tmp_path, random_flip=True)
    monkeypatch.setattr(cache_latents, "encode_record", stop)
    with pytest.raises(KeyboardInterrupt):
        cache_latents.main(cfg)
    (finished,) = tmp_path.glob("*.array_record")
    before = finished.stat().st_mtime_ns
    with pytest.raises(InputError, match=r"it is not finished: run train.cache_latents again"):
        open_source(tmp_path)
    monkeypatch.setattr(cache_latents, "encode_record", encode)
    cache_latents.main(cfg)
    assert finished.stat().st_mtime_ns == before
    assert not list(tmp_path.glob(".*"))
    one, other = open_source(cached), open_source(tmp_path)
    assert len(one) == len(other) == 6
    for i in range(6):
        assert_same_row(one[i], other[i])


def test_workers_share_the_shards_and_the_last_writes_the_index(model, pictures, cached, tmp_path, capsys):
    for worker in (1, 0):
        assert not (tmp_path / "index.json").exists()
        cache_latents.main(config(model, pictures, tmp_path, random_flip=True, worker=worker, workers=2))
    assert "2 of 3 shards are still missing" in capsys.readouterr().err
    assert (tmp_path / "index.json").read_text() == (cached / "index.json").read_text()


def test_two_devices_encode_what_one_does(model, pictures, cached, tmp_path):
    cache_latents.main(config(model, pictures, tmp_path, random_flip=True, devices=2))
    one, other = LatentCache(cached), LatentCache(tmp_path)
    for i in range(6):
        np.testing.assert_allclose(one[i]["latents_mean"], other[i]["latents_mean"], rtol=2e-3, atol=2e-3)


def test_a_folder_that_was_begun_otherwise_is_refused(model, pictures, cached):
    for changes, words in [
        ({"random_flip": False}, "started with another random_flip: found True, expected False"),
        ({"random_flip": True, "labels": [*DIMENSIONS, "mood"]}, "started with another labels"),
    ]:
        with pytest.raises(InputError, match=words):
            cache_latents.main(config(model, pictures, cached, **changes))


def test_too_many_bad_rows_stop_the_encoding_and_name_one(model, pictures, tmp_path):
    with pytest.raises(InputError, match=r"found 1 bad rows, expected at most 0 .* 005\.png: cannot be decoded"):
        cache_latents.main(config(model, pictures, tmp_path, max_bad_rows=0))


def test_a_cache_of_another_model_is_refused_with_what_differs(cached, tiny_pipeline):
    cache = LatentCache(cached)
    cache.check(tiny_pipeline, PictureConfig(**BUCKETS))
    half = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), tiny_pipeline.params)
    cache.check(dataclasses.replace(tiny_pipeline, params=half))
    for part in ("vae", "text_encoder"):
        params = {
            **tiny_pipeline.params,
            part: jax.tree.map(lambda x: np.asarray(x) + 0.01, tiny_pipeline.params[part]),
        }
        with pytest.raises(InputError, match=rf"made with another model \(.*\): {part}\.weights: found \w+, expected"):
            cache.check(dataclasses.replace(tiny_pipeline, params=params))
    unet = {**tiny_pipeline.params, "unet": jax.tree.map(lambda x: np.asarray(x) + 1, tiny_pipeline.params["unet"])}
    cache.check(dataclasses.replace(tiny_pipeline, params=unet))
    scaled = dataclasses.replace(tiny_pipeline.vae.config, scaling_factor=0.5)
    with pytest.raises(InputError, match=r"vae\.config"):
        cache.check(dataclasses.replace(tiny_pipeline, vae=tiny_pipeline.vae.clone(config=scaled)))


@pytest.mark.parametrize(
    ("changes", "labels", "words"),
    [
        ({"resolution": 24}, None, "made with another resolution: found 20, expected 24"),
        ({"enable_bucket": False}, None, "made with another enable_bucket: found True, expected False"),
        ({}, ["mood"], "found a cache without the label 'mood', expected one with it; it has color, light, focus"),
    ],
)
def test_a_cache_for_something_else_is_refused(cached, tiny_pipeline, changes, labels, words):
    with pytest.raises(InputError, match=words):
        open_batches(cached, PictureConfig(**{**BUCKETS, **changes}), tiny_pipeline, labels)


def test_labels_that_a_run_does_not_use_are_left_out(cached):
    cache = LatentCache(cached, labels=["light"])
    found = {cache[i]["id"]: cache[i]["labels"] for i in range(len(cache))}
    assert found["003.png"] == ("light",)
    assert found["001.png"] == ()


def test_mirroring_without_mirrored_pictures_is_refused(cached, tmp_path):
    index = json.loads((cached / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "flipped": False}))
    with pytest.raises(InputError, match="found no mirrored pictures, expected a cache made with --random_flip"):
        LatentCache(tmp_path, random_flip=True)


def test_an_index_that_is_something_else_or_lacks_a_shard_is_refused(cached, tmp_path):
    index = tmp_path / "index.json"
    for text, words in [
        ("{", "not readable as JSON"),
        ("{}", "not the index of a cache"),
        (json.dumps({"format": "jaxmix latents", "version": 9}), "version: found 9, expected 1"),
        ((cached / "index.json").read_text(), r"data-00000-of-00003\.array_record: found no such file"),
    ]:
        index.write_text(text)
        with pytest.raises(InputError, match=words):
            LatentCache(tmp_path)


def test_sizes_that_the_autoencoder_cannot_encode_are_refused(pictures, tiny_pipeline):
    with pytest.raises(InputError, match="resolution: found 15, expected a multiple of 2 for this autoencoder"):
        open_batches(pictures, PictureConfig(resolution=15), tiny_pipeline)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "out: not given"),
        (["--out", "x", "--worker", "2"], "worker: found 2, expected 0 to 0"),
        (["--out", "x", "--batch_size", "3", "--devices", "2"], "batch_size: found 3, expected a multiple of devices"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, words):
    with pytest.raises(InputError, match=words):
        parse(cache_latents.main, flags)


def test_flags_are_read():
    cfg = parse(
        cache_latents.main, ["--out", "x", "--labels", "[color, light]", "--enable_bucket", "--resolution", "1024"]
    )
    assert cfg.labels == ["color", "light"]
    assert cfg.enable_bucket
    assert cfg.resolution == 1024
