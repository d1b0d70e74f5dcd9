"""Where copies of files in buckets are kept on this machine, and what they are called in messages."""

from __future__ import annotations

import os
import re
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder that keeps what was fetched: ~/.cache/jaxmix/files, or what JAXMIX_CACHE names."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("JAXMIX_CACHE") or Path(home) / "jaxmix" / "files")


def named(text: object) -> str:
    """Return a message with the addresses of files in buckets in place of those of their copies here."""
    held, root = str(text), str(cache_folder())
    if root not in held:
        return held
    inside = r"/(\w+)/((?:[^/\s:,']+/)*)[0-9a-f]{12}(?=[/\s:,']|$)/?"
    return re.sub(re.escape(root) + inside, lambda m: f"{m[1]}://{m[2]}", held)
