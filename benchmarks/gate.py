"""The regression gate: what a step of ours takes, against the committed baseline.

    python -m benchmarks.gate                  # some minutes on two CPU cores
    python -m benchmarks.gate --only deep      # one case
    python -m benchmarks.gate --steps benchmarks/out/steps.json    # a run of the suite as it was

Exit status 1, with a line for each figure, if a step keeps or peaks at more bytes than it may, or
takes longer beside its convolutions alone in the same run; 2 if there was nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks import instruments, report
from benchmarks.cases import CASES, COMPETITORS, FLOOR
from benchmarks.provenance import RESULTS, Json, provenance

BASELINE = RESULTS / "steps.json"
KEPT, PEAK, TIME = "kept bytes", "peak bytes", "time / convolutions"
GROWTH = {KEPT: 1.02, PEAK: 1.02, TIME: 1.25}
"""What a figure may be at most, beside the baseline's. A time is the median of a few steps."""

MACHINE = ("device", "instruction set", "threads")
"""Conditions without which times do not compare, beside those of convolutions neither."""

"""What ``steps.json`` holds: ``conditions``, and ``rows`` of a case and a competitor each."""

Name = tuple[str, str]


def regressions(found: Json, baseline: Json) -> list[str]:
    """One line for each figure of ours that grew more than it may; none if all is well.

    Rows that only one of the two has are not compared, but what ran in the baseline must run. Times
    are compared if both were taken on one kind of machine.

    Raises:
        ValueError: if no row of ours that has figures in the baseline is in ``found``, or the
            convolutions alone are missing.
    """
    now, before = _ours(found), _ours(baseline)
    common = [name for name in before if name in now and before[name]["failure"] is None]
    if not common:
        raise ValueError("no step of ours is in both the run and the baseline")
    timed = same_machine(found, baseline)
    lines = []
    for name in common:
        if now[name]["failure"] is not None:
            lines.append(f"{_name(name)}: {now[name]['failure']}")
            continue
        old, new = _figures(name, baseline), _figures(name, found)
        lines += [
            f"{_name(name)}: {figure} {new[figure]:,.6g}, {new[figure] / old[figure]:.3f} times "
            f"the baseline's {old[figure]:,.6g} (at most {most:g})"
            for figure, most in GROWTH.items()
            if (timed or figure != TIME) and new[figure] > most * old[figure]
        ]
    return lines


def same_machine(found: Json, baseline: Json) -> bool:
    """Whether times of the two may be compared."""
    return all(found["conditions"].get(c) == baseline["conditions"].get(c) for c in MACHINE)


def _ours(steps: Json) -> dict[Name, Json]:
    ours = {str(competitor) for competitor in COMPETITORS if competitor.ours}
    return {name: row for name, row in _rows(steps).items() if name[1] in ours}


def _rows(steps: Json) -> dict[Name, Json]:
    return {(row["case"], row["competitor"]): row for row in steps["rows"]}


def _figures(name: Name, steps: Json) -> dict[str, float]:
    rows = _rows(steps)
    # Not beside the naive step: how many fresh pages that touches depends on what ran before it.
    row, floor = rows[name], rows.get((name[0], str(FLOOR)))
    if floor is None or not floor["seconds"]:
        raise ValueError(f"{name[0]}: there are no convolutions alone to compare times with")
    return {
        KEPT: row["kept_bytes"],
        PEAK: row["peak_bytes"],
        TIME: median(row["seconds"]) / median(floor["seconds"]),
    }


def _name(name: Name) -> str:
    case, competitor = name
    return f"{case}, {competitor}"


def run(only: str) -> Json:
    """Ours and the floor on the cases whose name contains ``only``, as ``steps.json``."""
    competitors = [c for c in COMPETITORS if c.ours]
    cases = [case for case in CASES if only in case.name]
    results = [instruments.run(case, competitors) for case in cases]
    return {"conditions": provenance(), **report.rows(results)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this in their name")
    parser.add_argument("--steps", type=Path, help="judge this steps.json instead of running")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    args = parser.parse_args(argv)
    try:
        baseline = json.loads(args.baseline.read_text(encoding="utf-8"))
        found = json.loads(args.steps.read_text(encoding="utf-8")) if args.steps else run(args.only)
        lines = regressions(found, baseline)
    except (OSError, ValueError) as error:
        print(f"benchmarks.gate: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines) or "nothing grew beyond the baseline's limits")
    if not same_machine(found, baseline):
        print("times were not compared: the baseline is of another machine")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
