"""Pipelines by hub id, against a hub that is a folder on this machine."""

import fnmatch
import json
import shutil
import types
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

import jaxmix
from jaxmix.types import InputError
from jaxmix.weights.hub import download, wanted_files

PARTS = ("unet", "text_encoder")


class Hub:
    """Serve one repository of empty files; `downloaded` holds what was asked for."""

    def __init__(self, folder, files, weight_map=None):
        self.remote, self.cache = folder / "remote", folder / "cache"
        for name in files:
            (self.remote / name).parent.mkdir(parents=True, exist_ok=True)
            (self.remote / name).write_text(json.dumps({"weight_map": weight_map or {}}))
        self.files, self.error = list(files), None

    def model_info(self, repo, timeout):
        assert repo == "owner/name"
        assert timeout > 0
        if self.error:
            raise self.error
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in self.files])

    def snapshot_download(self, repo, allow_patterns=(), local_files_only=False):
        if local_files_only:
            if not self.cache.is_dir():
                raise LocalEntryNotFoundError("nothing in the cache")
            return str(self.cache)
        for name in self.files:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.remote / name, self.cache / name)
        return str(self.cache)

    @property
    def downloaded(self):
        return {path.relative_to(self.cache).as_posix() for path in self.cache.rglob("*") if path.is_file()}


@pytest.fixture
def make_hub(tmp_path, monkeypatch):
    def make(files, weight_map=None):
        hub = Hub(tmp_path, files, weight_map)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
        return hub

    return make


CONFIGS = {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"}


def test_only_what_is_needed_is_downloaded(make_hub):
    weights = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    others = {
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_flax_model.msgpack",
        "unet/model.onnx",
        "text_encoder/pytorch_model.bin",
        "safety_checker/model.safetensors",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "README.md",
    }
    hub = make_hub(CONFIGS | weights | others)
    assert download("owner/name", PARTS) == hub.cache
    assert hub.downloaded == CONFIGS | weights


def test_shards_follow_their_index(make_hub):
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    shards = {"unet/model-1-of-2.safetensors", "unet/model-2-of-2.safetensors"}
    weight_map = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    hub = make_hub(CONFIGS | shards | {index, "unet/other.safetensors"}, weight_map)
    download("owner/name", PARTS)
    assert hub.downloaded == CONFIGS | shards | {index}


def test_flax_weights_are_fetched_where_there_is_nothing_better():
    assert wanted_files(["unet/diffusion_flax_model.msgpack", "unet/x.bin"], "unet") == [
        "unet/diffusion_flax_model.msgpack"
    ]
    assert wanted_files(["unet/x.bin"], "unet") == []


def one_line():
    with pytest.raises(InputError) as error:
        jaxmix.load("owner/name")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_connection_and_cache_one_line_says_what_to_do(make_hub):
    make_hub(CONFIGS).error = OSError("[Errno -2]\nName or service not known")
    assert one_line() == (
        "owner/name: no such folder or file here, the hub cannot be reached (OSError: [Errno -2] Name or service not "
        "known), and it is not cached; expected a connection, or the path of a model"
    )


def test_without_connection_the_cache_is_used(make_hub):
    hub = make_hub(CONFIGS)
    download("owner/name", PARTS)
    hub.error = OfflineModeIsEnabled("offline")
    assert download("owner/name", PARTS) == hub.cache


def test_an_unknown_repository_is_one_line(make_hub):
    # Its constructor wants a response of the HTTP client, which is another one in each release.
    make_hub(CONFIGS).error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    assert "neither a local folder or file nor a public model on the hub" in one_line()


def test_repositories_that_are_no_pipeline_are_named(make_hub):
    make_hub({"model.safetensors", "README.md"})
    assert "no model_index.json on the hub" in one_line()
    assert "download one and give its path: model.safetensors" in one_line()


def test_a_local_folder_of_that_name_wins(make_hub, tmp_path, monkeypatch):
    make_hub(CONFIGS).error = AssertionError("the hub was asked")
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert one_line().startswith("owner/name: found no model_index.json")


def test_a_repository_of_one_model_serves_as_a_part(make_hub):
    files = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "README.md"]
    hub = make_hub(files)
    with pytest.raises(InputError, match=r"no model_index\.json on the hub"):
        download("owner/name", PARTS)
    download("owner/name", PARTS, alone=True)
    assert hub.downloaded == set(files[:2])
