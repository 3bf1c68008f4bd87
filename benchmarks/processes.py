"""How much a step's time differs from process to process: the suite's cases in several of them.

    python -m benchmarks.processes    # into docs/results/processes.json; some 12 minutes
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks.processes

Within a process competitors take turns, and the median of each is taken; processes differ more than
that, since memory lies elsewhere in each. A process has all cases.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.cases import BRIEF, CASES, NAIVE, Case, Competitor
from benchmarks.provenance import ROOT, Json, publish, with_instruction_set

PROCESSES, STEPS = 5, 5
ALONE = "import json; from benchmarks.{program} import times; print(json.dumps(times()))"

Times = dict[str, dict[str, float]]
"""Median seconds of a step, by case and competitor."""


def times(
    cases: Sequence[Case] = CASES,
    steps: int = STEPS,
    competitors: Sequence[Competitor] = BRIEF,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Those of this process, after one step of each that is not counted."""
    return {case.name: _times(case, steps, competitors, clock) for case in cases}


def _times(
    case: Case, steps: int, competitors: Sequence[Competitor], clock: Callable[[], float]
) -> dict[str, float]:
    subjects = {str(competitor): case.subject(competitor) for competitor in competitors}
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(1 + steps):
        for name, subject in subjects.items():
            start = clock()
            subject.step()
            found[name].append(clock() - start)
            subject.clear()
    return {name: median(seconds[1:]) for name, seconds in found.items()}


def in_processes(program: str) -> list[Times]:
    """What ``times()`` of ``benchmarks/PROGRAM.py`` finds in each of several processes."""
    runs = []
    for number in range(1, PROCESSES + 1):
        command = [sys.executable, "-c", ALONE.format(program=program)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"process {number} of {PROCESSES}", flush=True)
    return runs


def ratios(runs: Sequence[Times], baseline: Competitor = NAIVE) -> list[Json]:
    """For each case and competitor the time beside that of ``baseline``, in each process."""
    return [
        {
            "case": case,
            "competitor": competitor,
            "ratios": [run[case][competitor] / run[case][str(baseline)] for run in runs],
        }
        for case in runs[0]
        for competitor in runs[0][case]
        if competitor != str(baseline)
    ]


def main() -> None:
    publish(
        with_instruction_set("processes"),
        {"steps": STEPS, "rows": ratios(in_processes("processes"))},
    )


if __name__ == "__main__":
    main()
