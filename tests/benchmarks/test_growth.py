"""Cost against size is measured on every axis, and not at all if a competitor is wrong."""

from __future__ import annotations

import pytest

from benchmarks import growth
from benchmarks.cases import NAIVE, Competitor
from benchmarks.growth import Sample
from benchmarks.instruments import Row

NORM = str(Competitor("norm"))


def test_competitor_that_is_wrong_stops_report() -> None:
    row = Row("case", Competitor("norm"), failure="wrong: output")
    with pytest.raises(RuntimeError, match="norm at layers 12: wrong: output"):
        Sample.of("layers", 12, row)


def test_small_block_is_measured_on_every_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "AXES", {"batch": (2, 4)})
    monkeypatch.setattr(growth, "COMPETITORS", (NAIVE, Competitor("norm")))
    monkeypatch.setattr(growth.Point.__new__, "__defaults__", (2, 8, 4, 2, 4))
    found = growth.samples()
    assert [(s.value, s.competitor) for s in found if s.competitor == NORM] == [
        (2, NORM),
        (4, NORM),
    ]
    assert all(s.seconds > 0 for s in found)
