"""The page served in a process of its own, and visitors to it in a browser. Used by tests/test_app_page.py."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

from playwright.sync_api import expect

ROOT = Path(__file__).parents[1]
WAIT = 60_000  # ms: other work may hold the processor
# Runs a tool with every address that its process connects to, or asks the name of, written down.
WATCHED = """
import runpy, sys
log = open(sys.argv.pop(1), "w", buffering=1)
def hook(event, args):
    if event == "socket.connect":
        log.write(f"{args[1][0] if isinstance(args[1], tuple) else args[1]}\\n")
    elif event == "socket.getaddrinfo":
        log.write(f"{args[0]}\\n")
sys.addaudithook(hook)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Server:
    """tools/app.py (or another script) in a process of its own, on a free port."""

    def __init__(self, folder, script="tools/app.py", *arguments, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log, self.hosts = f"http://127.0.0.1:{port}", folder / "server.log", folder / "hosts.txt"
        # The tests' own settings for the Hub must not hide what the page does by itself.
        own = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "GRADIO"))}
        own |= dict(HF_HOME=str(folder / "hub"), GRADIO_SERVER_PORT=str(port), GRADIO_TEMP_DIR=str(folder / "temp"))
        own |= dict(PYTHONPATH=str(ROOT)) | environment
        command = [sys.executable, "-c", WATCHED, str(self.hosts), script, *arguments]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=own, stdout=log, stderr=log)
        for _ in range(1200):
            if self.process.poll() is not None or self.answers():
                break
            time.sleep(0.1)
        assert self.process.poll() is None, self.log.read_text()

    def answers(self, path="/"):
        return self.status(path) == 200

    def status(self, path, method="GET"):
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, method=method), timeout=60) as answer:
                return answer.status
        except HTTPError as error:
            return error.code
        except OSError:
            return 0

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


class Visitor:
    """A page of its own, which writes down what it asked for and what went wrong."""

    def __init__(self, browser, server, width=1280, height=900, **options):
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
        self.settled("match")

    def settled(self, tab, version=-1):
        """Waits for a tab's answer later than `version`."""
        self.page.wait_for_function(  # the version counts the server's answers
            "([tab, version]) => { const d = document.querySelector(`#${tab} .drawn`);"
            " return d && d.dataset.state === 'done' && Number(d.dataset.version) > version; }",
            arg=[tab, version],
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

    def sources(self, selector):
        return self.page.locator(selector).evaluate_all("all => all.map((one) => one.src)")

    def upload(self, *paths):
        self.after("match", lambda: self.page.locator("#tray .chooser").set_input_files([str(p) for p in paths]))

    def notice(self, tab="match"):
        return self.page.locator(f"#{tab} .notice").inner_text()

    def leave(self):
        self.context.close()
        foreign = [url for url in self.requests if not url.startswith((self.server.url, "data:", "blob:"))]
        assert self.requests and not foreign, foreign
        assert not self.problems, self.problems
