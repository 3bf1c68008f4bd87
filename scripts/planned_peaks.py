"""Planned peaks beside measured ones: eleven networks on this CPU, in every mode.

    python -m scripts.planned_peaks            # print the table; minutes on two cores
    python -m scripts.planned_peaks --write    # put it into docs/memory.md

Exit status 1 if a plan is out of its bounds: 3% above what was measured, 1% below.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks.provenance import provenance
from efficient_densenet.memory.report import StepReport
from efficient_densenet.memory.step import measure
from efficient_densenet.training.config import make_optimizer
from efficient_densenet.training.work import COMPETITORS, Work
from scripts import marked

DOCUMENT = Path(__file__).parent.parent / "docs" / "memory.md"
BOUNDS = (0.99, 1.03)
MIB = 2**20

NETWORKS = (
    Work("cifar-bc", 32, 16, 40, 12),
    Work("cifar-bc", 32, 8, 100, 12),
    Work("cifar-bc", 32, 2, 100, 24),
    Work("cifar-bc", 32, 8, 16, 48),
    Work("cifar-bc", 32, 4, 10, 64),
    Work("fashion", 96, 16, in_channels=1),
    Work("densenet121", 128, 4, num_classes=1000),
    Work("densenet161", 64, 4, num_classes=1000),
    Work("densenet169", 64, 8, num_classes=1000),
    Work("densenet201", 64, 4, num_classes=1000),
    Work("densenet264", 64, 4, num_classes=1000),
)


def measured(work: Work, mode: str) -> StepReport:
    """A real training step on the CPU, by the allocator's account."""
    images = torch.randn(work.batch_size, work.in_channels, work.image_size, work.image_size)
    target = torch.arange(work.batch_size) % work.num_classes
    return measure(
        work.build(mode),
        images,
        target=target,
        make_optimizer=partial(make_optimizer, lr=0.1),
    )


def ratio(work: Work, mode: str) -> tuple[int, float]:
    """The measured peak, and the planned one in units of it."""
    truth = measured(work, mode).peak.total
    return truth, work.estimate(mode, "cpu").peak.total / truth


def markdown(found: Mapping[Work, Mapping[str, tuple[int, float]]]) -> str:
    every = [ratio for by_mode in found.values() for _, ratio in by_mode.values()]
    conditions = provenance()
    return "\n".join(
        [
            "| network | batch | images | " + " | ".join(COMPETITORS) + " |",
            "|---|---:|---:|" + "---:|" * len(COMPETITORS),
            *(_row(work, by_mode) for work, by_mode in found.items()),
            "",
            f"Measured peak in MiB, and in brackets planned / measured: between {min(every):.3f} "
            f"and {max(every):.3f}.",
            "",
            "Made by `python -m scripts.planned_peaks --write`: "
            + ", ".join(conditions[name] for name in ("device", "torch", "commit", "date"))
            + f", threads: {conditions['threads']}.",
        ]
    )


def _row(work: Work, by_mode: Mapping[str, tuple[int, float]]) -> str:
    name = work.model if work.depth is None else f"{work.model}-{work.depth}, k={work.growth_rate}"
    cells = (f"{truth / MIB:,.1f} ({ratio:.3f})" for truth, ratio in by_mode.values())
    size = f"{work.image_size}²×{work.in_channels}"
    return f"| {name} | {work.batch_size} | {size} | " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into docs/{DOCUMENT.name}")
    write = parser.parse_args().write
    found = {work: {mode: ratio(work, mode) for mode in COMPETITORS} for work in NETWORKS}
    table = markdown(found)
    if write:
        marked.write(DOCUMENT, "planned", table)
    else:
        print(table)
    low, high = BOUNDS
    right = all(low <= r <= high for by_mode in found.values() for _, r in by_mode.values())
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
