"""Paths to buckets: one layer for everything that is read from or written to gs://, s3://, hf:// and memory://.

What is read (rows, pictures, models, adapters) is fetched into a local cache, file by file and whole, and used there by
code that knows nothing of buckets; `local` is the way in. What is written goes through `place`, which gives a path of
the standard library for a folder here and one of universal-pathlib, with the same methods, for a bucket. An object in a
bucket appears whole or not at all, so it needs neither a temporary name nor a lock.

Paths in the cache hold bucket, name and a digest of the version, so that a file which changes there is fetched again,
and never under the feet of a reader.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import io
import mimetypes
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from jaxmix.clients import answered, client, filesystem, key_of, options_of, tried, url_of
from jaxmix.command import progress
from jaxmix.copies import cache_folder
from jaxmix.types import InputError

READ_ONLY = ("hf",)
_TYPE = {"gs": "content_type", "s3": "ContentType"}  # what clients call the type of an object
_AT_ONCE = 16
_OLD = 3600.0  # seconds
_TOLD = 100 << 20  # bytes from which a download shows its progress
_VERSION = ("etag", "ETag", "generation", "md5Hash", "blob_id", "lfs", "created", "LastModified", "mtime", "size")
_fetched: dict[str, Path] = {}
Choose = Callable[[Sequence[str], Callable[[str], bytes]], Iterable[str]]


def place(name: Any) -> Path:
    """Return the path of a folder or file to write to: `pathlib.Path`, or one with its methods for a bucket."""
    url = url_of(name)
    if url is None:
        return Path(name)
    from upath import UPath

    filesystem(url)
    return cast(Path, UPath(url, **options_of(url.partition(":")[0])))


def remote(path: Any) -> bool:
    """Return whether a path that `place` made is in a bucket."""
    return not isinstance(path, (str, Path))


# Reading --------------------------------------------------------------------------------------------------------------


def local(name: Any, choose: Choose | None = None) -> Path:
    """Return the path on this machine of a file or folder, fetched if it lies in a bucket and has changed or is new.

    Each is looked up once in a process. Of a folder all files are fetched, or those that `choose` picks, given their
    names and a function that reads one. Raises `InputError` for what is not there, or cannot be read.
    """
    url = url_of(name)
    if url is None:
        return Path(name)
    if url not in _fetched:
        _fetched[url] = _fetch(url, choose)
    return _fetched[url]


def fetch_all(names: Iterable[Any]) -> None:
    """Fetch many files at once, those of a job's rows; what cannot be fetched is an error where it is used."""
    urls = [url for url in dict.fromkeys(map(url_of, names)) if url is not None and url not in _fetched]
    if len(urls) < 2:
        return
    bar = progress(len(urls), "fetch", "files")
    with bar, concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in concurrent.futures.as_completed([pool.submit(local, url) for url in urls]):
            bar.update(0 if done.exception() else 1)


def listing(name: Any) -> list[str] | None:
    """Return the addresses of the files in a folder of a bucket, sorted, or None for one file, or a path here."""
    url = url_of(name)
    if url is None:
        return None
    fs = filesystem(url)
    found = answered(url, lambda: fs.info(key_of(fs, url)))
    if found["type"] != "directory":
        return None
    inside = answered(url, lambda: fs.ls(key_of(fs, url), detail=True))
    return sorted(f"{url}/{PurePosixPath(one['name']).name}" for one in inside if one["type"] == "file")


def _fetch(url: str, choose: Choose | None) -> Path:
    fs = filesystem(url)
    key = key_of(fs, url)
    info = answered(url, lambda: fs.info(key))
    above = cache_folder().joinpath(*_parts(url)[:-1])
    if info["type"] != "directory":
        target = above / _digest({"": info}) / _parts(url)[-1]
        _copy(fs, url, {key: (info, target)})
        return target
    files = {
        str(PurePosixPath(path).relative_to(PurePosixPath(key))): (path, one)
        for path, one in answered(url, lambda: fs.find(key, detail=True)).items()
        if not path.endswith("/")  # which some tools write to stand for a folder
    }
    if choose is not None:
        wanted = set(choose(sorted(files), lambda name: answered(url, lambda: fs.cat_file(files[name][0]))))
        files = {name: one for name, one in files.items() if name in wanted}
    if not files:
        raise InputError(f"{url}: no such file or folder, or one without a file that is read here")
    folder = above / _digest({name: info for name, (_, info) in files.items()}) / _parts(url)[-1]
    # Names are those of a stranger's bucket: none may lead out of the folder.
    if bad := next((name for name in files if ".." in PurePosixPath(name).parts), None):
        raise InputError(f"{url}: found the name {bad!r}, expected no '..' in it")
    _copy(fs, url, {path: (info, folder / name) for name, (path, info) in files.items()})
    return folder


def _copy(fs: Any, url: str, files: Mapping[str, tuple[Mapping[str, Any], Path]]) -> None:
    """Fetch files that are not here yet. Each appears whole, so what a stopped run has fetched is kept."""
    todo = {
        path: (info, target)
        for path, (info, target) in files.items()
        if not (target.is_file() and target.stat().st_size == info["size"])
    }
    total = sum(info["size"] or 0 for info, _ in todo.values())
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress(max(total >> 20, 1), f"fetch {url}", "MiB")) if total >= _TOLD else None
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(min(_AT_ONCE, max(1, len(todo)))))

        def one(path: str) -> None:
            info, target = todo[path]
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(target.parent)
            temporary = target.with_name(f".{secrets.token_hex(6)}.tmp")
            try:
                tried(url, lambda: fs.get_file(path, str(temporary)))
                size = temporary.stat().st_size
                if size != info["size"]:
                    raise InputError(f"{url}: found {size} bytes of {path}, expected {info['size']}")
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
            if bar is not None:
                bar.update((info["size"] or 0) >> 20)

        for done in [pool.submit(one, path) for path in todo]:
            done.result()


def _sweep(folder: Path) -> None:
    """Remove what downloads that were killed have left; one that goes on is never as old as that."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _OLD:
                path.unlink()


# Writing --------------------------------------------------------------------------------------------------------------


def write(path: Any, content: bytes, create: bool = False) -> None:
    """Write an object of a bucket, whole, by one request; with ``create`` raises FileExistsError if it is there."""
    fs, key = client(path)
    told = {"mode": "create"} if create else {}
    if (kind := mimetypes.guess_type(path.name)[0]) and (name := _TYPE.get(str(path).partition(":")[0])):
        told[name] = kind  # so that a browser shows a gallery, and does not save it
    tried(str(path), lambda: fs.pipe_file(key, content, **told))


def read(path: Any) -> bytes | None:
    """Return the content of an object of a bucket, None if it is not there."""
    fs, key = client(path)
    try:
        return cast(bytes, tried(str(path), lambda: fs.cat_file(key), missing=True))
    except FileNotFoundError:
        return None


def opened(path: Any) -> BinaryIO:
    """Open a file to read, here or in a bucket, whose content is fetched; raises OSError for one that is not there."""
    if not remote(path):
        return cast(BinaryIO, path.open("rb"))
    content = read(path)
    if content is None:
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    return io.BytesIO(content)


def size(path: Any) -> int | None:
    """Return the size of an object of a bucket in bytes, asked for by its name; None if it is not there."""
    fs, key = client(path)
    try:
        info = tried(str(path), lambda: fs.info(key), missing=True)
    except FileNotFoundError:
        return None
    return int(info["size"]) if info["type"] == "file" else None


def sizes(folder: Any) -> dict[str, int]:
    """Return the names of the objects right in a folder of a bucket, listed anew, with their sizes in bytes."""
    fs, key = client(folder)
    fs.invalidate_cache()  # a client may remember listings
    try:
        found = tried(str(folder), lambda: fs.ls(key, detail=True), missing=True)
    except FileNotFoundError:  # nothing with such a prefix
        return {}
    return {PurePosixPath(one["name"]).name: int(one["size"] or 0) for one in found if one["type"] == "file"}


def remove(path: Any) -> None:
    """Remove an object of a bucket, if it is there."""
    fs, key = client(path)
    with contextlib.suppress(FileNotFoundError):
        tried(str(path), lambda: fs.rm_file(key), missing=True)


def remove_all(files: Sequence[Any]) -> None:
    """Remove objects of a bucket, several at once."""
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(remove, path) for path in files]:
            done.result()


def names(folder: Any) -> set[str]:
    """Return the names of the files right in a folder, here or in a bucket."""
    if remote(folder):
        return set(sizes(folder))
    return {path.name for path in folder.iterdir() if path.is_file()}


def check_folder(path: Any, writes: bool = True) -> None:
    """Raise `InputError` within half a minute if a folder in a bucket cannot be listed, or nothing written there."""
    url = str(path)
    if url.partition(":")[0] in READ_ONLY:
        raise InputError(f"{url}: found a place that is only read, expected a local folder, gs:// or s3://")
    probe = path / f".jaxmix-{secrets.token_hex(6)}.tmp"

    def ask() -> None:
        if not writes:
            fs, key = client(path)
            with contextlib.suppress(PermissionError):  # to ask about the bucket itself
                fs.info(key.strip("/").partition("/")[0] if "memory" not in url else "/")
            return
        write(probe, b"may be removed")
        with contextlib.suppress(InputError):  # who may write need not be allowed to remove
            remove(probe)

    try:
        answered(url, ask)
    except InputError as error:
        raise InputError(str(error).replace(str(probe), url)) from None


def _parts(url: str) -> list[str]:
    scheme, _, rest = url.partition("://")
    parts = [scheme, *(part for part in rest.split("/") if part)]
    if ".." in parts:
        raise InputError(f"{url}: found '..' in the address, expected none")
    return parts


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    held = {name: [str(info.get(key)) for key in _VERSION] for name, info in files.items()}
    return hashlib.sha256(repr(sorted(held.items())).encode("utf-8", "surrogatepass")).hexdigest()[:12]
