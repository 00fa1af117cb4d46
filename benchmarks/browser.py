"""A headless Chromium, driven through the pipe of its DevTools protocol; needs no other package."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A page in a browser, what it requested and what it reported.

    Args:
        to_browser: the end of the pipe for commands.
        from_browser: the end of the pipe for answers.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser = to_browser, from_browser
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.target = ""
        self.session: dict[str, str] = {}
        self._number, self._rest = 0, b""

    def open(self, page: Path, width: int = 1200, height: int = 1000) -> None:
        """Load a page from disk in place of the one before, and wait until it is ready, or says that it failed.

        Args:
            page: the file.
            width: of the window in pixels.
            height: of the window in pixels.
        """
        before, self.session = self.target, {}
        self.target = self.command("Target.createTarget", url="about:blank")["targetId"]
        if before:
            self.command("Target.closeTarget", targetId=before)
        session = self.command("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.command(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        self.command("Page.navigate", url=page.resolve().as_uri())
        self.wait_for("document.body?.dataset.state && document.body.dataset.state !== 'loading'")

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self.from_browser, 1 << 20)
            assert chunk, "the browser has ended"
            self._rest += chunk
        answer, _, self._rest = self._rest.partition(b"\0")
        return json.loads(answer)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event["method"] == "Runtime.exceptionThrown":
            self.messages.append(str(params["exceptionDetails"]))
        elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.messages.append(str(params["args"]))
        elif event["method"] == "Log.entryAdded" and params["entry"]["source"] != "rendering":
            self.messages.append(params["entry"]["text"])

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, which may be a promise."""
        options = {"returnByValue": True, "awaitPromise": True}
        return self.command("Runtime.evaluate", expression=expression, **options)["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + 60
        while not self.value(expression):
            assert time.monotonic() < end, f"{expression}: {self.messages}"
            time.sleep(0.1)

    def press(self, key: str, text: str = "") -> None:
        """Press and release a key that types a text."""
        for kind in ("keyDown", "keyUp"):
            self.command("Input.dispatchKeyEvent", type=kind, key=key, text=text)

    def picture(self) -> np.ndarray:
        """Return the pixels of the canvas on the screen, (rows, columns, 3)."""
        place = self.value("(({x, y, width, height}) => ({x, y, width, height}))(canvas.getBoundingClientRect())")
        image = Image.open(io.BytesIO(self._captured(place))).convert("RGB")
        return np.asarray(image, dtype=np.float32)

    def whole_page(self) -> bytes:
        """Return a PNG of the whole page, also of what is below the screen."""
        return self._captured(self.command("Page.getLayoutMetrics")["cssContentSize"])

    def _captured(self, place: dict[str, float]) -> bytes:
        """Return a PNG of a rectangle of the page, once what was asked for is drawn."""
        self.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        clip = place | {"scale": 1}
        shot = self.command("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start a browser without a network and yield it; it ends with the block.

    Args:
        profile: folder of its files.
    """
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    options = [
        "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run",
        "--hide-scrollbars", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-dev-shm-usage",
        "--disable-background-networking", "--proxy-server=127.0.0.1:9", "--force-color-profile=srgb",
    ]  # fmt: skip
    options += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
    redirect = f'exec "$@" 3<&{commands} 4>&{answers}'  # the protocol takes the file descriptors 3 and 4
    process = subprocess.Popen(
        ["bash", "-c", redirect, "browser", str(CHROMIUM), *options],
        pass_fds=(commands, answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(commands)
    os.close(answers)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        process.terminate()
        process.wait(timeout=30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the rest of its processes, which write into the profile
        os.close(to_browser)
        os.close(from_browser)
