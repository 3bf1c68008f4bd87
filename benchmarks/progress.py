"""How far a run of the suite is: what starts, what remains, and about how long that takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from benchmarks.cases import Case, Competitor
from benchmarks.provenance import Json, read

STEPS = 9
"""How often a case runs the step of each competitor: checked, weighed and timed."""
UNPUBLISHED = 45.0
"""Seconds of a case that no one has published."""


def published() -> list[Json]:
    """The rows of the published run."""
    return read("steps").get("rows", [])


def expected(case: Case, competitors: Sequence[Competitor], rows: Sequence[Json]) -> float:
    """Seconds of the case on the machine of those published ``rows``."""
    by_name = {r["competitor"]: r for r in rows if r["case"] == case.name and r["seconds"]}
    own = [(c, by_name[str(c)]) for c in competitors if str(c) in by_name]
    if not own:
        return UNPUBLISHED
    steps = STEPS * sum(median(row["seconds"]) for _, row in own)
    return steps + sum(row["first_step_seconds"] for c, row in own if c.compiled)


class Progress:
    """Tells, as each part starts, how many there are and about how long all that is left takes.

    Args:
        expected: seconds of every part, in order, on another machine: what is done already shows
            how fast this one is.
        clock: that of this machine.
    """

    def __init__(
        self, expected: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._left, self._all, self._clock = dict(expected), dict(expected), clock
        self._running: str | None = None
        self._start = clock()

    def start(self, part: str) -> str:
        """A line that says so."""
        self._left.pop(self._running or "", None)
        self._running = part
        left = sum(self._left.values())
        done = sum(self._all.values()) - left
        pace = (self._clock() - self._start) / done if done else 1.0
        number = len(self._all) - len(self._left) + 1
        return f"[{number}/{len(self._all)}] {part}: about {duration(pace * left)} left"


def duration(seconds: float) -> str:
    """In seconds or minutes, as one would say it."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
