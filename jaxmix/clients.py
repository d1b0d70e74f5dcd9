"""Clients of buckets, through fsspec: how each is asked, what is asked again, and what a failure is called.

Google's and Amazon's clients try again by themselves what their services call temporary.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from jaxmix.types import InputError, in_one_line

FIRST_ANSWER = 20.0
"""Seconds in which a bucket must answer for the first time, credentials found and connections tried again."""
_ATTEMPTS = 4
_SILENT = 60.0  # seconds for which a bucket that gave no answer is not asked again
_SCHEME = re.compile(r"(gs|gcs|s3|s3a|hf|memory):/{1,2}(?=[^/\s])")
_ALIASES = {"gcs": "gs", "s3a": "s3"}
_LOGGERS = {"gs": ("gcsfs",), "s3": ("s3fs", "aiobotocore"), "hf": ("huggingface_hub",)}
_CREDENTIALS = {
    "gs": "`gcloud auth application-default login`, GOOGLE_APPLICATION_CREDENTIALS, or the machine's account",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, `aws configure`, or a role of the machine",
    "hf": "`hf auth login`, or HF_TOKEN, for what is private or gated",
    "memory": "none",
}
_answered: set[str] = set()
_silent: dict[str, tuple[float, str]] = {}  # when a bucket gave no answer, and why
_clients: dict[str, Any] = {}
_looking: dict[str, float] = {}  # seconds that clients took to look for credentials
_making = threading.Lock()
T = TypeVar("T")


class MissingError(InputError):
    """There is no such bucket, file or folder."""


def url_of(name: Any) -> str | None:
    """Return the address of what lies in a bucket, in one form, or None for a path on this machine.

    One slash after the colon is what `pathlib` leaves of two.
    """
    text = str(name)
    found = _SCHEME.match(text)
    if found is None:
        return None
    rest = text[found.end() :].rstrip("/")
    return f"{_ALIASES.get(found[1], found[1])}://{rest}"


def answered(url: str, ask: Callable[[], T]) -> T:
    """Return what a bucket answers; raises `InputError` if it is not there, or says nothing at first for too long.

    Clients look for credentials in several places and try again what cannot be reached, which together takes minutes.
    """
    bucket = "/".join(url.split("/")[:3])
    if bucket in _answered:
        return tried(url, ask)
    since, reason = _silent.get(bucket, (0.0, ""))
    if reason and time.monotonic() - since < _SILENT:
        raise InputError(f"{url}: {reason}")
    left = max(FIRST_ANSWER - _looking.pop(bucket.partition(":")[0], 0.0), FIRST_ANSWER / 3)
    try:
        found = _in_time(url, lambda: tried(url, ask), left)
    except MissingError:
        _answered.add(bucket)
        raise
    except InputError as error:  # of all pictures of a job only the first ones wait for it
        _silent[bucket] = time.monotonic(), str(error).removeprefix(f"{url}: ")
        raise
    _answered.add(bucket)
    return found


def _in_time(url: str, ask: Callable[[], T], seconds: float) -> T:
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(ask())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise InputError(
            f"{url}: no answer within {FIRST_ANSWER:g} s, expected a connection, and credentials: "
            f"{_CREDENTIALS[url.partition(':')[0]]}"
        )
    return found[0]


def tried(url: str, ask: Callable[[], T], missing: bool = False) -> T:
    """Return what a client answers, after asking again for a while where it may help; else raise `InputError`.

    The clients of Google and Amazon do so by themselves for what their services call temporary; this is for the rest,
    such as connections that break. With ``missing``, what is not there raises FileNotFoundError.
    """
    import tenacity

    try:
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(_ATTEMPTS),
            wait=tenacity.wait_exponential(multiplier=0.2, max=8) + tenacity.wait_random(0, 0.2),
            retry=tenacity.retry_if_exception(_may_pass),
            reraise=True,
        )
        return retrying(ask)
    except InputError:
        raise
    except FileExistsError:
        raise
    except FileNotFoundError:
        if missing:
            raise
        raise MissingError(f"{url}: no such bucket, file or folder") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _LOCAL:
            raise
        raise InputError(f"{url}: {_reason(url, error)}") from None


_LOCAL = (errno.ENOSPC, errno.EDQUOT)  # of the disk here
_FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError, InputError)
_TRANSIENT = ("aiohttp", "requests", "httpx", "httpcore", "urllib3", "http")
_BUSY = {408, 425, 429, 500, 502, 503, 504}


def _may_pass(error: BaseException) -> bool:
    """Return whether what failed may work when it is tried again."""
    if isinstance(error, _FINAL) or not isinstance(error, Exception) or _forbidden(error):
        return False
    if isinstance(error, OSError):
        return error.errno not in _LOCAL
    code = getattr(error, "code", None)
    if code is not None:
        return str(code) in map(str, _BUSY)
    if {"HTTPClientError", "ConnectionError"} & {kind.__name__ for kind in type(error).__mro__}:  # botocore's
        return True
    return isinstance(error, TimeoutError) or type(error).__module__.split(".")[0] in _TRANSIENT


def _forbidden(error: BaseException) -> bool:
    code = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, PermissionError) or str(code) in ("401", "403"):
        return True
    text = f"{type(error).__name__} {error}"
    return re.search(r"Forbidden|Unauthorized|Credential|Access ?Denied|GatedRepo|RefreshError", text) is not None


def _reason(url: str, error: Exception) -> str:
    text = in_one_line(str(error)).strip()[:200]
    told = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if _forbidden(error):
        return f"not allowed ({told}), expected credentials for it: {_CREDENTIALS[url.partition(':')[0]]}"
    return f"failed, and {_ATTEMPTS} times over ({told})" if _may_pass(error) else f"failed ({told})"


def options_of(scheme: str) -> dict[str, Any]:
    """Return what a client is told: no memory of listings, and not to wait for minutes for a connection."""
    if scheme == "gs":
        # The client of zonal buckets asks each bucket by gRPC what it is, for up to a minute, emulators too.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        return {"use_listings_cache": False} | ({"token": "anon"} if os.environ.get("STORAGE_EMULATOR_HOST") else {})
    if scheme == "s3":
        retries = {"mode": "standard", "max_attempts": 5}
        return {
            "use_listings_cache": False,
            "config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": retries},
        }
    return {}


def filesystem(url: str) -> Any:
    """Return the client for an address, one for all threads: to make one is to look for credentials."""
    import fsspec

    scheme = url.partition(":")[0]
    with _making:
        if scheme not in _clients:
            try:
                for name in _LOGGERS.get(scheme, ()):  # with tracebacks of what is said in one line here
                    logging.getLogger(name).addHandler(logging.NullHandler())
                began = time.monotonic()
                make = functools.partial(fsspec.filesystem, scheme, **options_of(scheme))
                _clients[scheme] = _in_time(url, make, FIRST_ANSWER)
                _looking[scheme] = time.monotonic() - began
            except ImportError:
                raise InputError(
                    f"{url}: found no client for {scheme}://, expected it: pip install 'jaxmix-diffusion[cloud]'"
                ) from None
        return _clients[scheme]


def client(path: Any) -> tuple[Any, str]:
    """Return the client for a path in a bucket, and what it calls the path."""
    fs = filesystem(str(path))
    return fs, key_of(fs, str(path))


def key_of(fs: Any, url: str) -> str:
    """Return what a client calls an address."""
    return str(fs._strip_protocol(url))
