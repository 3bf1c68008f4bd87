"""Puts what a script makes into a document, between ``<!-- NAME:begin -->`` and ``:end -->``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path


def command(description: str | None, document: Path, name: str, make: Callable[[], str]) -> None:
    """The command line of a script: prints what ``make`` returns, or writes it with ``--write``."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into docs/{document.name}")
    writes = parser.parse_args().write
    content = make()
    if writes:
        write(document, name, content)
    else:
        print(content)


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
