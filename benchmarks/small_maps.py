"""Time of a step on small maps, which is spent in calls from Python more than in the maps.

    python -m benchmarks.small_maps    # into docs/results/small_maps.json; some three minutes

In channels_last, on one thread, in CPU time; otherwise as `benchmarks/processes.py`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import torch

from benchmarks import processes
from benchmarks.cases import BRIEF, DENSENET_121, NAIVE_CHANNELS_LAST, Case, block
from benchmarks.provenance import publish, with_instruction_set

STEPS = 25
CASES = (
    block("few positions", 24, 256, 32, 8, 8),
    block("few positions, narrow", 12, 24, 12, 8, 8),
    Case("DenseNet-121, batch 2, 32²", (2, 3, 32, 32), DENSENET_121),
)
COMPETITORS = tuple(dict.fromkeys(replace(c, channels_last=True) for c in BRIEF))


def times() -> processes.Times:
    """CPU seconds of a step, in this process."""
    torch.set_num_threads(1)
    return processes.times(CASES, STEPS, COMPETITORS, time.process_time)


def main() -> None:
    torch.set_num_threads(1)  # as where it is measured, for the conditions
    runs = processes.in_processes("small_maps")
    naive = {case: median(run[case][str(NAIVE_CHANNELS_LAST)] for run in runs) for case in runs[0]}
    rows = processes.ratios(runs, NAIVE_CHANNELS_LAST)
    found = {"steps": STEPS, "naive_seconds": naive, "rows": rows}
    publish(with_instruction_set("small_maps"), found)


if __name__ == "__main__":
    main()
