"""What the programs in this folder share: results read, tables written, blocks put into pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from benchmarks.provenance import RESULTS, Json

MIB = 2**20
Found = Json
"""What ``docs/results/NAME.json`` holds: ``conditions``, and what ``benchmarks/NAME.py`` found."""


def results(name: str) -> Found:
    """What ``benchmarks/NAME.py`` found."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(header: Sequence[object], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """A Markdown table: the ``left`` first columns are flush left, the others flush right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, rule, *rows))


def conditions(found: Found) -> str:
    """The conditions of a measurement in one line."""
    of = found["conditions"]
    machine = [of[name] for name in ("device", "instruction set") if name in of]
    threads = f"{of['threads']} thread{'' if of['threads'] == '1' else 's'}"
    return ", ".join(
        [*machine, threads, f"torch {of['torch']}", f"commit {of['commit']}", of["date"]]
    )


def origin(name: str, found: Found) -> str:
    """The sentence beneath a table: which program made its numbers, and on what."""
    return f"From `python -m benchmarks.{name}`: {conditions(found)}."


def with_block(page: str, name: str, content: str) -> str:
    """``page`` with ``content`` between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.

    Raises:
        ValueError: if the page does not have these marks, once each.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    page, count = pattern.subn(lambda _: f"{begin}\n{content}\n{end}", page)
    if count != 1:
        raise ValueError(f"the page has the marks {name!r} {count} times, not once")
    return page
