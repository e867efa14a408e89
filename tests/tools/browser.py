"""A real browser without a window for the tests: Chromium, driven over its DevTools protocol.

    with Browser() as browser, browser.page() as page:
        page.open(service.url + "/docs")
        page.get("button", "Authorize").click()
        page.get("textbox", "username:").fill("alice")
        page.wait_for_text("hello world")
        assert page.errors() == []

Elements are found by their role and accessible name, as with a screen reader. Every action on an
element is repeated until it works or `DEADLINE` has passed, because pages build their elements
while they run. Needs `websockets`.
"""

import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
import urllib.parse
from contextlib import ExitStack, contextmanager
from pathlib import Path

import debian_tools
from running_service import wait_until
from started import Started
from websockets.sync.client import connect

# Names of an installed Chromium. The first one that exists is used; otherwise Debian's is fetched.
INSTALLED = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
FETCHED = "chromium-headless-shell"

# Root needs --no-sandbox. The other options keep the browser from making requests by itself.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run", "--no-default-browser-check",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions", "--mute-audio",
    "--hide-scrollbars", "--remote-debugging-port=0",
    # No name is resolved. A request of a page to another host fails, and the test sees it.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)

# Seconds. A page takes one or two; the rest is for a busy machine.
DEADLINE = 60

# Fonts that were fetched with the browser, if the system has no font configuration.
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">
<fontconfig><dir>/usr/share/fonts</dir><dir>{fonts}</dir><cachedir>{cache}</cachedir></fontconfig>
"""


def executable():
    """The path of a Chromium. Raises debian_tools.Unavailable where there is none and none can
    be fetched."""
    found = next((path for name in INSTALLED if (path := shutil.which(name))), None)
    try:
        return found or debian_tools.path(FETCHED)
    except RuntimeError as error:
        # Ubuntu, for example, has no such package.
        raise debian_tools.Unavailable(error) from None


def plain(name):
    """A name without characters that only affect line breaks: zero-width spaces, and repeated
    blanks."""
    return " ".join(name.replace("\u200b", "").split())


class DevToolsError(Exception):
    """The browser refused a command: the element is gone, or not visible, for example."""


class Browser(Started):
    """One browser process. Each page has a new profile, like that of a new user."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="prompt-service-browser-"))
        self.process = None
        self.connection = None
        self.opened = ExitStack()
        self.numbers = itertools.count(1)
        self.pages = {}

    def start(self):
        log = self.folder / "log"
        environment = dict(os.environ)
        if not Path("/etc/fonts/fonts.conf").is_file():
            fonts = self.folder / "fonts.conf"
            fonts.write_text(FONTS.format(fonts=debian_tools.UNPACKED / "usr/share/fonts", cache=self.folder / "fonts"))
            environment["FONTCONFIG_FILE"] = str(fonts)
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [executable(), *FLAGS, f"--user-data-dir={self.folder / 'profile'}", "about:blank"],
                env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )

        def address():
            assert self.process.poll() is None, log.read_text(errors="replace")
            return re.search(r"DevTools listening on (ws://\S+)", log.read_text(errors="replace"))

        found = wait_until(address, DEADLINE, lambda: f"the browser says its address: {log.read_text(errors='replace')}")
        # Pictures of pages are large messages, and events may pile up while nobody reads.
        self.connection = self.opened.enter_context(connect(found[1], max_size=None, max_queue=None, proxy=None))
        return self

    def close(self):
        self.opened.close()
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def send(self, method, session=None, **parameters):
        """Sends a command and returns its number."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        self.connection.send(json.dumps(message))
        return number

    def call(self, method, session=None, **parameters):
        """Sends a command and returns its result. Events that come before the result go to their
        pages."""
        number = self.send(method, session, **parameters)
        while True:
            message = json.loads(self.connection.recv(timeout=DEADLINE))
            if message.get("id") == number:
                if "error" in message:
                    raise DevToolsError(f"{method}: {message['error']['message']}")
                return message["result"]
            page = self.pages.get(message.get("sessionId"))
            if page and "method" in message:
                page.note(message["method"], message["params"])

    @contextmanager
    def page(self, width=1280, height=1400):
        """A new page with a new profile, for `with`; closed at the end."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "DOM", "Accessibility"):
            page.call(f"{domain}.enable")
        page.watch(session)
        page.resize(width, height)
        yield page
        self.call("Target.disposeBrowserContext", browserContextId=context)


class Page:
    """A page, with all its log entries and requests since it was opened."""

    def __init__(self, browser, session):
        self.browser = browser
        self.session = session
        self.events = []

    def call(self, method, **parameters):
        return self.browser.call(method, self.session, **parameters)

    def watch(self, session):
        """Makes the browser report the log entries and requests of the page, or of one of its
        workers. A worker waits until this is active."""
        for domain in ("Runtime", "Log", "Network"):
            self.browser.send(f"{domain}.enable", session)
        self.browser.send("Target.setAutoAttach", session, autoAttach=True, waitForDebuggerOnStart=True, flatten=True)
        self.browser.send("Runtime.runIfWaitingForDebugger", session)

    def note(self, method, parameters):
        self.events.append((method, parameters))
        if method == "Target.attachedToTarget":
            self.browser.pages[parameters["sessionId"]] = self
            self.watch(parameters["sessionId"])

    def resize(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, url):
        """Opens an address and returns once the page and what it names are loaded."""
        loaded = sum(method == "Page.loadEventFired" for method, _ in self.events)
        answer = self.call("Page.navigate", url=url)
        assert "errorText" not in answer, f"{url}: {answer['errorText']}"

        def is_loaded():
            # A command that does nothing, so that events come in.
            self.evaluate("0")
            return sum(method == "Page.loadEventFired" for method, _ in self.events) > loaded

        wait_until(is_loaded, DEADLINE, f"{url} is loaded")
        return self

    def evaluate(self, script):
        """The value of a JavaScript expression in the page, or of its promise."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise DevToolsError(result["exceptionDetails"].get("exception", {}).get("description", str(result)))
        return result["result"].get("value")

    def text(self):
        """The visible text of the page."""
        return self.evaluate("document.body.innerText")

    def wait_for_text(self, text):
        wait_until(lambda: text in self.text(), DEADLINE, lambda: f"{text!r} is shown; this is:\n{self.text()}", interval=0.05)

    def get(self, role, name, within=None):
        """The element with that role and accessible name, inside another one if `within` names it.
        It is searched later."""
        return Element(self, role, name, within)

    def press(self, key):
        """Presses and releases a key that has a name, such as Enter or Tab."""
        code = {"Enter": 13, "Tab": 9, "Escape": 27}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **(text if kind == "keyDown" else {}))

    def screenshot(self, path):
        """Writes a picture of the whole page, also of the part outside the window."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip={**size, "scale": 1})
        Path(path).write_bytes(base64.b64decode(picture["data"]))

    def requests(self):
        """Every address that the page asked for, in order."""
        self.evaluate("0")
        return [parameters["request"]["url"] for method, parameters in self.events if method == "Network.requestWillBeSent"]

    def hosts(self):
        """Every host and port that the page requested. Addresses inside the page (data:, blob:)
        have none."""
        return {parts.netloc for url in self.requests() if (parts := urllib.parse.urlsplit(url)).scheme not in ("data", "blob", "about")}

    def errors(self):
        """Everything that the console shows as an error: uncaught exceptions, logged errors, failed
        loads."""
        self.evaluate("0")
        found = []
        for method, parameters in self.events:
            if method == "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                found.append(details.get("exception", {}).get("description") or details["text"])
            elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert"):
                found.append(" ".join(str(each.get("value", each.get("description"))) for each in parameters["args"]))
            elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                found.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        return found


class Element:
    """An element with a role and an accessible name on a page; searched again for each action."""

    def __init__(self, page, role, name, within):
        self.page = page
        self.role, self.name, self.within = role, name, within

    def __repr__(self):
        return f"{self.role} {self.name!r}" + (f" within {self.within}" if self.within else "")

    def nodes(self):
        """The browser's numbers of all such elements."""
        if self.within:
            roots = [{"backendNodeId": node} for node in self.within.nodes()]
        else:
            roots = [{"nodeId": self.page.call("DOM.getDocument", depth=0)["root"]["nodeId"]}]
        found = [node for root in roots for node in self.page.call("Accessibility.queryAXTree", role=self.role, **root)["nodes"]]
        return [node["backendDOMNodeId"] for node in found if not node["ignored"] and plain(node["name"].get("value", "")) == self.name]

    def count(self):
        return len(self.nodes())

    def attempt(self, action):
        """Carries out `action` on the element, which must be the only one of its kind; repeats
        until it works."""
        problem = "it is not there"

        def try_once():
            nonlocal problem
            try:
                nodes = self.nodes()
                if len(nodes) != 1:
                    problem = f"there are {len(nodes)}"
                    return None
                return (action(nodes[0]),)
            except DevToolsError as error:
                problem = str(error)
                return None

        return wait_until(try_once, DEADLINE, lambda: f"{self}: {problem}; the page shows:\n{self.page.text()}", interval=0.05)[0]

    def wait(self):
        """Returns once the element is there."""
        self.attempt(lambda node: None)
        return self

    def click(self):
        def press(node):
            call = self.page.call
            call("DOM.scrollIntoViewIfNeeded", backendNodeId=node)
            quads = call("DOM.getContentQuads", backendNodeId=node)["quads"]
            if not quads:
                raise DevToolsError("it is not visible")
            [quad] = quads[:1]
            at = {"x": sum(quad[0::2]) / 4, "y": sum(quad[1::2]) / 4, "button": "left", "clickCount": 1}
            call("Input.dispatchMouseEvent", type="mousePressed", **at)
            call("Input.dispatchMouseEvent", type="mouseReleased", **at)

        self.attempt(press)
        return self

    def fill(self, text):
        """Replaces the content by a text."""
        def type_in(node):
            self.page.call("DOM.focus", backendNodeId=node)
            self.page.call("Input.dispatchKeyEvent", type="keyDown", commands=["selectAll"])
            self.page.call("Input.dispatchKeyEvent", type="keyUp")
            self.page.call("Input.insertText", text=text)

        self.attempt(type_in)
        return self

    def evaluate(self, function):
        """What a JavaScript function (`e => e.value`) returns for the element."""
        def run(node):
            found = self.page.call("DOM.resolveNode", backendNodeId=node)["object"]["objectId"]
            result = self.page.call(
                "Runtime.callFunctionOn", objectId=found, functionDeclaration=f"function() {{ return ({function})(this); }}", returnByValue=True,
            )
            return result["result"].get("value")

        return self.attempt(run)

    def text(self):
        return self.evaluate("e => e.innerText")
