"""Headless Chromium through the DevTools protocol: open pages, use them as a person would, see what they ask for.

with Browser() as browser, browser.open(url, width=400) as tab:
    tab.type("#question", "Is it a scan?")
    tab.click("#ask")
    tab.wait("document.querySelector('#answer').textContent")
    assert not tab.errors
"""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import axe_core_python
from websockets.sync.client import connect

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--hide-scrollbars", "--no-first-run", "--mute-audio", "--disable-extensions"),
    *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),  # WebGL without a graphics card
    # which would compile each of NiiVue's 48 programs twice: when it is linked, and when it first draws
    "--disable-angle-features=warmUpPipelineCacheAtLink",
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    "--remote-debugging-port=0",
)
_AXE = Path(axe_core_python.__file__).with_name("axe.min.js")
DISPLAY_RULES = ("color-contrast", "link-in-text-block", "scrollable-region-focusable")
"""axe-core's rules whose result changes with the width of the window and with the colour scheme."""
_NO_WEBGL = "HTMLCanvasElement.prototype.getContext = () => null"
# What sticks out at the right, except what scrolls within its own box; the boxes that scroll, and those that cannot.
_MEASURE = """(() => {
  const out = [...document.querySelectorAll("body *")].filter(e =>
    e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, pre, nav"));
  const boxes = [...document.querySelectorAll(".scroll, pre")];
  return {
    whole: document.documentElement.scrollWidth,
    out: out.map(e => e.outerHTML.slice(0, 90)),
    cut: boxes.filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX == "visible").length,
    pictures: [...document.images].map(e => [e.naturalWidth, e.clientWidth]),
    tallest: Math.max(0, ...[...document.querySelectorAll("tr")].map(e => e.clientHeight)),
    smallest: Math.min(...[...document.querySelectorAll("p, td, th, dd, figcaption")].map(e =>
      parseFloat(getComputedStyle(e).fontSize))),
  };
})()"""
_KEYS = {
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    " ": (32, " "),
    "PageUp": (33, ""),
    "PageDown": (34, ""),
    "End": (35, ""),
    "Home": (36, ""),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
}
"""Code and text of keys that are no letters."""
Reply = dict[str, Any]


_LEFT = (
    "Inspected target navigated or closed",
    "Cannot find default execution context",
    "Execution context was destroyed.",
)
"""Errors of a script whose page was left for the next one."""


class PageLeftError(AssertionError):
    """The page was left while a script ran in it."""


class Browser:
    """A Chromium process with a profile of its own, ended and removed by `close` or at the end of `with`."""

    def __init__(self, *flags: str, timeout: float = 120) -> None:
        """Start it.

        Args:
            flags: more command-line flags.
            timeout: seconds after which any wait fails, unless it names its own.
        """
        program = next(filter(None, map(shutil.which, _NAMES)), None)
        assert program, "no Chromium to look at the page with; apt-get install chromium-headless-shell"
        self.timeout = timeout
        self._tabs: dict[str, Tab] = {}
        self._last_id = 0
        self._replies: dict[int, Reply] = {}
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True))
            self._log = Path(folder) / "stderr"
            words = [program, *_FLAGS, f"--user-data-dir={folder}/profile", *flags, "about:blank"]
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True)
            stack.callback(self._end)
            address = re.search(r"DevTools listening on (ws://\S+)", self._read_log())
            options: dict[str, Any] = {"max_size": None, "ping_interval": None, "proxy": None, "open_timeout": timeout}
            self._socket = stack.enter_context(connect(address[1] if address else "", **options))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False, webgl: bool = True) -> "Tab":
        """Open a page in a tab of this size (pixels), wait until it is loaded, and return the tab.

        A tab without WebGL shows pictures instead of scans. Drawing scans is slow without a graphics card, so tests
        that need none use it.
        """
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            tab.call(f"{domain}.enable")
        tab.resize(width, height)
        tab.prefer("dark" if dark else "light")
        if not webgl:
            tab.call("Page.addScriptToEvaluateOnNewDocument", source=_NO_WEBGL)
        tab.go(url)
        return tab

    def close(self) -> None:
        """End the process and remove its profile."""
        self._stack.close()

    def call(self, method: str, session: str | None = None, **params: Any) -> Reply:
        """Call a method of the protocol, and return its result."""
        self._last_id += 1
        message: Reply = {"id": self._last_id, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        self._socket.send(json.dumps(message))
        end = time.monotonic() + self.timeout
        while self._last_id not in self._replies:
            self.receive(end - time.monotonic())
        reply = self._replies.pop(self._last_id)
        if reply.get("error", {}).get("message") in _LEFT:
            raise PageLeftError(method)
        assert "error" not in reply, f"{method}: {reply['error']}"
        result: Reply = reply["result"]
        return result

    def receive(self, timeout: float) -> None:
        """Wait at most so many seconds for a message of the browser, and keep what it reports."""
        assert timeout > 0, "the browser did not answer in time"
        try:
            message = json.loads(self._socket.recv(timeout=timeout))
        except TimeoutError:
            return
        if "id" in message:
            self._replies[message["id"]] = message
        elif tab := self._tabs.get(message.get("sessionId", "")):
            tab.note(message["method"], message["params"])

    def _read_log(self) -> str:
        end = time.monotonic() + self.timeout
        while "DevTools listening on" not in (text := self._log.read_text(errors="replace")):
            assert self._process.poll() is None, text
            assert time.monotonic() < end, f"Chromium did not start in {self.timeout} s: {text}"
            time.sleep(0.05)
        return text

    def _end(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # its children too
        self._process.wait()


class Tab:
    """A page in a browser."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target
        self._loaded = False
        self.errors: list[str] = []
        """Errors and warnings of the console, uncaught exceptions, and violations of the page's policy."""
        self.requests: list[str] = []
        """Addresses that the page asked for, in their order."""
        self.refused: list[tuple[str, int]] = []
        """Addresses answered with an HTTP status of 400 or more, with that status."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the tab."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def call(self, method: str, **params: Any) -> Reply:
        """Call a method of the protocol for this tab, and return its result."""
        return self._browser.call(method, self._session, **params)

    def note(self, event: str, params: Reply) -> None:
        """Keep what an event of the protocol reports about this tab."""
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Network.responseReceived" and params["response"]["status"] >= 400:
            self.refused.append((params["response"]["url"], params["response"]["status"]))
        elif event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(arg.get("value", arg.get("description"))) for arg in params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            entry = params["entry"]
            self.errors.append(f"{entry['text']} ({entry.get('url', '')})")

    @property
    def outside(self) -> list[str]:
        """Requested addresses that are not on this machine."""
        inside = ("data", "blob", "file", "about")
        parts = [(url, urlsplit(url)) for url in self.requests]
        return [
            url for url, part in parts if part.scheme not in inside and part.hostname not in ("127.0.0.1", "localhost")
        ]

    def go(self, url: str) -> None:
        """Load an address, and wait until it and its scripts are loaded."""
        self._loaded = False
        result = self.call("Page.navigate", url=url)
        assert "errorText" not in result, f"{url}: {result['errorText']}"
        self._wait(lambda: self._loaded, f"{url} to load")

    def resize(self, width: int, height: int) -> None:
        """Give the window this many pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str, media: str = "screen") -> None:
        """Prefer `light` or `dark` pages, and show them as on a `screen` or as in `print`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def measure(self, width: int, *, dark: bool = False, paper: bool = False) -> dict[str, Any]:
        """Show the page in this width (pixels), on a screen or as on paper, and return its layout there.

        `whole` is the width of the page with all that sticks `out`, the elements of which are listed; `cut` the number
        of boxes that should scroll and cannot; `pictures` have their own and their shown width; `tallest` is the height
        of the tallest row of a table, and `smallest` the size of the smallest text. Sizes are in pixels.
        """
        self.resize(width, self.evaluate("innerHeight"))
        self.prefer("dark" if dark else "light", "print" if paper else "screen")
        self.wait(f"innerWidth === {width}")
        layout: dict[str, Any] = self.evaluate(_MEASURE)
        return layout

    def evaluate(self, expression: str) -> Any:
        """Return the JSON value of a JavaScript expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        error = result.get("exceptionDetails")
        assert error is None, f"{expression}: {error.get('exception', {}).get('description', error['text'])}"
        return result["result"].get("value")

    def run(self, body: str) -> Any:
        """Return the JSON value that the body of an async JavaScript function returns."""
        return self.evaluate(f"(async () => {{ {body} }})()")

    def text(self, selector: str) -> str:
        """Return the text of the first element that matches a selector."""
        text: str = self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")
        return text

    def wait(self, expression: str, timeout: float | None = None) -> Any:
        """Evaluate an expression until it is true, also in a page that follows; return its value, true for an element.

        Fail after `timeout` s.
        """
        script = f"Promise.resolve({expression}).then((value) => value instanceof Node || value)"

        def value() -> Any:
            try:
                return self.evaluate(script)
            except PageLeftError:
                return None

        return self._wait(value, expression, timeout)

    def click(self, selector: str) -> None:
        """Click on the middle of the first element that matches; fails if another element covers it."""
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Focus an element, and write a text over what it contains."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{found}.focus(), {found}.select?.()")
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key, such as `Tab`, `Enter`, `ArrowRight` or a letter, on what has the focus."""
        code, text = _KEYS.get(key, (ord(key[0].upper()), key))
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def choose(self, selector: str, value: str) -> None:
        """Give a `select` or `input` a value as a person would: its events are sent."""
        found = f"document.querySelector({json.dumps(selector)})"
        events = "['input', 'change'].forEach((name) => e.dispatchEvent(new Event(name, {bubbles: true})))"
        set_value = f"((e) => {{ e.value = {json.dumps(value)}; {events}; return e.value; }})({found})"
        assert self.evaluate(set_value) == value, f"{selector} has no value {value!r}"

    def set_files(self, selector: str, *files: Path) -> None:
        """Choose files in an `input` of type file."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        paths = [str(file.resolve()) for file in files]
        self.call("DOM.setFileInputFiles", files=paths, objectId=found["result"]["objectId"])

    def drop_files(self, selector: str, *files: Path) -> None:
        """Drag files from outside the browser and drop them on an element."""
        x, y = self._middle(selector)
        data = {"items": [], "files": [str(file.resolve()) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def screenshot(self, out: Path, *, selector: str = "") -> Path:
        """Write the window, or the whole of the first element that matches a selector, as PNG."""
        params: Reply = {}
        if selector:
            clip = self.evaluate(
                f"""((e) => {{ const {{x, y, width, height}} = e.getBoundingClientRect();
                  return {{x: x + scrollX, y: y + scrollY, width, height, scale: 1}}; }})
                (document.querySelector({json.dumps(selector)}))"""
            )
            params = {"captureBeyondViewport": True, "clip": clip}
        picture = self.call("Page.captureScreenshot", format="png", optimizeForSpeed=True, **params)
        out.write_bytes(base64.b64decode(picture["data"]))
        return out

    def print_pdf(self) -> bytes:
        """Print the page on A4, and return the PDF."""
        pdf = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)
        return base64.b64decode(pdf["data"])

    def accessibility(self, rules: Sequence[str] = ()) -> list[str]:
        """Return the violations of all of axe-core's usual rules, or of these: rule, help, and the elements."""
        if not self.evaluate("typeof axe === 'object'"):
            self.evaluate(f"{_AXE.read_text(encoding='utf-8')};0")
        options: dict[str, Any] = {"resultTypes": ["violations"]}
        if rules:
            options["runOnly"] = list(rules)
        result = self.evaluate(f"axe.run(document, {json.dumps(options)})")
        return [
            f"{found['id']}: {found['help']}: " + " ".join(node["html"][:120] for node in found["nodes"])
            for found in result["violations"]
        ]

    def _middle(self, selector: str) -> tuple[float, float]:
        """Scroll the first element that matches into view, and return its middle in pixels of the window."""
        script = f"""((e) => {{
          if (!e) return "missing";
          e.scrollIntoView({{block: "center", inline: "center", behavior: "instant"}});
          const box = e.getBoundingClientRect();
          const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
          const top = document.elementFromPoint(x, y);
          const same = top && (e.contains(top) || top.contains(e) && top.tagName === "LABEL");
          return same ? [x, y] : "hidden or covered by " + top?.outerHTML.slice(0, 200);
        }})(document.querySelector({json.dumps(selector)}))"""
        place = self.evaluate(script)
        assert isinstance(place, list), f"{selector}: {place}"
        return place[0], place[1]

    def _wait(self, condition: Callable[[], Any], name: str, timeout: float | None = None) -> Any:
        end = time.monotonic() + (timeout or self._browser.timeout)
        while not (value := condition()):
            assert time.monotonic() < end, f"waited in vain for {name}; errors: {self.errors}"
            self._browser.receive(0.05)
        return value


def check_page(browser: Browser, page: Path) -> None:
    """Open a page of a command, and its first scan if it has one. Assert that the page is legible on a wide screen by
    day, on a narrow one by night and on A4, that it is accessible, logs no error and asks for nothing from elsewhere.
    """
    with browser.open(page.as_uri(), height=300) as tab:  # a low window, which opens few of the scans
        first = "document.querySelector('.scan[data-volume]')"
        if tab.evaluate(f"{first} !== null"):
            tab.evaluate(f"{first}.scrollIntoView({{behavior: 'instant'}})")
            tab.wait(f"{first}.classList.contains('is-open')")
        for width, dark, paper in (
            (1280, False, False),
            (400, True, False),
            (718, False, True),
        ):  # A4 within its margins
            layout = tab.measure(width, dark=dark, paper=paper)
            assert (layout["whole"], layout["out"], layout["cut"]) == (width, [], 0)
            assert layout["smallest"] >= 12
            if not paper:
                assert not (violations := tab.accessibility(DISPLAY_RULES if dark else ())), "\n".join(violations)
        assert (tab.errors, tab.outside) == ([], [])
