"""Train at the edge of a metered budget: the planned size fits, one size up does not.

    python -m scripts.edge_of_budget                                # deepest networks in 128 MiB
    python -m scripts.edge_of_budget --budget 2GiB --batch-size 64 --modes naive checkpointed
    python -m scripts.edge_of_budget --budget 2GiB --batch-size 64 --write    # into docs/memory.md

For each mode the deepest DenseNet-BC (k=12, 32x32) is planned; then one real step of it runs within
the budget, and one of the next deeper network, which must run out of it. Exit status 1 if not so.
The last of these takes the better part of an hour on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.provenance import provenance
from efficient_densenet import plan
from efficient_densenet.memory.batch import Batch
from efficient_densenet.memory.running import RunningStep
from efficient_densenet.memory.sizes import format_size, parse_size
from efficient_densenet.training.config import AUTOCAST, make_optimizer
from efficient_densenet.training.work import COMPETITORS, Work
from scripts import marked

CPU = torch.device("cpu")
DOCUMENT = Path(__file__).parent.parent / "docs" / "memory.md"
HEADER = (
    "| mode | deepest | planned | in the step | seconds | one size up | planned | in the step |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|"
)
OUT_OF_MEMORY = "out of memory"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", default="128MiB")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--growth-rate", type=int, default=12)
    parser.add_argument("--modes", nargs="+", choices=COMPETITORS, default=list(COMPETITORS))
    parser.add_argument("--write", action="store_true", help=f"into docs/{DOCUMENT.name}")
    args = parser.parse_args()
    if args.write and args.modes != list(COMPETITORS):
        parser.error("--write writes the table of all modes: leave --modes out")
    budget = parse_size(args.budget)
    conditions = provenance()
    told = ", ".join(f"{conditions[key]}" for key in ("device", "torch", "commit", "date"))
    lines = [
        f"{format_size(budget)}, batch {args.batch_size}, 32x32, k={args.growth_rate}, float32, "
        f"SGD with momentum; {told}, threads: {conditions['threads']}.\n",
        HEADER,
    ]
    print(*lines, sep="\n", flush=True)
    sizes = {"batch_size": args.batch_size, "growth_rate": args.growth_rate}
    right = True
    for mode in args.modes:
        row, as_planned = edge(mode, budget, sizes)
        print(row, flush=True)
        lines.append(row)
        right &= as_planned
    if args.write:
        marked.write(DOCUMENT, "edge", "\n".join(lines))
    return 0 if right else 1


def edge(mode: str, budget: int, sizes: dict[str, int]) -> tuple[str, bool]:
    """A row of the table, and whether the plan's edge is the real one."""
    fit = plan(budget, device="cpu", modes=[mode], **sizes)[mode]
    start = time.perf_counter()
    peak = step_within(Work("cifar-bc", 32, depth=fit.largest, **sizes), mode, budget, CPU)
    seconds = time.perf_counter() - start
    above = step_within(Work("cifar-bc", 32, depth=fit.next, **sizes), mode, budget, CPU)
    cells = (
        mode,
        str(fit.largest),
        format_size(fit.peak),
        OUT_OF_MEMORY if peak is None else format_size(peak),
        f"{seconds:.0f}",
        str(fit.next),
        format_size(fit.next_peak or 0),
        OUT_OF_MEMORY if above is None else format_size(above),
    )
    return "| " + " | ".join(cells) + " |", peak is not None and above is None


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
