"""CPU time that Python and small operators take: steps whose maps are tiny.

    python -m benchmarks.host_time
    python -m benchmarks.host_time --against FOLDER    # beside another checkout, and published

Of DenseNet-121, batch 2 at 32x32, on one thread: a training forward pass on a CPU, and a step by
Triton's kernels on a GPU that is not there (``benchmarks/step_on_absent_gpu.py``). Medians of
several processes, which alternate between the checkouts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.provenance import ROOT, Json, commit, publish

PROCESSES, REPEATS = 7, 25

# In a process of its own, so that it can import the package of another checkout.
FORWARD = """
import json, statistics, sys, time, torch
torch.set_num_threads(1)
from efficient_densenet import densenet121
model, x, times = densenet121(num_classes=10), torch.randn(2, 3, 32, 32), []
for _ in range(int(sys.argv[1])):
    start = time.process_time()
    y = model(x)
    times.append(time.process_time() - start)
    y.sum().backward()
print(json.dumps({"seconds": statistics.median(times)}))
"""
PROGRAMMES = {
    "forward pass on a CPU": FORWARD,
    "step on a GPU that is not there": (ROOT / "benchmarks/step_on_absent_gpu.py").read_text(),
}


def run(programme: str, checkout: Path) -> Json:
    """What one process finds that imports the package in ``checkout``."""
    command = [sys.executable, "-c", programme, str(REPEATS)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=checkout, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout")
    checkouts = {"this": ROOT}
    other = parser.parse_args(argv).against
    if other is not None:
        checkouts["the other"] = other.resolve()
    rows = []
    for name, programme in PROGRAMMES.items():
        found: dict[str, list[Json]] = {checkout: [] for checkout in checkouts}
        for _ in range(PROCESSES):
            for checkout, folder in checkouts.items():
                found[checkout].append(run(programme, folder))
        rows.append({"what": name, **found})
        for checkout, all_found in found.items():
            print(f"{name}, {checkout}: {_shown([one['seconds'] * 1e3 for one in all_found])} ms")
        if other is not None:
            pairs = zip(found["this"], found["the other"], strict=True)
            ratios = [mine["seconds"] / theirs["seconds"] for mine, theirs in pairs]
            print(f"{name}, this / the other: {_shown(ratios)}")
    if other is not None:
        publish("host_time", {"other": commit(other), "rows": rows})
    return 0


def _shown(values: Sequence[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    sys.exit(main())
