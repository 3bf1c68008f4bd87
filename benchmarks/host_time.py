"""CPU time of a forward pass whose maps are tiny: what Python and small operators take.

    python -m benchmarks.host_time
    python -m benchmarks.host_time --against FOLDER    # beside another checkout, interleaved

Prints milliseconds of a training forward pass of DenseNet-121 (batch 2 at 32x32, one thread): the
median of several processes and their range.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
PROCESSES, REPEATS = 7, 25

# In a process of its own, so that it can import the package of another checkout.
PROGRAMME = """
import statistics, sys, time, torch
torch.set_num_threads(1)
from efficient_densenet import densenet121
model, x, times = densenet121(num_classes=10), torch.randn(2, 3, 32, 32), []
for _ in range(int(sys.argv[1])):
    start = time.process_time()
    y = model(x)
    times.append(time.process_time() - start)
    y.sum().backward()
print(1e3 * statistics.median(times))
"""


def forward_milliseconds(checkout: Path) -> float:
    """The median of one process that imports the package in ``checkout``."""
    command = [sys.executable, "-c", PROGRAMME, str(REPEATS)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=checkout, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout")
    checkouts = {"this": ROOT}
    other = parser.parse_args(argv).against
    if other is not None:
        checkouts["the other"] = other.resolve()
    times: dict[str, list[float]] = {name: [] for name in checkouts}
    for _ in range(PROCESSES):
        for name, checkout in checkouts.items():
            times[name].append(forward_milliseconds(checkout))
    for name, found in times.items():
        print(f"{name}: {median(found):.1f} ms ({min(found):.1f} to {max(found):.1f})")
    if other is not None:
        pairs = zip(times["this"], times["the other"], strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        print(f"this / the other: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
