"""What time ours should take at most, beside what it takes, and what the time is spent on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.cases import FLOOR, NAIVE, NAIVE_CHANNELS_LAST, NAIVE_COMPILED, Competitor
from benchmarks.instruments import Rows

NORM, NORM_CHANNELS_LAST = Competitor("norm"), Competitor("norm", channels_last=True)
BOTTLENECK = Competitor("bottleneck")


class Goal(NamedTuple):
    """``ours`` should take at most ``ratio`` times as long as ``other``."""

    name: str
    ours: Competitor
    other: Competitor
    ratio: float


GOALS = (
    Goal("norm / naive", NORM, NAIVE, 0.60),
    Goal("norm / naive, both channels_last", NORM_CHANNELS_LAST, NAIVE_CHANNELS_LAST, 0.75),
    Goal("norm / naive compiled", NORM, NAIVE_COMPILED, 0.85),
    Goal("bottleneck / norm", BOTTLENECK, NORM, 1.12),
)
HEADER = (
    "case",
    *(f"{goal.name} (goal {goal.ratio:.2f})" for goal in GOALS),
    "convolutions alone / naive",
    "norm beyond them, ms",
    "share of norm",
)


def table(results: Sequence[Rows]) -> list[tuple[str, ...]]:
    """Header and a row for each case: a ratio that misses its goal is in bold.

    Beyond its convolutions a step normalises, rectifies, sums and copies.
    """
    return [HEADER, *(_row(rows) for rows in results)]


def _row(rows: Rows) -> tuple[str, ...]:
    name = next(iter(rows.values())).case
    beyond = share = ""
    if _timed(rows, NORM, FLOOR):
        left = rows[NORM].median - rows[FLOOR].median
        beyond, share = f"{left * 1e3:.0f}", f"{left / rows[NORM].median:.0%}"
    return name, *(_cell(rows, goal) for goal in GOALS), _floor(rows), beyond, share


def _cell(rows: Rows, goal: Goal) -> str:
    if not _timed(rows, goal.ours, goal.other):
        return ""
    ratio = f"{rows[goal.ours].median / rows[goal.other].median:.2f}"
    return ratio if float(ratio) <= goal.ratio else f"**{ratio}**"


def _floor(rows: Rows) -> str:
    if not _timed(rows, FLOOR, NAIVE):
        return ""
    return f"{rows[FLOOR].median / rows[NAIVE].median:.2f}"


def _timed(rows: Rows, *competitors: Competitor) -> bool:
    return all(c in rows and rows[c].seconds for c in competitors)
