"""A process that has not asked any bucket yet, and servers that a file's tests share."""

import fsspec
import pytest

from jaxmix import clients, paths
from tests.buckets import servers


@pytest.fixture(autouse=True)
def forgotten(tmp_path, monkeypatch):
    """Begin without clients and fetched files, as a process does."""
    monkeypatch.setenv("JAXMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(paths, "_fetched", {})
    for name in ("_answered", "_silent", "_clients", "_looking"):
        monkeypatch.setattr(clients, name, type(getattr(clients, name))())
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["memory", "gs", "s3"], scope="module")
def bucket(request):
    """Yield the address of an empty bucket."""
    with pytest.MonkeyPatch.context() as patch, servers.STARTED[request.param](patch):
        yield f"{request.param}://bucket"
