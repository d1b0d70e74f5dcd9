"""Servers on the loopback address that are what the real clients talk to: Google's storage, Amazon's, and a hub."""

import contextlib
import hashlib
import http.server
import json
import threading
from urllib.parse import unquote, urlsplit


@contextlib.contextmanager
def google(monkeypatch, bucket="bucket"):
    """Serve a bucket to gcsfs."""
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=bucket)
    server.start()
    port = server._api._httpd.server_address[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    try:
        yield "gs"
    finally:
        server.stop()


@contextlib.contextmanager
def amazon(monkeypatch, bucket="bucket"):
    """Serve a bucket to s3fs."""
    import logging

    import boto3
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    given = {"ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any", "DEFAULT_REGION": "us-east-1"}
    for key, value in (given | {"ENDPOINT_URL": f"http://{host}:{port}"}).items():
        monkeypatch.setenv(f"AWS_{key}", value)
    boto3.client("s3").create_bucket(Bucket=bucket)
    try:
        yield "s3"
    finally:
        server.stop()


class Hub(http.server.BaseHTTPRequestHandler):
    """The calls of the hub's API that its file system makes, for one repository; `files` maps names to contents."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    repo = "owner/name"

    def log_message(self, *_):
        """Say nothing."""

    def _entry(self, name):
        content = self.files[name]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "oid": oid, "size": len(content), "path": name}

    def _send(self, status, content, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self):
        code = "EntryNotFound" if f"/{self.repo}/" in self.path else "RepoNotFound"
        self._send(404, {"error": "not found"}, X_Error_Code=code)

    def do_GET(self):
        """Answer about the repository, the tree, or a file."""
        path = unquote(urlsplit(self.path).path)
        api = f"/api/models/{self.repo}"
        if path == api or path.startswith(f"{api}/revision/"):
            names = [{"rfilename": name} for name in self.files]
            self._send(200, {"id": self.repo, "sha": "0" * 40, "private": False, "tags": [], "siblings": names})
        elif path.startswith(f"{api}/tree/"):
            inside = path.removeprefix(f"{api}/tree/").partition("/")[2]
            found = [self._entry(name) for name in self.files if not inside or name.startswith(f"{inside}/")]
            deep = "recursive=true" in self.path.lower()
            if not deep:
                level = inside.count("/") + 1 if inside else 0
                folders = {"/".join(e["path"].split("/")[: level + 1]) for e in found if e["path"].count("/") > level}
                found = [e for e in found if e["path"].count("/") == level]
                found += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in sorted(folders)]
            self._send(200, found) if found else self._missing()
        elif path.startswith(f"/{self.repo}/resolve/"):
            name = path.split("/", 5)[-1]
            if name not in self.files:
                return self._missing()
            content = self.files[name]
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": "0" * 40}
            status = 200
            if asked := self.headers.get("Range"):
                first, last = asked.removeprefix("bytes=").split("-")
                whole = len(content)
                content = content[int(first) : int(last or whole) + 1]
                headers["Content_Range"] = f"bytes {first}-{int(first) + len(content) - 1}/{whole}"
                status = 206
            self._send(status, content, **headers)
        else:
            self._missing()

    do_HEAD = do_GET

    def do_POST(self):
        """Answer about the paths that are asked for."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.path.startswith(f"/api/models/{self.repo}/paths-info/"):
            return self._missing()
        text = body.decode()
        if self.headers.get("Content-Type", "").startswith("application/json"):
            asked = json.loads(text)["paths"]
        else:
            asked = [unquote(part.partition("=")[2]) for part in text.split("&") if part.startswith("paths=")]
        found = [self._entry(name) for name in asked if name in self.files]
        folders = [name for name in asked if any(other.startswith(f"{name}/") for other in self.files)]
        self._send(200, found + [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in folders])


@contextlib.contextmanager
def hub(files):
    """Serve one repository, and yield its address."""
    handler = type("OneRepository", (Hub,), {"files": files})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


STARTED = {"memory": lambda patch: contextlib.nullcontext(), "gs": google, "s3": amazon}
"""What starts the server behind addresses of each kind, given what sets the variables that a client looks at."""
