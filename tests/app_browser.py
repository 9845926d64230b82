"""The page served in a process of its own, and visitors to it in a browser. Used by tests/app/test_app_page.py and
tests/app/test_app_faults.py, which are skipped where there is no browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

import pytest

pytest.importorskip("gradio", reason='gradio is missing: pip install "cleandift_backbones[demo]"')
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
expect = playwright.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium: apt-get install chromium (make test-app does)", allow_module_level=True)

ROOT = Path(__file__).parents[1]
WAIT = 240_000  # ms: other work may hold the processor
expect.set_options(timeout=WAIT)
# Runs a tool with every address that its process connects to, or asks the name of, written down. While a file called
# "load" lies in the folder `hold`, its models go on loading; while one called "forward" does, no pass begins.
WATCHED = """
import os, runpy, sys, threading, time
log, hold = open(sys.argv.pop(1), "w", buffering=1), sys.argv.pop(1)
def hook(event, args):
    if event == "socket.connect":
        log.write(f"{args[1][0] if isinstance(args[1], tuple) else args[1]}\\n")
    elif event == "socket.getaddrinfo":
        log.write(f"{args[0]}\\n")
sys.addaudithook(hook)
def make_holdable(name="cleandift_backbones.visualize.features"):
    while not hasattr(sys.modules.get(name), "how_to_get"):  # its last line; importing it here would be too early
        time.sleep(0.01)
    module = sys.modules[name]
    load, forward = module.load_extractor, module._forward
    def held_load(*args, **kwargs):
        while os.path.exists(f"{hold}/load"):
            time.sleep(0.01)
        return load(*args, **kwargs)
    def held_forward(loaded, spec, picture, seed, watch):
        while os.path.exists(f"{hold}/forward"):
            watch(0.5)
            time.sleep(0.01)
        return forward(loaded, spec, picture, seed, watch)
    module.load_extractor, module._forward = held_load, held_forward
threading.Thread(target=make_holdable, daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def until(true, what):
    """Waits until a function returns something true."""
    end = time.monotonic() + WAIT / 1000
    while not (value := true()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)
    return value


class Server:
    """tools/app.py (or another script) in a process of its own, on a free port."""

    def __init__(self, folder, script="tools/app.py", *arguments, port=None, hold=()):
        self.log, self.hosts, self.held = folder / "server.log", folder / "hosts.txt", folder / "hold"
        self.held.mkdir(exist_ok=True)
        for name in hold:
            (self.held / name).touch()
        # The tests' own settings for the Hub must not hide what the page does by itself.
        own = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "GRADIO"))}
        own |= dict(HF_HOME=str(folder / "hub"), GRADIO_TEMP_DIR=str(folder / "temp"), PYTHONPATH=str(ROOT))
        for _ in range(3):  # somebody else may take the port first
            self.port = port or free_port()
            self.url = f"http://127.0.0.1:{self.port}"
            own["GRADIO_SERVER_PORT"] = str(self.port)
            command = [sys.executable, "-c", WATCHED, str(self.hosts), str(self.held), script, *arguments]
            with open(self.log, "w") as log:
                self.process = subprocess.Popen(command, cwd=ROOT, env=own, stdout=log, stderr=log)
            until(lambda: self.process.poll() is not None or self.answers(), "the server")
            if self.process.poll() is None or "port" not in self.log.read_text():
                break
        assert self.process.poll() is None, self.log.read_text()

    @contextmanager
    def hold(self, name):
        """Lets "load" or "forward" wait."""
        (self.held / name).touch()
        try:
            yield
        finally:
            self.release(name)

    def release(self, name):
        (self.held / name).unlink(missing_ok=True)

    def answers(self, path="/"):
        return self.status(path) == 200

    def status(self, path, method="GET"):
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, method=method), timeout=120) as answer:
                return answer.status
        except HTTPError as error:
            return error.code
        except OSError:
            return 0

    def stop(self):
        self.process.terminate()
        self.process.wait(120)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Visitor:
    """A page of its own, which writes down what it asked for and what went wrong."""

    def __init__(self, browser, server, width=1280, height=900, wait=True, **options):
        self.server = server
        self.context = browser.new_context(viewport=dict(width=width, height=height), **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.requests, self.problems = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("response", lambda r: r.status >= 400 and self.problems.append(f"{r.status} {r.url}"))
        self.page.on(
            "console", lambda m: m.type in ("error", "warning") and self.problems.append(f"{m.type}: {m.text}")
        )
        self.page.goto(server.url)
        if wait:
            self.settled("match")

    def settled(self, tab, version=-1, state="done"):
        """Waits for a tab's answer later than `version`."""
        self.page.wait_for_function(  # the version counts the server's answers
            "([tab, version, state]) => { const d = document.querySelector(`#${tab} .drawn`);"
            " return d && d.dataset.state === state && Number(d.dataset.version) > version; }",
            arg=[tab, version, state],
        )

    def version(self, tab):
        drawn = self.page.locator(f"#{tab} .drawn")  # not there before its tab was open
        return int(drawn.get_attribute("data-version") or -1) if drawn.count() else -1

    def after(self, tab, action):
        """Does something, and waits until the tab has answered it."""
        version = self.version(tab)
        action()
        self.settled(tab, version)

    def open(self, name, tab):
        if self.page.get_by_role("tab", name=name).get_attribute("aria-selected") != "true":
            self.after(tab, self.page.get_by_role("tab", name=name).click)

    def pictures(self):
        return self.page.locator("#tray .strip .thumb img").evaluate_all("all => all.map((one) => one.alt)")

    def only(self, *samples):
        """These samples, and no point."""
        while self.page.locator("#tray .strip .thumb").count():
            count = self.page.locator("#tray .strip .thumb").count()
            self.page.locator("#tray .strip .thumb .remove").first.click()
            expect(self.page.locator("#tray .strip .thumb")).to_have_count(count - 1)
        self.page.get_by_role("button", name="Samples").click()
        for sample in samples:
            self.after("match", self.page.locator("#tray .samples").get_by_title(sample).click)
        self.page.get_by_role("button", name="Hide samples").click()
        assert self.pictures() == list(samples)

    def view(self, number, tab="match"):
        return self.page.locator(f"#{tab} .card .view").nth(number)

    def click(self, number, x, y, tab="match"):
        box = self.view(number, tab).bounding_box()
        self.after(tab, lambda: self.view(number, tab).click(position=dict(x=x * box["width"], y=y * box["height"])))

    def marks(self, number, tab="match"):
        """{number of the point: (x, y)} as drawn on the screen."""
        return {
            int(n): (x, y)
            for n, x, y in self.view(number, tab).evaluate(
                """view => [...view.querySelectorAll('.mark[data-number]')].map((mark) => {
                     const [box, own] = [view.getBoundingClientRect(), mark.getBoundingClientRect()];
                     return [mark.dataset.number, (own.x + own.width / 2 - box.x) / box.width,
                             (own.y + own.height / 2 - box.y) / box.height];
                   })"""
            )
        }

    def slide(self, name, value):
        """Moves a slider by its handle, as a hand does; says where it stands then."""
        handle = self.page.locator(f"#{name} input[type=range]")
        low, high = (float(handle.get_attribute(end)) for end in ("min", "max"))
        box = handle.bounding_box()
        self.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.page.mouse.down()
        self.page.mouse.move(
            box["x"] + box["width"] * (value - low) / (high - low), box["y"] + box["height"] / 2, steps=5
        )
        self.page.mouse.up()
        return handle.input_value()

    def answered(self, tab, words):
        """Waits until a tab shows the result that its three lines of Python describe so."""
        expect(self.page.locator(f"#{tab} pre")).to_contain_text(words)

    def sources(self, selector):
        return self.page.locator(selector).evaluate_all("all => all.map((one) => one.src)")

    def upload(self, *paths):
        self.after("match", lambda: self.page.locator("#tray .chooser").set_input_files([str(p) for p in paths]))

    def notice(self, tab="match"):
        return self.page.locator(f"#{tab} .notice").inner_text()

    def leave(self, problems=False):
        """Closes the page, which asked no other host, and, unless `problems`, met with no error."""
        self.context.close()
        foreign = [url for url in self.requests if not url.startswith((self.server.url, "data:", "blob:"))]
        assert self.requests and not foreign, foreign
        assert problems or not self.problems, self.problems


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()
    outside = {
        h for h in server.hosts.read_text().split() if h not in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "None")
    }
    assert not outside, f"the server asked for {outside}"
    assert "Traceback" not in server.log.read_text(), server.log.read_text()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"],
        )
        yield browser
        browser.close()


@pytest.fixture
def visitor(browser, server):
    visitor = Visitor(browser, server)
    yield visitor
    visitor.leave()
