"""How long ``torch.compile`` takes for DenseNet-121, naive and efficient.

    python -m scripts.compile_time            # print the table; takes minutes
    python -m scripts.compile_time --write    # put it into docs/interop.md

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
from datetime import date
from pathlib import Path

import torch

from benchmarks.provenance import cpu
from efficient_densenet import densenet121
from scripts import marked

DOCUMENT = Path(__file__).parent.parent / "docs" / "interop.md"
MODES = {
    "naive": "none",
    '`recompute="norm"`': "norm",
    '`recompute="bottleneck"`': "bottleneck",
}
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
        [sys.executable, "-m", "scripts.compile_time", "--only", recompute],
        env=os.environ | ONE_PROCESS_WITHOUT_CACHES,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    first, later = map(float, answer.stdout.split())
    return first, later


def markdown() -> str:
    rows = []
    for name, mode in MODES.items():
        first, later = apart(mode)
        rows.append(f"| {name} | {first:.0f} | {later * 1e3:.0f} |")
    return "\n".join(
        [
            f"CPU time of DenseNet-121, batch {BATCH}, {SIZE}², by Inductor without caches.",
            "",
            f"| | first step, s | a later step (the least of {REPEATS}), ms |",
            "|---|---:|---:|",
            *rows,
            "",
            "Made by `python -m scripts.compile_time --write` "
            f"({cpu()}, one thread, torch {torch.__version__.split('+')[0]}, "
            f"{date.today().isoformat()}).",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into docs/{DOCUMENT.name}")
    parser.add_argument("--only", choices=MODES.values(), help="print the seconds of this mode")
    options = parser.parse_args()
    if options.only:
        print(*seconds(options.only))
    elif options.write:
        marked.write(DOCUMENT, "compile", markdown())
    else:
        print(markdown())


if __name__ == "__main__":
    main()
