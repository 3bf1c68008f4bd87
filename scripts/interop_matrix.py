"""The matrix of docs/interop.md, from the outcome of the tests that are marked with a clause.

    python -m pytest tests/modules tests/functional --junit-xml interop.xml
    python -m scripts.interop_matrix interop.xml            # print the matrix
    python -m scripts.interop_matrix interop.xml --write    # put it into docs/interop.md

A cell says on which path the tests of a clause passed in a mode, as the tests themselves found it.
"""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.provenance import cpu
from scripts import marked

DOCUMENT = Path(__file__).parent.parent / "docs" / "interop.md"
MODES = ("none", "norm", "bottleneck")


class Outcome(NamedTuple):
    """What a test of a clause found in a mode: ``path`` is absent if it did not come so far."""

    clause: str
    mode: str
    result: str
    path: str | None


def outcomes(report: ET.Element) -> list[Outcome]:
    """Of all tests marked with a clause, in the order of a JUnit report."""
    found = []
    for case in report.iter("testcase"):
        properties = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
        if "clause" in properties:
            children = {child.tag for child in case}
            failed = "failed" if children & {"failure", "error"} else "passed"
            result = "not run" if "skipped" in children else failed
            found.append(
                Outcome(properties["clause"], properties["mode"], result, properties.get("path"))
            )
    return found


class Notes:
    """Reasons, each with its number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"<sup>{self.texts.index(text) + 1}</sup>"


def cell(found: list[Outcome], notes: Notes) -> str:
    """One clause in one mode."""
    if not found:
        return "–"
    results = {outcome.result for outcome in found}
    if "failed" in results:
        return "**fails**"
    if results == {"not run"}:
        return "not run"
    kinds = sorted({_kind(outcome, notes) for outcome in found if outcome.result == "passed"})
    return ", ".join(kinds)


def _kind(outcome: Outcome, notes: Notes) -> str:
    path = outcome.path
    if path is None:
        raise ValueError(f"a test of {outcome.clause!r} did not say which path it took")
    if path == "efficient":
        return "efficient"
    kind, _, reason = path.partition(": ")
    if kind == "refused":
        return "refused" + notes.mark(reason)
    return "reference" + ("" if outcome.mode == "none" else notes.mark(path))


def markdown(found: list[Outcome], when: str) -> str:
    clauses = sorted(dict.fromkeys(o.clause for o in found), key=lambda c: int(c.split(" ")[0]))
    notes = Notes()
    rows = []
    for clause in clauses:
        cells = [
            cell([o for o in found if (o.clause, o.mode) == (clause, mode)], notes)
            for mode in MODES
        ]
        rows.append(f"| {clause.partition(' · ')[2]} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            "| | " + " | ".join(f'`"{mode}"`' for mode in MODES) + " |",
            "|---|" + "---|" * len(MODES),
            *rows,
            "",
            *(f"{i}. {text}" for i, text in enumerate(notes.texts, start=1)),
            "",
            f"Made by `python -m scripts.interop_matrix` from {len(found)} tests "
            f"({cpu()}, torch {torch.__version__.split('+')[0]}, {when}).",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path, help="JUnit report of the tests")
    parser.add_argument("--write", action="store_true", help=f"into docs/{DOCUMENT.name}")
    options = parser.parse_args()
    report = ET.parse(options.report).getroot()
    when = next(report.iter("testsuite")).attrib["timestamp"][:10]
    matrix = markdown(outcomes(report), when)
    if options.write:
        marked.write(DOCUMENT, "matrix", matrix)
    else:
        print(matrix)


if __name__ == "__main__":
    main()
