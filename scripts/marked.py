"""Puts what a script makes into a document, between ``<!-- NAME:begin -->`` and ``:end -->``."""

from __future__ import annotations

import re
from pathlib import Path


def write(document: Path, name: str, content: str) -> None:
    """Replace what stands between the marks ``name`` of ``document``.

    Raises:
        ValueError: if the document has not these marks, once each.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = document.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    text, found = pattern.subn(lambda _: f"{begin}\n{content}\n{end}", text)
    if found != 1:
        raise ValueError(f"{str(document)!r} has the marks {name!r} {found} times, not once")
    document.write_text(text, encoding="utf-8")
