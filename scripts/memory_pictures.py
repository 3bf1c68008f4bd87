"""Draw what lives during one step, what fits 2 GiB and what fits common GPUs, for docs/memory.md.

    python -m scripts.memory_pictures            # every picture and table
    python -m scripts.memory_pictures step       # one of step, plan, fits

Pictures go into docs/results/, tables into docs/memory.md. The step is measured on this CPU, what
fits is estimated from shapes. Some minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

import torch

from benchmarks.provenance import commit, cpu
from efficient_densenet import plan
from efficient_densenet.memory.sizes import format_size
from efficient_densenet.training import pictures
from efficient_densenet.training.plan import Plan
from efficient_densenet.training.work import COMPETITORS, Work
from scripts import marked, planned_peaks

DOCUMENT = Path(__file__).parent.parent / "docs" / "memory.md"
FOLDER = DOCUMENT.parent / "results"
DEEP = Work("cifar-bc", 32, 64, 100, 12)
BUDGETS = ("4GB", "8GB", "12GB", "24GB", "80GB")
COMMIT = commit()  # before a picture is written, which changes the checkout


def step() -> None:
    """The timeline of one step, measured."""
    reports = {mode: planned_peaks.measured(DEEP, mode) for mode in COMPETITORS}
    pictures.timeline(
        reports,
        f"One step of DenseNet-BC-100 (k=12), batch {DEEP.batch_size}, 32x32, float32, SGD with "
        f"momentum, measured on {cpu()}, torch {torch.__version__}",
        FOLDER / "memory-timeline.png",
    )


def two_gib() -> None:
    """The deepest networks in 2 GiB, as the command plans them."""
    made = plan("2GiB", batch_size=64, device="cpu")
    pictures.plan_chart(made, FOLDER / "memory-plan.png")
    marked.write(DOCUMENT, "plan", plan_table(made))


def plan_table(made: Plan) -> str:
    """What the command prints, as Markdown."""
    rows = (
        (mode, fit.largest, format_size(fit.peak), fit.next, format_size(fit.next_peak or 0))
        for mode, fit in made.fits.items()
    )
    return _table(("mode", f"largest {made.varies}", "peak", "one size up", "its peak"), rows)


def gpus() -> None:
    """The largest batches of DenseNet-121 on common GPUs."""
    plans = [
        plan(budget, model="densenet121", image_size=224, num_classes=1000, device="cuda")
        for budget in BUDGETS
    ]
    pictures.fits_chart(plans, FOLDER / "memory-fits.png")
    rows = (
        (f"{made.budget / 1e9:.0f} GB", *(fit.largest or "none" for fit in made.fits.values()))
        for made in plans
    )
    marked.write(DOCUMENT, "fits", _table(("budget", *COMPETITORS), rows))


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(
        [
            *("| " + " | ".join(map(str, cells)) + " |" for cells in lines),
            "",
            f"Estimated by `python -m scripts.memory_pictures` with torch {torch.__version__}, "
            f"commit {COMMIT}, {date.today().isoformat()}.",
        ]
    )


PARTS = {"step": step, "plan": two_gib, "fits": gpus}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all unless named"
    )
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"a part is one of {', '.join(PARTS)}, got {unknown[0]!r}")
    for part in parts:
        PARTS[part]()


if __name__ == "__main__":
    main()
