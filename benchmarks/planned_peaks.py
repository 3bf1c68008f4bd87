"""Planned peaks beside measured ones: eleven networks on this CPU, in every mode.

    python -m benchmarks.planned_peaks    # into docs/results/planned_peaks.json

It takes minutes on two cores. Exit status 1 if a plan is out of its bounds: 3% above what was
measured, 1% below.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial

import torch

from benchmarks.provenance import publish
from efficient_densenet.memory.report import StepReport
from efficient_densenet.memory.step import measure
from efficient_densenet.training.config import make_optimizer
from efficient_densenet.training.work import COMPETITORS, Work

BOUNDS = (0.99, 1.03)

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
    """The measured peak in bytes, and the planned one in units of it."""
    truth = measured(work, mode).peak.total
    return truth, work.estimate(mode, "cpu").peak.total / truth


def main() -> int:
    found = [{"work": asdict(work), "peaks": _peaks(work)} for work in NETWORKS]
    publish("planned_peaks", {"networks": found})
    low, high = BOUNDS
    right = all(low <= r <= high for network in found for _, r in network["peaks"].values())
    return 0 if right else 1


def _peaks(work: Work) -> dict[str, tuple[int, float]]:
    return {mode: ratio(work, mode) for mode in COMPETITORS}


if __name__ == "__main__":
    sys.exit(main())
