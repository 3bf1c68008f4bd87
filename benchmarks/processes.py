"""How much a step's time differs from process to process: the suite's cases in several of them.

    python -m benchmarks.processes    # into docs/results/processes.json; some 12 minutes

Within a process competitors take turns, and the median of each is taken; processes differ more than
that, since memory lies elsewhere in each. A process has all cases.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median

from benchmarks.cases import BRIEF, CASES, NAIVE, Case
from benchmarks.provenance import ROOT, Json, publish

PROCESSES, STEPS = 5, 5
ALONE = "import json; from benchmarks.processes import times; print(json.dumps(times()))"


def times(cases: Sequence[Case] = CASES, steps: int = STEPS) -> dict[str, dict[str, float]]:
    """Median seconds of a step by case and competitor, after one that is not counted."""
    return {case.name: _times(case, steps) for case in cases}


def _times(case: Case, steps: int) -> dict[str, float]:
    subjects = {str(competitor): case.subject(competitor) for competitor in BRIEF}
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(1 + steps):
        for name, subject in subjects.items():
            start = time.perf_counter()
            subject.step()
            found[name].append(time.perf_counter() - start)
            subject.clear()
    return {name: median(seconds[1:]) for name, seconds in found.items()}


def ratios(runs: Sequence[dict[str, dict[str, float]]]) -> list[Json]:
    """For each case and competitor the time beside the naive step's, in each process."""
    return [
        {
            "case": case,
            "competitor": competitor,
            "ratios": [run[case][competitor] / run[case][str(NAIVE)] for run in runs],
        }
        for case in runs[0]
        for competitor in runs[0][case]
        if competitor != str(NAIVE)
    ]


def main() -> None:
    runs = []
    for number in range(1, PROCESSES + 1):
        command = [sys.executable, "-c", ALONE]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"process {number} of {PROCESSES}", flush=True)
    publish("processes", {"steps": STEPS, "rows": ratios(runs)})


if __name__ == "__main__":
    main()
