"""Writes every generated page, table and picture from what was measured, and says what is stale.

make docs
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.provenance import ROOT
from docs.tables import memory
from docs.tables.markdown import with_block
from docs.tables.stale import stale

BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "docs/memory.md": {
        "plan": memory.deepest,
        "planned": memory.planned,
        "edge": memory.edge,
        "fits": memory.batches,
    },
}
"""Generated blocks inside pages that are written by hand."""

PICTURES: dict[str, Callable[[Path], None]] = {
    "docs/results/memory-plan.png": memory.plan_picture,
    "docs/results/memory-fits.png": memory.fits_picture,
    "docs/results/memory-timeline.png": memory.step_picture,
}


def page(path: str) -> str:
    """A page with its blocks as they should be."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for name, make in BLOCKS[path].items():
        text = with_block(text, name, make())
    return text


def main() -> None:
    for path in BLOCKS:
        (ROOT / path).write_text(page(path), encoding="utf-8")
    for path, draw in PICTURES.items():
        draw(ROOT / path)
    print("\n".join(stale()) or "all results are of the code as it is", file=sys.stderr)


if __name__ == "__main__":
    main()
