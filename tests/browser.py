"""A headless Chromium driven over its DevTools pipe: no driver program and no package is needed beside the browser."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Backspace": 8, "Enter": 13, "Tab": 9, " ": 32}


class Browser:
    """One tab. Commands wait for their answer; events are looked through by `wait_for`."""

    def __init__(self, program: str, profile: Path) -> None:
        to_read, to_browser = os.pipe()
        from_browser, to_write = os.pipe()
        options = (
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--disable-extensions", "--hide-scrollbars", "--no-proxy-server"),
            *(f"--user-data-dir={profile}", "--remote-debugging-pipe"),
        )
        # The pipe's ends must be descriptors 3 and 4 of the browser.
        shell = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, program, *options], pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._out = os.fdopen(to_browser, "wb")
        self._in = os.fdopen(from_browser, "rb")
        self._numbers = itertools.count(1)
        self._events: list[dict[str, Any]] = []
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Runtime.enable")

    def close(self) -> None:
        """End the browser; what it still writes is thrown away."""
        self._session = ""
        self._send("Browser.close")
        self.process.wait(timeout=20)
        self._out.close()
        self._in.close()

    def open(self, page: Path | str, anchor: str = "", width: int = 1280, height: int = 900) -> None:
        """Load a file, or an address, at a window size, and wait for its end."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url="about:blank")
        self.wait_for("Page.loadEventFired")
        self.call("Page.navigate", url=(page.as_uri() if isinstance(page, Path) else page) + anchor)
        self.wait_for("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys one after the other, as a person would."""
        for key in keys:
            code = KEYS.get(key) or ord(key.upper())
            text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def click(self, selector: str) -> None:
        """Click with the mouse in the middle of an element."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center'}})")
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose(self, selector: str, files: Sequence[Path]) -> None:
        """Give these files to an input, as a person would who chooses them."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=list(map(str, files)))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One DevTools command; its result."""
        number = self._send(method, **params)
        while (message := self._receive()).get("id") != number:
            self._events.append(message)
        assert "error" not in message, (method, message)
        return dict(message["result"])

    def wait_for(self, event: str, **expected: Any) -> dict[str, Any]:
        """Parameters of the next event of that name with these values; earlier ones are forgotten."""
        while True:
            message = self._events.pop(0) if self._events else self._receive()
            params = dict(message.get("params", {}))
            if message.get("method") == event and expected.items() <= params.items():
                return params

    def _send(self, method: str, **params: Any) -> int:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session and not method.startswith("Browser."):
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        return number

    def _receive(self) -> dict[str, Any]:
        parts = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            assert byte, "the browser ended"
            parts += byte
        return dict(json.loads(parts))


def start_browser(profile: Path) -> Browser:
    """A browser, or a skipped test where there is none."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None or shutil.which("bash") is None:
        pytest.skip(f"no headless browser: none of {', '.join(NAMES)} is on the PATH")
    return Browser(program, profile)
