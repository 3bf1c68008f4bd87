"""Writes every generated page, table and picture from what was measured, and says what is stale.

    make docs

What shows results that are missing is left as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from benchmarks.provenance import ROOT
from docs.tables import (
    alternatives,
    benchmarks,
    derivation,
    experiment,
    files,
    fit,
    growth,
    inference,
    interop,
    kernels,
    memory,
    outcomes,
    steps,
    time_model,
    training,
)
from docs.tables.markdown import with_block
from docs.tables.stale import stale

BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"results": steps.readme, "use-with": outcomes.libraries},
    "docs/architecture.md": {"files": files.files},
    "docs/benchmarks.md": {
        "alternatives": alternatives.tables,
        "processes": benchmarks.processes,
        "processes-avx2": benchmarks.processes_avx2,
        "small-maps": benchmarks.small_maps,
        "traffic": benchmarks.traffic,
        "any-layer": benchmarks.any_layer,
        "choices": benchmarks.choices,
    },
    "docs/derivation.md": {"ledger": derivation.ledger, "gradients": derivation.gradients},
    "docs/gpu.md": {"time-model": time_model.time_model},
    "docs/interop.md": {"matrix": outcomes.matrix, "compile": interop.compile_time},
    "docs/kernels.md": {"kernels": kernels.kernels, "host-time": kernels.host_time},
    "docs/memory.md": {
        "plan": memory.deepest,
        "planned": memory.planned,
        "edge": memory.edge,
        "fits": memory.batches,
        "fit": fit.tables,
        "estimated": memory.estimated,
        "estimated-edge": memory.estimated_edge,
    },
    "docs/use-with.md": {"structures": outcomes.structures},
    "docs/training.md": {
        "steps": training.fashion_steps,
        "experiment": experiment.recipe,
        "experiment-depth": experiment.depth,
    },
}
"""Generated blocks inside pages that are written by hand."""

PAGES: dict[str, Callable[[], str]] = {
    "docs/results/growth.md": growth.page,
    "docs/results/inference.md": inference.page,
    "docs/results/steps.md": steps.page,
    "docs/results/steps_avx2.md": steps.page_avx2,
}
"""Pages that are generated as a whole."""

PICTURES: dict[str, Callable[[Path], None]] = {
    "docs/results/alternatives.png": alternatives.picture,
    "docs/results/experiment.png": experiment.picture,
    "docs/results/growth.png": growth.picture,
    "docs/results/fit.png": fit.picture,
    "docs/results/memory-against-depth.png": steps.depth_picture,
    "docs/results/memory-plan.png": memory.plan_picture,
    "docs/results/memory-fits.png": memory.fits_picture,
    "docs/results/memory-timeline.png": memory.step_picture,
}


def pages() -> Iterator[tuple[str, str]]:
    """Path and text of every page as it should be."""
    for path, make in PAGES.items():
        with suppress(FileNotFoundError):
            yield path, make() + "\n"
    for path, blocks in BLOCKS.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        for name, make in blocks.items():
            with suppress(FileNotFoundError):
                text = with_block(text, name, make())
        yield path, text


def main() -> None:
    for path, text in pages():
        (ROOT / path).write_text(text, encoding="utf-8")
    for path, draw in PICTURES.items():
        with suppress(FileNotFoundError):
            draw(ROOT / path)
    print("\n".join(stale()) or "all results are of the code as it is", file=sys.stderr)


if __name__ == "__main__":
    main()
