"""Which results are stale: measured before a file changed on which they depend.

Every result names the commit at which it was measured, and the table below says on which files it
depends, besides the program that measured it. If one of them has changed since, be it by a comment,
the result is called stale. To measure again is left to whoever has an idle machine.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

from benchmarks.provenance import RESULTS, ROOT
from docs.tables.markdown import results

STEP = ("functional", "kernels", "modules", "models.py")
PLANS = (*STEP, "memory", "training")
DEPENDS = {
    "alternatives": (*STEP, "convert"),
    "any_layer": STEP,
    "choices": ("kernels", "modules"),
    "compile_time": STEP,
    "depth": STEP,
    "edge_of_budget": PLANS,
    "estimates": (*PLANS, "convert"),
    "experiment_depth": (*STEP, "training"),
    "experiment_fashion": (*STEP, "training"),
    "fashion_steps": (*STEP, "training"),
    "fit": (*PLANS, "convert", "fit"),
    "gradient_types": ("functional", "kernels", "modules"),
    "growth": STEP,
    "host_time": STEP,
    "inference": (*STEP, "convert"),
    "kernels": ("kernels",),
    "ledger": (*STEP, "memory"),
    "outcomes": (*STEP, "convert"),
    "planned_peaks": PLANS,
    "plans": PLANS,
    "processes": STEP,
    "processes_avx2": STEP,
    "small_maps": STEP,
    "steps": STEP,
    "steps_avx2": STEP,
    "time_model": STEP,
    "traffic": STEP,
}
"""Files of the package and folders in it, for every file of ``docs/results``."""


def stale() -> Iterator[str]:
    """A line for each result that is stale or missing."""
    for name, depends in DEPENDS.items():
        if not (RESULTS / f"{name}.json").exists():
            yield f"missing: docs/results/{name}.json"
            continue
        commit = results(name)["conditions"]["commit"]
        paths = (f"benchmarks/{name}.py", *(f"efficient_densenet/{path}" for path in depends))
        if why := _why(commit, paths):
            yield f"stale: docs/results/{name}.json, measured at {commit}: {why}"


def _why(commit: str, paths: tuple[str, ...]) -> str | None:
    if commit.endswith("-dirty"):
        return "with changes that were not committed"
    command = ["git", "diff", "--name-only", commit, "--", *paths]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if asked.returncode:
        return "a commit that this clone does not have"
    first, *more = asked.stdout.split() or [None]
    return first and f"{first} changed" + (f", and {len(more)} other files" if more else "")
