"""Headless Chromium by the WebDriver protocol, which is JSON over HTTP: no package for it."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
_WAIT = 60.0  # seconds


def missing() -> str:
    """What there is none of, for the reason of a skip; empty if all is there."""
    chromium = any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    absent = [] if chromium else ["chromium"]
    return " and ".join(absent + ([] if shutil.which("chromedriver") else ["chromedriver"]))


class Browser:
    """A session: pages, sizes, scripts."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"
        options = {"args": list(_ARGUMENTS)}
        capabilities = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self._session = f"/session/{self._call('POST', '/session', capabilities)['sessionId']}"

    def open(self, page: Path, *, width: int, theme: str) -> None:
        """Show a page on a screen of a width, in a theme."""
        self._cdp("Emulation.setEmulatedMedia", features=[_feature(theme)])
        self._cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        self._call("POST", f"{self._session}/url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """What a script returns."""
        return self._call("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def close(self) -> None:
        """End the session."""
        self._call("DELETE", self._session)

    def _cdp(self, command: str, **parameters: Any) -> None:
        body = {"cmd": command, "params": parameters}
        self._call("POST", f"{self._session}/goog/cdp/execute", body)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._base}{path}", data=data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=_WAIT) as answer:
            return json.load(answer)["value"]


def _feature(theme: str) -> dict[str, str]:
    return {"name": "prefers-color-scheme", "value": theme}


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser that ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + _WAIT
        while True:
            try:
                session = Browser(port)
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        try:
            yield session
        finally:
            session.close()
    finally:
        driver.terminate()
        driver.wait()
