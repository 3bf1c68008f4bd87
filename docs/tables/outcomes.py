"""What the marked tests found: the matrix of docs/interop.md, the tables of what is converted."""

from __future__ import annotations

from collections.abc import Sequence

from docs.tables.markdown import Found, origin, results, table
from efficient_densenet.functional.modes import MODES

PACKAGES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "MONAI": "monai",
    "torchxrayvision": "torchxrayvision",
    "torchreid": "torchreid",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "pytorchcv": "pytorchcv",
}
"""The libraries, and the package of each; all other rows are structures."""


class Notes:
    """Reasons, each with its number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"<sup>{self.texts.index(text) + 1}</sup>"


def matrix() -> str:
    """A row for each clause, a column for each mode: the path that its tests took there."""
    return matrix_of(results("outcomes"))


def matrix_of(found: Found) -> str:
    tests = [test for test in found["tests"] if "clause" in test]
    clauses = sorted({test["clause"]: None for test in tests}, key=lambda c: int(c.split(" ")[0]))
    notes = Notes()
    rows = []
    for clause in clauses:
        named = [test for test in tests if test["clause"] == clause]
        cells = (path_cell([t for t in named if t["mode"] == mode], notes) for mode in MODES)
        rows.append((clause.partition(" · ")[2], *cells))
    header = ("", *(f'`"{mode}"`' for mode in MODES))
    return "\n\n".join(
        [
            table(header, rows, left=len(header)),
            "\n".join(f"{i}. {text}" for i, text in enumerate(notes.texts, start=1)),
            f"{len(tests)} tests. {origin('outcomes', found)}",
        ]
    )


def path_cell(tests: Sequence[Found], notes: Notes) -> str:
    """One clause in one mode."""
    if not tests:
        return "–"
    if any(test["result"] == "failed" for test in tests):
        return "**fails**"
    passed = [test for test in tests if test["result"] == "passed"]
    return ", ".join(sorted({_path(test, notes) for test in passed})) or "not run"


def _path(test: Found, notes: Notes) -> str:
    if "path" not in test:
        raise ValueError(f"a test of {test['clause']!r} did not say which path it took")
    if test["path"] == "efficient":
        return "efficient"
    kind, _, reason = test["path"].partition(": ")
    if kind == "refused":
        return "refused" + notes.mark(reason)
    return "naive" + ("" if test["mode"] == "none" else notes.mark(test["path"]))


def libraries() -> str:
    """A row for each library, a column for each capability, the number of tests in brackets."""
    return libraries_of(results("outcomes"))


def libraries_of(found: Found) -> str:
    versions = {row: found["versions"].get(package) or "–" for row, package in PACKAGES.items()}
    return _capabilities(found, {row: (row, version) for row, version in versions.items()})


def structures() -> str:
    """The same for each structure of dense blocks that no library has."""
    return structures_of(results("outcomes"))


def structures_of(found: Found) -> str:
    rows = dict.fromkeys(test["library"] for test in found["tests"] if "capability" in test)
    return _capabilities(found, {row: (row,) for row in rows if row not in PACKAGES})


def _capabilities(found: Found, rows: dict[str, tuple[str, ...]]) -> str:
    """A table with these first cells by row; columns are what the tests of the rows are marked."""
    tests = [test for test in found["tests"] if test.get("library") in rows]
    capabilities = list(dict.fromkeys(test["capability"] for test in tests))
    lines = []
    for row, first in rows.items():
        own = [test for test in tests if test["library"] == row]
        cells = (count_cell([t for t in own if t["capability"] == c]) for c in capabilities)
        lines.append((*first, *cells))
    some = next(iter(rows.values()), ())
    header = (*("", "version")[: len(some)], *capabilities)
    return f"{table(header, lines, left=len(header))}\n\n{origin('outcomes', found)}"


def count_cell(tests: Sequence[Found]) -> str:
    """How many tests stand behind a cell; what did not run is no capability."""
    results_of = [test["result"] for test in tests]
    if "failed" in results_of:
        return "**fails**"
    passed = results_of.count("passed")
    return f"yes ({passed})" if passed else "not tested"
