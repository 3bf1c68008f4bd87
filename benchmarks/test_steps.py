"""Forward and backward of the competitors on every case."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import CASES, Case
from benchmarks.conftest import COMPETING, MEASURED
from benchmarks.instruments import run


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(benchmark: BenchmarkFixture, case: Case, pytestconfig: pytest.Config) -> None:
    """All competitors interleaved, each once it has been found right; who is wrong fails the test.

    pytest-benchmark records how long all of that takes: the steps' own times are in the report.
    """
    rows = benchmark.pedantic(run, (case, pytestconfig.stash[COMPETING]), rounds=1)
    pytestconfig.stash[MEASURED].append(rows)
    if failures := [f"{row.competitor}: {row.failure}" for row in rows.values() if row.failure]:
        pytest.fail("\n".join(failures), pytrace=False)
