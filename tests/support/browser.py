"""A page in a real browser, driven over the DevTools protocol. It notes every request and every complaint."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.support.chromium import Chromium
from tests.support.cluster import wait_until

KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, " ": 32}
SHIFT = 8


class ScriptFailed(AssertionError):
    """A script in the page threw."""


class Page:
    """One tab. Events are taken in whenever an answer is waited for."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0
        self._session: str | None = None
        self._num_loads = 0
        self.requests: list[str] = []
        """The URL of everything that was asked for."""
        self.complaints: list[str] = []
        """Errors and warnings of the console, exceptions, and what the browser refused to load."""

    def open(self) -> None:
        """Makes the tab."""
        context = self._call("Target.createBrowserContext")["browserContextId"]
        target = self._call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def goto(self, url: str) -> None:
        """Loads an address; returns when its scripts have run."""
        loads = self._num_loads
        self._call("Page.navigate", url=url)
        wait_until(lambda: bool(self.evaluate("true")) and self._num_loads > loads, 30, f"{url} is loaded")

    def evaluate(self, expression: str) -> Any:
        """What a JavaScript expression, or its promise, comes to.

        Raises:
            ScriptFailed: it threw.
        """
        answer = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise ScriptFailed(f"{expression}: {details.get('exception', {}).get('description', details['text'])}")
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 40) -> None:
        """Waits until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                shown = self.evaluate("document.body.innerText")
                raise AssertionError(f"{condition}: not within {seconds} s; {self.complaints}; {shown}")
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """The visible text of the first element that matches."""
        shown: str = self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")
        return shown

    def press(self, key: str, *, shift: bool = False) -> None:
        """Presses and releases a key where the focus is."""
        code: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        code["modifiers"] = SHIFT if shift else 0
        text = {"Enter": "\r", " ": " "}.get(key)
        self._call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text or "", **code)
        self._call("Input.dispatchKeyEvent", type="keyUp", **code)

    def type(self, text: str) -> None:
        """Types where the focus is."""
        self._call("Input.insertText", text=text)

    def size(self, width: int, height: int) -> None:
        """The window's size in CSS pixels."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def prefers(self, **features: str) -> None:
        """Sets media features, `color_scheme` or `reduced_motion`, as the system would."""
        named = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self._call("Emulation.setEmulatedMedia", features=named)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Writes a PNG of the window, or of the whole page."""
        shot = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, optimizeForSpeed=False)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._num_loads += 1
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(each.get("value", each)) for each in params["args"]))
        elif event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")


@contextmanager
def open_page(devtools_url: str) -> Iterator[Page]:
    """A tab of a running browser, with storage of its own."""
    # Nobody reads while a test looks elsewhere: no limit on what waits, and no pings that would go unanswered.
    with connect(devtools_url, max_size=None, max_queue=None, ping_interval=None, proxy=None) as socket:
        page = Page(socket)
        page.open()
        yield page


@contextmanager
def browsing(chromium: Chromium) -> Iterator[Page]:
    """A browser with one tab."""
    with chromium.running() as url, open_page(url) as page:
        yield page
