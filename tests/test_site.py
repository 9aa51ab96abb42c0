"""The documentation site as its readers get it: built with warnings as errors, links followed, used in a browser."""

import http.server
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="NO MKDOCS: the site was not built (the extra `docs`)")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Page(HTMLParser):
    """Links, anchors and what a browser fetches by itself."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.fetched: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in FETCHED and FETCHED[tag] in values and values.get("rel") != "canonical":
            self.fetched.append(values[FETCHED[tag]])


@pytest.mark.slow  # builds the site
def test_links_lead_somewhere_and_pages_need_no_other_host(site: Path) -> None:
    files = sorted(site.rglob("*.html"))
    pages = {file: Page(file) for file in files}
    assert len(pages) > 35
    lost, external = [], set()
    for file, page in pages.items():
        for address in page.links + page.fetched:
            parts = urlsplit(address)
            if parts.scheme in ("http", "https"):
                external.add(address)
                assert address not in page.fetched, f"{file.name} fetches {address}"
            elif parts.scheme == "" and file.name != "404.html":
                target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
                target = target / "index.html" if target.is_dir() else target
                known = pages.get(target)
                if not target.exists() or (parts.fragment and known and unquote(parts.fragment) not in known.ids):
                    lost.append(f"{file.relative_to(site)}: {address}")
    assert lost == []
    listed = (site / "external-links.txt").read_text(encoding="utf-8").splitlines()
    assert {line.split("  ")[0] for line in listed} == external


@pytest.mark.slow  # as above
def test_docstrings_are_whole_on_the_page(site: Path) -> None:
    text = "".join(file.read_text(encoding="utf-8") for file in site.rglob("*.html"))
    assert not re.search(r":(func|class|mod|meth):", text), "a Sphinx role is not a link"
    assert "--8&lt;--" not in text and "--8<--" not in re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    operators = Page(site / "api" / "operators.html")
    for name in ("info_nce", "propagate", "matrix_fusion"):
        assert f"msacore.{name}" in operators.ids


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The site on a local port, because browsers do not let the search read files from disk."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.slow  # starts a browser
def test_a_reader_opens_pages_and_searches(address: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright drives the browser")
    found = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if found is None:
        pytest.skip("NO CHROMIUM: the site was not opened in a browser (apt-get install chromium)")
    requests: list[str] = []
    problems: list[str] = []
    with playwright.sync_playwright() as control:
        browser = control.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("response", lambda r: problems.append(f"{r.status} {r.url}") if r.status >= 400 else None)

        page.goto(f"{address}/index.html")
        assert page.locator("h1").first.text_content().startswith("msacore")
        page.get_by_role("article").get_by_role("link", name="Contrastive losses").click()
        page.wait_for_url("**/guides/contrastive.html")
        assert page.locator("h2", has_text="A queue of negatives").is_visible()
        assert page.locator(".highlight .kn").count() > 0, "code is coloured"

        page.get_by_role("article").get_by_role("link", name="info_nce").first.click()
        page.wait_for_url("**/operators/info_nce.html")
        for part in ("Formula, gradient, cost", "Dtypes", "Errors"):
            assert page.locator("h2", has_text=part).is_visible()
        page.get_by_role("article").get_by_role("link", name="info_nce").last.click()
        page.wait_for_url("**/api/operators.html#msacore.info_nce")
        assert page.locator("[id='msacore.info_nce']").first.is_visible()

        page.get_by_placeholder("Search").click()
        page.get_by_placeholder("Search").press_sequentially("low_rank_fusion")
        result = page.locator(".md-search-result__link", has_text="low_rank_fusion").first
        result.wait_for(timeout=20_000)
        result.click()
        page.wait_for_url("**low_rank_fusion**")
        browser.close()
    assert problems == []
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
