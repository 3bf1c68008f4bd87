"""Curves of memory and time, with ``--full`` alone."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import folder_of
from benchmarks.curves import CURVES, Curve
from benchmarks.provenance import publish


@pytest.mark.parametrize("curve", CURVES, ids=str)
def test_curve(benchmark: BenchmarkFixture, curve: Curve, pytestconfig: pytest.Config) -> None:
    found = benchmark.pedantic(curve.found, rounds=1)
    publish(curve.file, found, folder_of(pytestconfig))
