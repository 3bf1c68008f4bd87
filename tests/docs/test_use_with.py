"""Every snippet of README and of the pages on other people's models runs as it is written."""

import re
import runpy

import pytest

from support.commands import ROOT


def snippets(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


SNIPPETS = {
    f"{page}-{i}": snippet
    for page in ("../README.md", "use-with.md", "own-connections.md")
    for i, snippet in enumerate(snippets(page))
}


@pytest.mark.parametrize("snippet", SNIPPETS.values(), ids=SNIPPETS)
def test_snippet_runs(snippet, tmp_path):
    if "monai" in snippet:
        pytest.importorskip("monai")
    script = tmp_path / "snippet.py"
    script.write_text(snippet, encoding="utf-8")
    runpy.run_path(str(script))


def test_every_page_has_snippets():
    assert len(SNIPPETS) >= 9


def test_training_loop_of_readme_is_short():
    (loop,) = (text for text in snippets("../README.md") if "DataLoader(" in text)
    assert sum(bool(line) for line in loop.splitlines()) <= 15
