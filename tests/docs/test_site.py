"""The site: no broken link or image, no error in a browser, and its code runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from support.commands import ROOT

pytest.importorskip("sphinx")
pytestmark = pytest.mark.slow

BROWSER = shutil.which("chromium")
PAGES_WITH_CODE = ("index", "limitations", "memory", "derivation")
"""Not training: what it reads is there after a run."""


class Page(HTMLParser):
    """The anchors of a page, what it refers to, and its blocks of Python."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.anchors, self.references = path, {""}, list[str]()
        self.blocks, self._depth = list[str](), 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors.add(found.get("id") or "")
        self.references += [found[name] or "" for name in ("href", "src") if name in found]
        if self._depth:
            self._depth += tag == "div"
        elif tag == "div" and "highlight-python" in (found.get("class") or ""):
            self._depth = 1
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        self._depth -= bool(self._depth) and tag == "div"

    def handle_data(self, data: str) -> None:
        if self._depth:
            self.blocks[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """Every page by its name, built as `make site` builds them."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(folder)]
    built = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return {
        str(path.relative_to(folder).with_suffix("")): Page(path) for path in folder.rglob("*.html")
    }


def broken(page: Page, pages: dict[Path, Page]) -> list[str]:
    """What a page refers to and is not there."""
    found = []
    for reference in page.references:
        url = urlsplit(reference)
        if url.scheme:
            continue
        path = (page.path.parent / unquote(url.path)).resolve() if url.path else page.path
        anchors = pages[path].anchors if path in pages else {url.fragment}
        if not path.is_file() or unquote(url.fragment) not in anchors:
            found.append(reference)
    return found


def test_every_link_and_image_is_there(site: dict[str, Page]) -> None:
    pages = {page.path.resolve(): page for page in site.values()}
    assert {name: lost for name, page in site.items() if (lost := broken(page, pages))} == {}
    assert any(reference.endswith(".png") for reference in site["index"].references)


def test_missing_file_and_missing_anchor_are_found(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text('<p id="here"><a href="#here"></a><a href="#gone"></a><img src="no.png"></p>')
    page = Page(path)
    assert broken(page, {path: page}) == ["#gone", "no.png"]


def test_public_names_are_documented(site: dict[str, Page]) -> None:
    import efficient_densenet

    names = {f"efficient_densenet.{name}" for name in efficient_densenet.__all__}
    assert names <= site["api"].anchors


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("name", ["index", "api", "memory", "derivation"])
def test_browser_has_no_complaint(site: dict[str, Page], name: str, tmp_path: Path) -> None:
    address = site[name].path.as_uri()
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}")
    shown = subprocess.run(
        [BROWSER, *options, "--enable-logging=stderr", "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "</html>" in shown.stdout
    assert [line for line in shown.stderr.splitlines() if "CONSOLE" in line] == []


@pytest.mark.parametrize("name", PAGES_WITH_CODE)
def test_code_of_page_runs(site: dict[str, Page], name: str, tmp_path: Path) -> None:
    assert site[name].blocks
    script = tmp_path / "page.py"
    script.write_text("\n".join(site[name].blocks), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
