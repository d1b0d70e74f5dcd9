"""Temporary files in a folder of results: whose they are, and the end of those whose process has ended."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import time
from pathlib import Path

from jaxmix import paths

_OURS = re.compile(r"\..+\.(?P<host>[A-Za-z0-9]+)-(?P<pid>\d+)-[0-9a-f]{6}\.tmp")
_OLD = 3600.0
"""Seconds after which a temporary file of a process elsewhere is left over: writing one takes seconds."""


def host_name() -> str:
    """Return the name of this machine in letters and digits."""
    return re.sub(r"[^A-Za-z0-9]", "", socket.gethostname()) or "host"


def temporary_name(name: str) -> str:
    """Return a name for a temporary file beside the file `name`, which says to which process it belongs."""
    return f".{name}.{host_name()}-{os.getpid()}-{secrets.token_hex(3)}.tmp"


def sweep(folder: Path, own: bool = False) -> None:
    """Remove the temporary files of processes that were killed, and with `own` those of this process, too.

    Of a process on another machine only those are removed that nobody has touched for an hour. In a bucket, where
    objects appear whole, such names are signs of life (`infer.hosts`) of earlier runs.
    """
    if paths.remote(folder):
        if not own:  # at the end of a process others may be alive
            names = [name for name in paths.names(folder) if (found := _OURS.fullmatch(name)) and not _is_own(found)]
            paths.remove_all([folder / name for name in names])
        return
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            found = _OURS.fullmatch(path.name)
            if found and (_left_over(path, found["host"], int(found["pid"])) or (own and _is_own(found))):
                with contextlib.suppress(OSError):
                    path.unlink()


def _is_own(found: re.Match[str]) -> bool:
    return found["host"] == host_name() and int(found["pid"]) == os.getpid()


def _left_over(path: Path, host: str, pid: int) -> bool:
    if host == host_name():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # there, and somebody else's
            pass
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > _OLD
    return False
