"""What the marked tests found: the matrix of docs/interop.md, the README's table of libraries."""

from __future__ import annotations

from collections.abc import Sequence

from docs.tables.markdown import Found, origin, results, table
from efficient_densenet.functional.modes import MODES

PAGES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "MONAI": "monai",
    "torchxrayvision": "torchxrayvision",
    "torchreid": "torchreid",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "pytorchcv": "pytorchcv",
    "Tiramisu-style": "tiramisu",
}
"""The rows, and the page of docs/use-with and, mostly, the package of each."""


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
    tests = [test for test in found["tests"] if "capability" in test]
    capabilities = list(dict.fromkeys(test["capability"] for test in tests))
    rows = []
    for library, page in PAGES.items():
        own = [test for test in tests if test["library"] == library]
        cells = (count_cell([t for t in own if t["capability"] == c]) for c in capabilities)
        link = f"[{library}](docs/use-with/{page}.md)"
        rows.append((link, found["versions"].get(page) or "–", *cells))
    header = ("", "version", *capabilities)
    return f"{table(header, rows, left=len(header))}\n\n{origin('outcomes', found)}"


def count_cell(tests: Sequence[Found]) -> str:
    """How many tests stand behind a cell; what did not run is no capability."""
    results_of = [test["result"] for test in tests]
    if "failed" in results_of:
        return "**fails**"
    passed = results_of.count("passed")
    return f"yes ({passed})" if passed else "not tested"
