"""Train at the edge of a metered budget: the planned size fits, one size up does not.

    python -m benchmarks.edge_of_budget    # into docs/results/edge_of_budget.json

For each mode the deepest DenseNet-BC (k=12, 32x32) in 2 GiB is planned; then one real step of it
runs within the budget, and one of the next deeper network, which must run out of it. Exit status 1
if not so. It takes the better part of an hour on a CPU.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks.provenance import publish
from efficient_densenet import plan
from efficient_densenet.memory.batch import Batch
from efficient_densenet.memory.running import RunningStep
from efficient_densenet.memory.sizes import parse_size
from efficient_densenet.training.config import AUTOCAST, make_optimizer
from efficient_densenet.training.work import COMPETITORS, Work

CPU = torch.device("cpu")
BUDGET = "2GiB"
SIZES = {"batch_size": 64, "growth_rate": 12}


@dataclass(frozen=True)
class Edge:
    """The deepest network that is planned to fit in a mode, and the next deeper one.

    Peaks are in bytes, as planned and as the meter found them in a real step: ``None`` if the step
    ran out of the budget. ``seconds`` are those of building the deepest network and of its step.
    """

    mode: str
    deepest: int
    planned: int
    peak: int | None
    seconds: float
    next: int
    next_planned: int
    next_peak: int | None

    @property
    def as_planned(self) -> bool:
        return self.peak is not None and self.next_peak is None


def main() -> int:
    budget = parse_size(BUDGET)
    edges = []
    for mode in COMPETITORS:
        edges.append(edge(mode, budget, SIZES))
        print(edges[-1], flush=True)
    publish("edge_of_budget", {"budget": budget, **SIZES, "edges": [asdict(e) for e in edges]})
    return 0 if all(found.as_planned for found in edges) else 1


def edge(mode: str, budget: int, sizes: dict[str, int]) -> Edge:
    """The plan's edge, and what real steps on both its sides took."""
    fit = plan(budget, device="cpu", modes=[mode], **sizes)[mode]
    start = time.perf_counter()
    peak = step_within(Work("cifar-bc", 32, depth=fit.largest, **sizes), mode, budget, CPU)
    seconds = time.perf_counter() - start
    above = step_within(Work("cifar-bc", 32, depth=fit.next, **sizes), mode, budget, CPU)
    assert fit.next is not None and fit.next_peak is not None  # no search of depths ends before
    return Edge(mode, fit.largest, fit.peak, peak, seconds, fit.next, fit.next_peak, above)


def step_within(work: Work, mode: str, budget: int, device: torch.device) -> int | None:
    """Peak bytes of a training step held to ``budget``, ``None`` if it runs out of it."""
    # cuDNN would copy contiguous maps, and the plan knows nothing of that.
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    with device:
        network = work.build(mode).to(memory_format=layout)
        images = torch.randn(work.batch_size, work.in_channels, work.image_size, work.image_size)
        labels = torch.arange(work.batch_size) % work.num_classes
    batch = Batch((images.to(memory_format=layout),), labels, labels)
    step = RunningStep(network, batch, None, AUTOCAST.get(work.precision))
    return step.run_within(budget, partial(make_optimizer, lr=0.1))


if __name__ == "__main__":
    sys.exit(main())
