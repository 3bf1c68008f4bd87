"""How long ``torch.compile`` takes for DenseNet-121, naive and efficient.

    python -m scripts.compile_time            # print the table; takes minutes
    python -m scripts.compile_time --write    # put it into docs/interop.md

Timed is the first training step, in which forward and backward pass are compiled by Inductor with
empty caches; beside it the same step once compiled. Each network has a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
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


def seconds(recompute: str) -> tuple[float, float]:
    """Of the first training step, compiled in one graph, and the least of those that follow."""
    model = torch.compile(densenet121(recompute=recompute), fullgraph=True)
    x = torch.randn(BATCH, 3, SIZE, SIZE)
    taken = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        model(x).sum().backward()
        taken.append(time.perf_counter() - start)
    return taken[0], min(taken[1:])


def apart(recompute: str) -> tuple[float, float]:
    """:func:`seconds` in a process of its own."""
    answer = subprocess.run(
        [sys.executable, "-m", "scripts.compile_time", "--only", recompute],
        env=os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
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
            f"DenseNet-121, batch {BATCH}, {SIZE}², float32, by Inductor with empty caches.",
            "",
            "| | first step, s | a later step, ms |",
            "|---|---:|---:|",
            *rows,
            "",
            "Made by `python -m scripts.compile_time --write` "
            f"({cpu()}, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__.split('+')[0]}, {date.today().isoformat()}).",
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
