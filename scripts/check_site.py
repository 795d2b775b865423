"""Loads every page of the built site in a headless Chromium, and says what a reader would stumble on.

    python scripts/check_site.py site docs

Faults are: a formula or markup that is shown as it was written, a formula that KaTeX does not know, an error on the
console, a request to another host or one that fails, a link or anchor that leads nowhere, a picture that is missing or
has no description, a page wider than the window at 1,280 or 390 pixels, code wider than its column at 1,280, and code
that a reader would copy otherwise than it was written (what was written is run by the tests).

Chromium is driven through two pipes in its own protocol, so that nothing has to be installed but the browser.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import html.parser
import http.server
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (1280, 390)
# Where a project's pages usually are, so that a link from the root of the host is found out.
PREFIX = "/bilevel/"
PATIENCE = 30.0  # seconds for one page

# What is looked for in the text, outside of code and of what KaTeX has drawn.
LOOK = r"""
(async () => {
  await document.fonts.ready;
  const faults = [];
  const shown = (text) => JSON.stringify(text.trim().replace(/\s+/g, " ").slice(0, 80));
  const raw = [
    [/:(math|class|func|meth|mod|attr|ref):`?/, "markup of Sphinx"],
    [/^\s*\.\. \w+::/m, "markup of Sphinx"],
    [/\\[()\[\]]/, "a formula that is not drawn"],
    [/\\[a-zA-Z]{2,}/, "a formula that is not drawn"],
    [/\$[^\s$][^$]*\$/, "a formula that is not drawn"],
    [/\$\$/, "a formula that is not drawn"],
    [/^\s*:::/m, "a directive that is not followed"],
    [/\[[^\]]+\]\[[\w.]*\]/, "a reference that is not resolved"],
  ];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    if (node.parentElement.closest("script, style, noscript, pre, code, .katex")) continue;
    for (const [pattern, what] of raw)
      if (pattern.test(node.data)) { faults.push(`${what}: ${shown(node.data)}`); break; }
  }
  for (const place of document.querySelectorAll(".arithmatex"))
    if (!place.querySelector(".katex")) faults.push(`a formula that is not drawn: ${shown(place.textContent)}`);
  for (const picture of document.querySelectorAll(".md-content img")) {
    picture.loading = "eager";
    await picture.decode().catch(() => faults.push(`a picture that is not there: ${picture.src}`));
    if (!picture.alt.trim()) faults.push(`a picture without a description: ${picture.src}`);
  }
  return faults;
})()
"""

MEASURE = r"""
(async (code) => {
  await new Promise((done) => setTimeout(done, 50));
  const faults = [], width = window.innerWidth;
  const wide = document.documentElement.scrollWidth;
  if (wide > width) {
    // Name the narrowest element that sticks out and lies in no box of its own.
    const out = [...document.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right > width + 1);
    const last = out.filter((e) => !out.some((other) => other !== e && e.contains(other)))[0];
    faults.push(`the page is ${wide} pixels wide: ${last ? last.tagName + " " + last.textContent.slice(0, 60) : ""}`);
  }
  if (code)
    for (const block of document.querySelectorAll(".md-content pre > code"))
      if (block.scrollWidth > block.clientWidth)
        faults.push(`code is cut at the column's edge: ${JSON.stringify(
          block.innerText.split("\n").sort((a, b) => b.length - a.length)[0].trim().slice(0, 110))}`);
  return faults;
})
"""

COPY = '[...document.querySelectorAll(".md-content pre > code")].map((block) => block.textContent)'
FENCED = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Browser:
    """One page of a headless Chromium."""

    def __init__(self, program: str, folder: str):
        """Starts `program` with a profile in `folder`."""
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        flags = ["--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-dev-shm-usage"]
        flags += ["--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        # The browser reads descriptor 3 and writes descriptor 4.
        self._process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "sh", program, *flags, *root, "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._last = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        threading.Thread(target=self._listen, daemon=True).start()
        targets = self.call("Target.getTargets")["targetInfos"]
        (page,) = [target["targetId"] for target in targets if target["type"] == "page"][:1]
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _listen(self) -> None:
        rest = b""
        while chunk := os.read(self._in, 1 << 16):
            *messages, rest = (rest + chunk).split(b"\0")
            for message in messages:
                self._said.put(json.loads(message))
        self._said.put(None)

    def _next(self) -> dict[str, Any]:
        try:
            message = self._said.get(timeout=PATIENCE)
        except queue.Empty:
            raise SystemExit(f"Chromium has said nothing for {PATIENCE:.0f} seconds.") from None
        if message is None:
            raise SystemExit("Chromium has ended by itself.")
        return message

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """What the browser answers; events that come before go to `events`."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._last:
            self.events.append(answer)
        if "error" in answer:
            raise SystemExit(f"Chromium refuses {method}: {answer['error']['message']}")
        return answer["result"]

    def evaluate(self, script: str) -> Any:
        """The value of a promise."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise SystemExit(f"A script of this check failed: {answer['exceptionDetails']}")
        return answer["result"]["value"]

    def resize(self, width: int) -> None:
        """A window of that width."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)

    def open(self, url: str) -> list[dict[str, Any]]:
        """Loads a page; the events until it has loaded."""
        self.events = []
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        return self.events

    def close(self) -> None:
        """Ends the browser."""
        with contextlib.suppress(SystemExit, OSError):
            self._session = None
            self.call("Browser.close")
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()


class Parsed(html.parser.HTMLParser):
    """Anchors and links of a page as it was written."""

    def __init__(self, text: str):
        """Reads `text`."""
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each tag."""
        given = dict(attrs)
        for name in ("id", "name"):
            if value := given.get(name):
                self.ids.add(value)
        if tag == "a" and (link := given.get("href")) is not None:
            self.links.add(link)


def address(site: Path, file: Path) -> str:
    """Where a file of the site is served."""
    path = file.relative_to(site).as_posix()
    return PREFIX + (path.removesuffix("index.html") if file.name == "index.html" else path)


def broken_links(site: Path, pages: list[Path]) -> dict[str, list[str]]:
    """Of each page, links that lead nowhere within the site; other hosts are not asked."""
    parsed = {file: Parsed(file.read_text(encoding="utf-8")) for file in pages}
    faults: dict[str, list[str]] = defaultdict(list)
    for file, page in parsed.items():
        here = address(site, file)
        for link in sorted(page.links):
            parts = urlsplit(urljoin(here, link))
            if parts.scheme or parts.netloc:
                continue
            if not parts.path.startswith(PREFIX):
                faults[here].append(f"a link out of the site: {link}")
                continue
            target = site / unquote(parts.path.removeprefix(PREFIX))
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                faults[here].append(f"a link to no page: {link}")
            elif parts.fragment and target in parsed and unquote(parts.fragment) not in parsed[target].ids:
                faults[here].append(f"a link to no anchor of {address(site, target)}: {link}")
    return faults


def told(events: list[dict[str, Any]], origin: str) -> Iterator[str]:
    """What the browser complains of, and what it asked of whom."""
    for event in events:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                yield f"an error of a script: {details.get('exception', {}).get('description', details['text'])}"
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                said = " ".join(str(arg.get("value", arg.get("description", ""))) for arg in params["args"])
                yield f"on the console: {said}"
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                yield f"on the console: {params['entry']['text']} {params['entry'].get('url', '')}"
            case "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith((origin, "data:", "blob:")):
                    yield f"a request to another host: {url}"
            case "Network.responseReceived" if params["response"]["status"] >= 400:
                yield f"a request that fails ({params['response']['status']}): {params['response']['url']}"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """The site below `PREFIX`, without a line for each request."""

    def translate_path(self, path: str) -> str:
        """The file for a path."""
        inside = path.removeprefix(PREFIX) if path.startswith(PREFIX) else "outside-of-the-site"
        return super().translate_path("/" + inside)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


def written(docs: Path, page: Path) -> list[str]:
    """The blocks of Python of the Markdown that became the page `page`, a path within the site."""
    name = page.parent if page.name == "index.html" else page.with_suffix("")
    for source in (docs / f"{name}.md", docs / name / "index.md"):
        if source.is_file():
            return FENCED.findall(source.read_text(encoding="utf-8"))
    return []


def check(site: Path, docs: Path, program: str) -> tuple[int, dict[str, list[str]]]:
    """How many pages the site has, and the faults of each; `docs` has the Markdown that it was made of."""
    pages = sorted(site.rglob("*.html"))
    faults = broken_links(site, [page for page in pages if page.name != "404.html"])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    origin = f"http://127.0.0.1:{server.server_port}/"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(program, folder)
        try:
            for file in pages:
                if file.name == "404.html":  # its links start at the root of whatever host it is put on
                    continue
                here = address(site, file)
                browser.resize(WIDTHS[0])
                browser.open(urljoin(origin, here))
                faults[here] += browser.evaluate(LOOK)
                copied = browser.evaluate(COPY)
                for block in written(docs, file.relative_to(site)):
                    if block not in copied:
                        faults[here].append(f"code is copied otherwise than it was written: {block.splitlines()[0]}")
                for width in WIDTHS:
                    browser.resize(width)
                    found = browser.evaluate(f"({MEASURE.strip()})({json.dumps(width == WIDTHS[0])})")
                    faults[here] += [f"at {width} pixels {fault}" for fault in found]
                faults[here] += told(browser.events, origin)
        finally:
            browser.close()
            server.shutdown()
    return len(pages), {page: list(dict.fromkeys(found)) for page, found in faults.items() if found}


PLANTED = r"""<!doctype html><title>Faults</title><body><div class="md-content">
<p>:math:`x`</p><p>\(x\)</p><p>and $x$</p><p>.. math:: x</p><p>\frac12</p><p>::: name</p><p>[Name][path.to]</p>
<span class="arithmatex">x</span>
<img src="none.png" alt="none"><a href="nowhere/">to no page</a><a href="#none">to no anchor</a><a href="/">out</a>
<script src="https://elsewhere.invalid/x.js"></script><script>console.error("said"); throw new Error("thrown")</script>
<pre><code style="display: block; overflow: auto; width: 9em">a line that is longer than its column is wide</code></pre>
<p style="width: 2000px">wide</p></div>"""
FOUND = (
    "markup of Sphinx", "a formula that is not drawn", "a directive that is not followed", "a reference that is not",
    "a picture that is not there", "a link to no page", "a link to no anchor",
    "a link out of the site", "a request to another host", "a request that fails (404)", "on the console: said",
    "an error of a script: Error: thrown", "at 1280 pixels code is cut", "at 1280 pixels the page is 2",
    "at 390 pixels the page is 2", "code is copied otherwise than it was written: indented = 1",
)  # fmt: skip


def overlooked(program: str) -> list[str]:
    """Which faults of a page that has one of each are not found."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "index.html").write_text(PLANTED, encoding="utf-8")
        (Path(folder) / "index.md").write_text("```python\nindented = 1\n```\n", encoding="utf-8")
        _, faults = check(Path(folder), Path(folder), program)
        found = [fault for page in faults.values() for fault in page]
        # Each of the seven paragraphs and the formula beside them, on its own.
        shown = ("markup of Sphinx", "a formula that is not drawn", "a directive", "a reference that")
        count = sum(fault.startswith(shown) for fault in found)
        return [each for each in FOUND if not any(fault.startswith(each) for fault in found)] + ["text"] * (count != 8)


def main() -> int:
    """The exit code: 0 where nothing is wrong, 1 where something is, 2 where there is no browser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="the folder that mkdocs has built")
    parser.add_argument("docs", type=Path, help="the folder of the Markdown that it was built from")
    parser.add_argument("--browser", help=f"a Chromium; by default the first of {', '.join(NAMES)}")
    given = parser.parse_args()
    program = shutil.which(given.browser) if given.browser else next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        said = "No Chromium is found to look at the site with: install one (on Debian: apt-get install chromium)."
        print(said, file=sys.stderr)
        return 2
    if not (given.site / "index.html").is_file():
        print(f"{given.site} has no index.html: `make docs` builds the site.", file=sys.stderr)
        return 2
    if missed := overlooked(program):
        print(f"This check would overlook: {', '.join(missed)}", file=sys.stderr)
        return 2
    count, faults = check(given.site.resolve(), given.docs, program)
    for page, found in sorted(faults.items()):
        print(page)
        for fault in found:
            print(f"  {fault}")
    print(f"{count} pages looked at, {sum(map(len, faults.values()))} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
