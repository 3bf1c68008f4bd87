"""How long ``torch.compile`` takes for DenseNet-121, naive and efficient.

    python -m benchmarks.compile_time    # into docs/results/compile_time.json; takes minutes

Measured is the first training step, in which Inductor compiles forward and backward pass with empty
caches in one process and one thread: CPU time, the C++ compiler's included, since what else runs on
the machine hardly changes it. Beside it the same step once compiled. Each network has a process of
its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch

from benchmarks.provenance import publish
from efficient_densenet import densenet121
from efficient_densenet.functional.modes import MODES

BATCH, SIZE, REPEATS = 2, 64, 5
ONE_PROCESS_WITHOUT_CACHES = {
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


def seconds(recompute: str) -> tuple[float, float]:
    """CPU time of the first training step, compiled as one graph, and the least of later ones."""
    torch.set_num_threads(1)
    model = torch.compile(densenet121(recompute=recompute), fullgraph=True)
    x = torch.randn(BATCH, 3, SIZE, SIZE)
    taken = []
    for _ in range(1 + REPEATS):
        start = cpu_time()
        model(x).sum().backward()
        taken.append(cpu_time() - start)
    return taken[0], min(taken[1:])


def cpu_time() -> float:
    """Seconds of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def apart(recompute: str) -> tuple[float, float]:
    """:func:`seconds` in a process of its own."""
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_time", "--only", recompute],
        env=os.environ | ONE_PROCESS_WITHOUT_CACHES,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    first, later = map(float, answer.stdout.split())
    return first, later


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=MODES, help="print the seconds of this mode")
    only = parser.parse_args().only
    if only:
        print(*seconds(only))
        return
    torch.set_num_threads(1)  # as those that are measured, for the conditions
    found = {mode: apart(mode) for mode in MODES}
    publish("compile_time", {"batch": BATCH, "size": SIZE, "repeats": REPEATS, "seconds": found})


if __name__ == "__main__":
    main()
