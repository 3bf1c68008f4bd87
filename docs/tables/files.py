"""The Files table of docs/architecture.md, from the first paragraph of each module's docstring."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from benchmarks.provenance import ROOT
from docs.tables.markdown import table

PACKAGE = "efficient_densenet"
FOLDERS = (
    *(f"{PACKAGE}/{room}" for room in ("kernels", "kernels/triton", "functional", "modules")),
    *(f"{PACKAGE}/convert/{room}" for room in ("state", "recording", "recognition")),
    *(f"{PACKAGE}/{room}" for room in ("convert", "memory", "fit", "training")),
    PACKAGE,
    *("benchmarks", "benchmarks/gpu", "docs/tables"),
)
"""From those that import least to those that import most."""


def files() -> str:
    """A row for each file, folder by folder."""
    return table(("file", "what it does"), rows(ROOT), left=2)


def rows(root: Path) -> Iterator[tuple[str, str]]:
    for folder in FOLDERS:
        for path in sorted((root / folder).glob("*.py")):
            if path.name != "__init__.py" or folder == PACKAGE:
                name = path.relative_to(root).as_posix().removeprefix(f"{PACKAGE}/")
                yield f"`{name}`", summary(path)


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring, as Markdown.

    Raises:
        ValueError: if there is none.
    """
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{str(path)!r} has no docstring")
    return " ".join(docstring.split("\n\n")[0].split()).replace("``", "`").replace("|", "\\|")
