"""What is read from buckets and the hub: fetched once, whole, and under the name that a user gave in messages."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time

import fsspec
import jax
import numpy as np
import pytest
from PIL import Image

import jaxmix
from infer.checks import check_file
from infer.flags import Config
from infer.job import collect_rows
from infer.methods.lora import check_loras
from infer.methods.registry import Methods
from infer.pictures import open_picture, pictures_in
from infer.preprocess import Config as Preprocess
from infer.preprocess import main as preprocess
from infer.rows import BadRow
from jaxmix import clients, paths
from jaxmix.copies import cache_folder, named
from jaxmix.types import InputError
from jaxmix.weights.files import read_of, user_path
from tests.buckets import servers


def put(url, content):
    paths.write(paths.place(url), content)


def png(shade=10):
    held = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(held, format="PNG")
    return held.getvalue()


def fresh(monkeypatch):
    """Forget what was fetched, as another process would not know it."""
    monkeypatch.setattr(paths, "_fetched", {})


def test_a_picture_is_fetched_once_and_again_when_it_changes(bucket, monkeypatch):
    url = f"{bucket}/in/photo.png"
    put(url, png())
    assert check_file("image", url) == url and open_picture(url, 8, 8)[0, 0, 0] == 10
    first = user_path(url)
    put(url, png(20))
    assert user_path(url) == first  # in one process, a file is one file
    fresh(monkeypatch)
    assert open_picture(url, 8, 8)[0, 0, 0] == 20 and user_path(url) != first
    put(f"{bucket}/in/notes.txt", b"x")
    assert pictures_in(f"{bucket}/in") == [url]
    with pytest.raises(InputError, match=rf"^image: {bucket}/in/gone.png: no such bucket, file or folder"):
        check_file("image", f"{bucket}/in/gone.png")
    assert not list(cache_folder().rglob("*.tmp"))


def test_a_download_that_breaks_off_is_never_used(monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    put("memory://b/photo.png", png())
    real, broken = MemoryFileSystem.get_file, [True]

    def half(fs, path, here, **how):
        if broken:
            with open(here, "wb") as file:
                file.write(png()[:20])
            raise KeyboardInterrupt if broken.pop() is None else OSError(28, "No space left on device")
        return real(fs, path, here, **how)

    monkeypatch.setattr(MemoryFileSystem, "get_file", half)
    with pytest.raises(OSError, match="No space left"):
        user_path("memory://b/photo.png")
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]
    (left,) = [path for path in cache_folder().rglob("*") if path.is_dir() and not any(path.iterdir())]
    for name, hours in ((".old.tmp", 2), (".new.tmp", 0)):  # of downloads that were killed, or go on
        (left / name).write_bytes(b"half")
        os.utime(left / name, (time.time() - 3600 * hours,) * 2)
    assert user_path("memory://b/photo.png").read_bytes() == png()
    assert {path.name for path in left.iterdir()} == {"photo.png", ".new.tmp"}


def test_of_a_model_one_form_of_the_weights_is_fetched_and_no_pickle():
    names = ["model_index.json", "README.md", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    unread = ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "README.md"]
    shards = ["vae/model.safetensors.index.json", "vae/model-1-of-2.safetensors", "vae/model-2-of-2.safetensors"]
    index = json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}).encode()
    found = read_of([*names, *unread, *shards, "vae/model.fp16.index.txt"], lambda name: index)
    assert set(found) == {*names, *shards, "vae/model.fp16.index.txt"} - {*unread}
    assert read_of(["pytorch_lora_weights.safetensors", "x.bin"], None) == ["pytorch_lora_weights.safetensors"]


def test_a_folder_is_fetched_as_it_is_and_messages_call_it_what_the_user_did(bucket):
    held = {"model_index.json": b"[1", "unet/config.json": b"{}", "unet/diffusion_pytorch_model.safetensors": b"abc"}
    for name, content in held.items():
        put(f"{bucket}/models/one/{name}", content)
    put(f"{bucket}/models/one/unet/diffusion_pytorch_model.bin", b"pickle")
    folder = user_path(f"{bucket}/models/one/")
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == held
    with pytest.raises(InputError) as error:
        jaxmix.load(f"{bucket}/models/one")
    assert named(error.value).startswith(f"{bucket}/models/one/model_index.json: not JSON")
    assert str(BadRow(0, "p:1", str(error.value))).startswith(f"p:1: {bucket}/models/one/model_index.json: not JSON")


def test_a_model_of_a_bucket_is_the_model_here(tmp_path, tiny_pipeline):
    tiny_pipeline.save(tmp_path / "model")
    for path in (tmp_path / "model").rglob("*"):
        if path.is_file():
            put(f"memory://b/tiny/{path.relative_to(tmp_path / 'model')}", path.read_bytes())
    pipe = jaxmix.load("memory://b/tiny")
    pairs = zip(jax.tree.leaves(pipe.params), jax.tree.leaves(tiny_pipeline.params), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    with pytest.raises(InputError, match="found the address of a bucket, expected a path here"):
        tiny_pipeline.save("memory://b/other")


def test_a_colon_of_an_address_is_no_strength():
    for tail, strength in (("", 1.0), (":0.5", 0.5)):
        assert check_loras("lora", f"gs://b/ink.safetensors{tail}") == (("gs://b/ink.safetensors", strength),)


CODE = """
import sys
from jaxmix import clients, paths
from jaxmix.copies import cache_folder, named
from jaxmix.types import InputError
from jaxmix.weights.files import user_path
from infer.methods.registry import Methods
from infer.pictures import pictures_in
print(user_path("hf://owner/name/in/a.png").read_bytes() == b"picture", pictures_in("hf://owner/name/in"))
print(sorted(path.name for path in user_path("hf://owner/name@main").rglob("*") if path.is_file()))
for what in ("hf://owner/name/gone.png", "hf://owner/none/a.png"):
    try:
        user_path(what)
    except InputError as error:
        print(error)
"""


def test_the_hub_is_read_by_its_own_client(tmp_path, monkeypatch):
    files = {"in/a.png": b"picture", "in/b.txt": b"", "unet/config.json": b"{}", "unet/model.safetensors": b"x"}
    with servers.hub(files) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)  # read when the client is imported: a process of its own
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=100)
    told = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert told[0] == "True ['hf://owner/name/in/a.png']"
    assert told[1] == "['b.txt', 'config.json', 'model.safetensors']"
    assert told[2].startswith("hf://owner/name/gone.png: no such bucket, file or folder")
    assert told[3].startswith("hf://owner/none/a.png: no such bucket, file or folder")


@pytest.mark.parametrize("url", ["gs://nobody/x.png", "s3://nobody/x.png"])
def test_no_credentials_are_one_line_that_says_where_they_are_looked_for(url, monkeypatch):
    # Where no cloud is near, clients ask for a machine's own account until they are told not to.
    for name in ("STORAGE_EMULATOR_HOST", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    fsspec.get_filesystem_class(url[:2]).clear_instance_cache()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setattr(clients, "FIRST_ANSWER", 1.5)
    with pytest.raises(
        InputError, match=r"expected (credentials for it|a connection, and credentials): .*(AWS|GOOGLE)"
    ):
        user_path(url)
    fsspec.get_filesystem_class(url[:2]).clear_instance_cache()


def test_a_job_with_rows_and_pictures_in_a_bucket_asks_a_silent_one_once(tmp_path, monkeypatch):
    put("memory://b/rows.jsonl", b'{"prompt": "a", "image": "memory://b/photo.png"}\n{"prompt": "b", "seed": -7}\n')
    put("memory://b/photo.png", png())
    config = Config(prompts="memory://b/rows.jsonl")
    rows, bad = collect_rows(config, Methods(config))
    assert [row.image for row in rows] == ["memory://b/photo.png"] and bad[0].where == "rows.jsonl:2"
    asked = []

    def silent(fs, path, **how):
        asked.append(path)
        time.sleep(2)

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "info", silent)
    monkeypatch.setattr(clients, "FIRST_ANSWER", 0.3)
    monkeypatch.setattr(clients, "_answered", set())
    text = "".join(f'{{"prompt": "a", "image": "memory://silent/{i}.png"}}\n' for i in range(100))
    (tmp_path / "rows.jsonl").write_text(text)
    began = time.monotonic()
    config = Config(prompts=str(tmp_path / "rows.jsonl"))
    _, bad = collect_rows(config, Methods(config))
    assert len(bad) == 100 and "image: memory://silent/99.png: no answer within 0.3 s" in bad[-1].reason
    assert len(asked) <= 16 and time.monotonic() - began < 2


def test_maps_are_made_of_and_in_a_bucket(bucket):
    put(f"{bucket}/photos/one.png", png())
    for told in ("wrote 1 maps", "1 were there"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert preprocess(Preprocess(f"{bucket}/photos", "gray", f"{bucket}/maps")) == 0
        assert told in out.getvalue()
    fs, key = clients.client(paths.place(f"{bucket}/maps/one.png"))
    info = fs.info(key)
    assert info["type"] == "file" and (bucket.startswith("memory") or "image/png" in map(str, info.values()))
