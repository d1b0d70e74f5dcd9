"""Pipelines from the Hugging Face hub: only the files needed, into the cache that all its tools share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxmix.types import InputError
from jaxmix.weights.files import preferred

_CONFIGS = ("model_index.json", "config.json", "*/config.json", "*/scheduler_config.json", "tokenizer*/*")
_LISTED = 4
_SECONDS = 10.0  # to wait for an answer before the cache is tried


def download(repo: str, parts: Sequence[str], alone: bool = False) -> Path:
    """Return the local folder of the pipeline `repo` ("owner/name"), after downloading what is missing.

    With `alone` it may also be a repository of one model, such as a VAE. For each of `parts` one kind of weights is
    fetched, the one that `preferred` chooses, and never a pickle. Without a connection a cached folder is used. Raises
    InputError with one line for an unknown or private repository, for one that is not a diffusers pipeline, and if
    there is neither connection nor cache.
    """
    import huggingface_hub as hub  # here, because most models load without it
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = hub.HfApi().model_info(repo, timeout=_SECONDS)
    except RepositoryNotFoundError:  # and gated ones
        raise InputError(
            f"{repo}: neither a local folder or file nor a public model on the hub, expected the id of a diffusers "
            "pipeline (log in with `hf auth login` for a private or gated one)"
        ) from None
    except Exception as error:  # each release and each proxy reports a missing connection in its own way
        return _cached(hub, repo, error)
    files = [file.rfilename for file in found.siblings or ()]
    one = preferred(name for name in files if "/" not in name) if alone else None
    if "model_index.json" not in files and "config.json" in files and one is not None:
        parts = [""]
    elif "model_index.json" not in files:
        single = [name for name in files if "/" not in name and name.endswith(".safetensors")]
        hint = f"; it has single files, download one and give its path: {', '.join(single[:_LISTED])}" if single else ""
        raise InputError(f"{repo}: no model_index.json on the hub, expected a diffusers pipeline{hint}")
    try:
        return _fetch(hub, repo, files, parts)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{repo}: the download failed: {_one_line(error)}; the next call resumes it") from None


def wanted_files(files: Iterable[str], part: str) -> list[str]:
    """Return the weight files to fetch for a part ("": of the repository itself): one file, or an index of shards."""
    prefix = f"{part}/" if part else ""
    name = preferred(name.removeprefix(prefix) for name in files if name.startswith(prefix))
    return [] if name is None else [prefix + name]


def _fetch(hub: Any, repo: str, files: Sequence[str], parts: Sequence[str]) -> Path:
    weights = [name for part in parts for name in wanted_files(files, part)]
    folder = Path(hub.snapshot_download(repo, allow_patterns=[*_CONFIGS, *weights]))
    shards = set()
    for index in (name for name in weights if name.endswith(".json")):
        weight_map = json.loads((folder / index).read_text(encoding="utf-8")).get("weight_map", {})
        shards |= {(Path(index).parent / shard).as_posix() for shard in weight_map.values()}
    if shards:
        folder = Path(hub.snapshot_download(repo, allow_patterns=[*_CONFIGS, *weights, *sorted(shards)]))
    return folder


def _cached(hub: Any, repo: str, error: Exception) -> Path:
    try:
        return Path(hub.snapshot_download(repo, local_files_only=True))
    except (OSError, ValueError):  # LocalEntryNotFoundError is one of them
        raise InputError(
            f"{repo}: no such folder or file here, the hub cannot be reached ({_one_line(error)}), and it is not "
            "cached; expected a connection, or the path of a model"
        ) from None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
