"""What a run of the suite says of itself while it runs, with made-up times and clock."""

from __future__ import annotations

import pytest

from benchmarks.cases import CASES, COMPETITORS, NAIVE, NAIVE_COMPILED
from benchmarks.progress import STEPS, UNPUBLISHED, Progress, duration, expected, published

CASE = CASES[0]


def row(competitor: object, median: float, first: float = 0.0, case: str = CASE.name) -> dict:
    return {
        "case": case,
        "competitor": str(competitor),
        "seconds": [median / 2, median, 9 * median],
        "first_step_seconds": first,
    }


def test_time_left_follows_pace_of_this_machine() -> None:
    now = 1000.0
    progress = Progress({"one": 10, "two": 20, "three": 30}, lambda: now)
    assert progress.start("one") == "[1/3] one: about 60 s left"
    now += 30  # three times as long as expected
    assert progress.start("two") == "[2/3] two: about 2 min left"
    now += 20  # as long as expected: 50 s for 30
    assert progress.start("three") == "[3/3] three: about 50 s left"


def test_expected_time_counts_steps_of_who_takes_part_and_compilation() -> None:
    rows = [row(NAIVE, 2), row(NAIVE_COMPILED, 1, first=80), row(NAIVE, 50, case="another")]
    assert expected(CASE, [NAIVE], rows) == STEPS * 2
    assert expected(CASE, [NAIVE, NAIVE_COMPILED], rows) == STEPS * 3 + 80
    assert expected(CASE, [NAIVE], []) == UNPUBLISHED


def test_published_run_has_every_case() -> None:
    for case in CASES:
        assert expected(case, COMPETITORS, published()) != UNPUBLISHED


@pytest.mark.parametrize(("seconds", "said"), [(8.4, "8 s"), (89, "89 s"), (90, "2 min")])
def test_duration_is_said_as_one_would(seconds: float, said: str) -> None:
    assert duration(seconds) == said
