"""Train at the edge of a metered budget: the planned size fits, one size up does not.

    python -m scripts.edge_of_budget                                # deepest networks in 128 MiB
    python -m scripts.edge_of_budget --budget 2GiB --batch-size 64 --modes naive checkpointed

For each mode the deepest DenseNet-BC (k=12, 32x32) is planned; then one real step of it runs within
the budget, and one of the next deeper network, which must run out of it. Exit status 1 if not so.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from efficient_densenet import plan
from efficient_densenet.budget import enforce
from efficient_densenet.config import AUTOCAST, format_size, make_optimizer, parse_size
from efficient_densenet.planner import MODES, Work

CPU = torch.device("cpu")


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
    peak = step_within(Work("cifar-bc", 32, depth=fit.largest, **sizes), mode, budget, CPU)
    seconds = time.perf_counter() - start
    above = step_within(Work("cifar-bc", 32, depth=fit.next, **sizes), mode, budget, CPU)
    told = "does not fit" if peak is None else f"fits with {format_size(peak)}"
    print(
        f"{mode:12}  depth {fit.largest:4} {told} (planned {format_size(fit.peak)}), "
        f"step and set-up {seconds:.0f} s; depth {fit.next:4} "
        f"{'runs out of memory' if above is None else f'fits with {format_size(above)}'} "
        f"(planned {format_size(fit.next_peak or 0)})",
        flush=True,
    )
    return peak is not None and above is None


def step_within(work: Work, mode: str, budget: int, device: torch.device) -> int | None:
    """Peak bytes of two training steps held to ``budget``, ``None`` if they run out of it.

    On CUDA all that the process has reserved counts: call it where nothing else lives there.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        return _peak(work, mode, budget, device)
    except torch.OutOfMemoryError:
        return None


def _peak(work: Work, mode: str, budget: int, device: torch.device) -> int:
    # cuDNN would copy contiguous maps, and the plan knows nothing of that.
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    with device:
        network = work.build(mode).to(memory_format=layout)
        images = torch.randn(work.batch_size, work.channels, work.image_size, work.image_size)
        labels = torch.arange(work.batch_size) % work.classes
    images = images.to(memory_format=layout)
    optimizer = make_optimizer(network.parameters(), lr=0.1)
    dtype = AUTOCAST.get(work.precision)
    resident = [*network.parameters(), *network.buffers(), images, labels]
    with enforce(budget, device, resident) as meter:
        for _ in range(2):  # the second with the optimizer's state in place
            with torch.autocast(device.type, dtype) if dtype else nullcontext():
                loss = F.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated() if meter is None else meter.peak


if __name__ == "__main__":
    sys.exit(main())
