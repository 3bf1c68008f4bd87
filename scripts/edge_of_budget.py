"""Train at the edge of a metered budget: the planned size fits, one size up does not.

    python scripts/edge_of_budget.py                                # deepest networks in 128 MiB
    python scripts/edge_of_budget.py --budget 2GiB --batch-size 64 --modes naive checkpointed

For each mode the deepest DenseNet-BC (k=12, 32x32) is planned; then one real step of it runs within
the budget, and one of the next deeper network, which must run out of it. Exit status 1 if not so.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
import torch.nn.functional as F

from efficient_densenet import plan
from efficient_densenet.budget import BudgetExceeded, enforce
from efficient_densenet.config import format_size, make_optimizer, parse_size
from efficient_densenet.planner import MODES, Work


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default="128MiB")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--growth-rate", type=int, default=12)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    args = parser.parse_args()
    budget = parse_size(args.budget, "budget")
    print(
        f"{format_size(budget)}, batch {args.batch_size}, 32x32, k={args.growth_rate}, float32, "
        f"SGD with momentum, torch {torch.__version__}, CPU, {torch.get_num_threads()} threads"
    )
    sizes = {"batch_size": args.batch_size, "growth_rate": args.growth_rate}
    right = [edge(mode, budget, sizes) for mode in args.modes]
    return 0 if all(right) else 1


def edge(mode: str, budget: int, sizes: dict[str, int]) -> bool:
    """Whether the plan's edge is the real one; prints both."""
    fit = plan(budget, device="cpu", modes=[mode], **sizes)[mode]
    start = time.perf_counter()
    peak = step(Work("cifar-bc", 32, depth=fit.largest, **sizes), mode, budget)
    seconds = time.perf_counter() - start
    above = step(Work("cifar-bc", 32, depth=fit.next, **sizes), mode, budget)
    told = "does not fit" if peak is None else f"fits with {format_size(peak)}"
    print(
        f"{mode:12}  depth {fit.largest:4} {told} (planned {format_size(fit.peak)}), "
        f"step and set-up {seconds:.0f} s; depth {fit.next:4} "
        f"{'runs out of memory' if above is None else f'fits with {format_size(above)}'} "
        f"(planned {format_size(fit.next_peak or 0)})",
        flush=True,
    )
    return peak is not None and above is None


def step(work: Work, mode: str, budget: int) -> int | None:
    """Peak bytes of two training steps, ``None`` if they pass the budget."""
    network = work.build(mode)
    optimizer = make_optimizer(network.parameters(), lr=0.1)
    images = torch.randn(work.batch_size, work.channels, work.image_size, work.image_size)
    labels = torch.arange(work.batch_size) % work.classes
    resident = [*network.parameters(), *network.buffers(), images, labels]
    try:
        with enforce(budget, images.device, resident) as meter:
            for _ in range(2):  # the second with the optimizer's state in place
                F.cross_entropy(network(images), labels).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    except BudgetExceeded:
        return None
    assert meter is not None
    return meter.peak


if __name__ == "__main__":
    sys.exit(main())
