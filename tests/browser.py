"""A page in Debian's or anyone's headless Chromium, driven over the pipe of its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One page. `asked` lists the addresses that it has requested, `said` its errors."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._buffer, self._count, self._session = to, back, b"", 0, ""
        self.asked: list[str] = []
        self.said: list[str] = []
        self._events: list[str] = []
        found = self.call("Target.createTarget", url="about:blank")
        attached = self.call("Target.attachToTarget", targetId=found["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Call a method of the protocol and return its result."""
        self._count += 1
        told = {"id": self._count, "method": method, "params": params}
        told |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(told).encode() + b"\0")
        while True:
            held = self._next(60)
            if held.get("id") == self._count:
                assert "error" not in held, f"{method}: {held['error']}"
                return held["result"]

    def _next(self, timeout: float) -> Any:
        """Return the next message, an event or an answer."""
        end = time.monotonic() + timeout
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._back], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser says nothing"
            self._buffer += os.read(self._back, 1 << 20)
        line, _, self._buffer = self._buffer.partition(b"\0")
        held = json.loads(line)
        if "method" in held:
            params = held["params"]
            self._events.append(held["method"])
            if held["method"] == "Network.requestWillBeSent":
                self.asked.append(params["request"]["url"])
            if held["method"] == "Runtime.exceptionThrown":
                self.said.append(params["exceptionDetails"]["exception"].get("description", "an exception"))
        return held

    def open(self, url: str, width: int = 1280, height: int = 800, mobile: bool = False) -> float:
        """Open an address in a window of some size; return the seconds until all that it shows is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if mobile else 1, mobile=mobile,
        )  # fmt: skip
        self.asked.clear()
        self._events.clear()
        began = time.monotonic()
        self.call("Page.navigate", url=url)
        while "Page.loadEventFired" not in self._events:
            self._next(60)
        return time.monotonic() - began

    def run(self, script: str) -> Any:
        """Return the value of an expression; a promise is waited for."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, file: Path, full: bool = False) -> None:
        """Write a PNG of what is seen."""
        done = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        file.write_bytes(base64.b64decode(done["data"]))


@contextlib.contextmanager
def opened() -> Iterator[Page]:
    """Run a browser, and end it."""
    assert CHROMIUM is not None
    theirs_in, to = os.pipe()
    back, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory() as home:
        # The protocol's pipe is descriptors 3 and 4, whatever is open there in this process.
        program = f'exec {CHROMIUM} "$@" 3<&{theirs_in} 4>&{theirs_out}'
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        flags += ["--disable-dev-shm-usage", "--disable-background-networking", f"--user-data-dir={home}"]
        process = subprocess.Popen(
            ["bash", "-c", program, "bash", *flags],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Page(to, back)
        finally:
            os.close(to)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(back)
