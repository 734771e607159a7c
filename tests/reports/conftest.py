"""A headless Chromium that tests click and type in, over its debugging pipe."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
PATIENCE = 60.0  # seconds for one answer
KEYS = {"Enter": ("\r", 13), "Space": (" ", 32)}


class Browser:
    """One tab. Input goes through the browser's own event handling, as from a mouse and a keyboard.

    Args:
        profile: A folder for the browser alone.
    """

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        theirs, ours = os.pipe(), os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4: ours must not be those already.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs[0], ours[1])]

        def connect() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        command += ["--disable-dev-shm-usage", "--window-size=1200,900", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=connect,  # noqa: PLW1509 - tests start no threads that could hold a lock here
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (*high, theirs[0], ours[1]):
            os.close(end)
        self._commands, self._answers, self._buffer = theirs[1], ours[0], b""
        self._number, self.events, self._session = 0, list[dict[str, Any]](), ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        self.call("Page.close")
        self._process.terminate()
        self._process.wait(30)
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            assert select.select([self._answers], [], [], max(end - time.monotonic(), 0))[0], "no answer from chromium"
            part = os.read(self._answers, 1 << 20)
            assert part, "chromium has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a page and wait for it."""
        self.call("Page.navigate", url="about:blank")  # a new fragment alone would not load the page anew
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri() + fragment)
        while self.value("document.readyState") != "complete" or self.value("location.protocol") != "file:":
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse."""
        box = f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
        box += "e.scrollIntoView({block: 'center'});"
        x, y = self.value(
            box + "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, selector: str, key: str) -> None:
        """Bring an element into focus and press a key."""
        self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        text, code = KEYS[key]
        names = {"key": text if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **names)
        self.call("Input.dispatchKeyEvent", type="keyUp", **names)

    @property
    def complaints(self) -> list[str]:
        """Errors, warnings and everything else that the page wrote to the console or broke."""
        self.value("1")  # whatever was on its way is here now
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in kinds]


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Browser]]:
    """``browser()`` starts one."""
    if CHROMIUM is None:
        pytest.skip("chromium is not on PATH")
    started: list[Browser] = []

    def start() -> Browser:
        started.append(Browser(tmp_path_factory.mktemp("profile")))
        return started[-1]

    yield start
    for one in started:
        one.close()
