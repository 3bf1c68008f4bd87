"""Sphinx: the pages of docs/ and the docstrings of the public names as a site (`make site`)."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

from efficient_densenet import __version__

ROOT = Path(__file__).parents[1]

project = "efficient_densenet"
author = copyright = "efficient_densenet contributors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["tables"]
root_doc = "index"
myst_heading_anchors = 3

html_theme = "furo"
html_title = "efficient_densenet"
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

TOP_PAGES = {"index": "README.md", "changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}
"""Pages whose text is that of a file beside docs/; what the page itself has comes after it."""


def read_top_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the text of a file in front, with its links as seen from docs/."""
    if page not in TOP_PAGES:
        return
    text = (ROOT / TOP_PAGES[page]).read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    for name, file in TOP_PAGES.items():
        text = text.replace(f"]({file})", f"]({name}.md)")
    source[0] = f"{text.replace('](LICENSE)', '](../LICENSE)')}\n\n{source[0]}"


def setup(app: Sphinx) -> None:
    app.connect("source-read", read_top_page)
