"""Forward and backward of every competitor on every case."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import CASES, COMPETITORS, DEVICE, Case, Competitor
from benchmarks.conftest import MEASURED
from benchmarks.instruments import run, timed


@pytest.mark.parametrize("competitor", COMPETITORS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(
    benchmark: BenchmarkFixture, case: Case, competitor: Competitor, pytestconfig: pytest.Config
) -> None:
    """The case's first test runs all its competitors interleaved: the report quotes that run.

    pytest-benchmark's own table is a second look, one competitor after the other.
    """
    rows = run(case)
    pytestconfig.stash[MEASURED][case.name] = rows
    row = rows[competitor]
    if row.failure:
        pytest.fail(row.failure)
    benchmark.group = case.name
    benchmark.extra_info.update(kept_bytes=row.kept, peak_bytes=row.peak, device=DEVICE.type)
    subject = case.subject(competitor)
    benchmark.pedantic(timed, (subject,), rounds=1)
