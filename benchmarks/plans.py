"""What fits 2 GiB and what fits common GPUs, planned from shapes, and one step as it was measured.

    python -m benchmarks.plans    # into docs/results/plans.json; some minutes on one core

``deepest`` is the plan of the deepest networks in 2 GiB, ``batches`` those of the largest batches
of DenseNet-121; ``step`` is the memory of one real step of DenseNet-BC-100 on this CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from benchmarks.planned_peaks import measured
from benchmarks.provenance import publish
from efficient_densenet import plan
from efficient_densenet.memory.events import Event
from efficient_densenet.memory.report import StepReport
from efficient_densenet.training.work import COMPETITORS, Work

DEEP = Work("cifar-bc", 32, 64, 100, 12)
BUDGET, BATCH = "2GiB", 64
BUDGETS = ("4GB", "8GB", "12GB", "24GB", "80GB")
NETWORK = {"model": "densenet121", "image_size": 224, "num_classes": 1000, "device": "cuda"}


def step_of(report: StepReport) -> dict[str, Any]:
    """A report for JSON, with the size of every birth and death, phase by phase."""
    return {**report.to_dict(), "events": _sizes(report.events)}


def _sizes(events: Sequence[Event]) -> dict[str, list[int]]:
    phases = groupby(events, key=lambda event: event.phase)
    return {phase: [event.size for event in inside] for phase, inside in phases}


def main() -> None:
    publish(
        "plans",
        {
            "deepest": asdict(plan(BUDGET, batch_size=BATCH, device="cpu")),
            "batches": [asdict(plan(budget, **NETWORK)) for budget in BUDGETS],
            "step": {
                "work": asdict(DEEP),
                "modes": {mode: step_of(measured(DEEP, mode)) for mode in COMPETITORS},
            },
        },
    )


if __name__ == "__main__":
    main()
