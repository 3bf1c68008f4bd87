"""The curves of cost against size: exponents, tables and the chart, from made-up samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import growth
from benchmarks.cases import FLOOR, NAIVE, Competitor
from benchmarks.growth import AXES, Sample, exponent, exponents, markdown, write
from benchmarks.instruments import Row

NORM = str(Competitor("norm"))


@pytest.fixture
def made_up() -> list[Sample]:
    """Memory of naive grows as the square of everything, ours in proportion."""
    return [
        Sample(axis, value, competitor, kept=value**power, peak=3 * value**power, seconds=value)
        for axis, values in AXES.items()
        for value in values
        for competitor, power in ((str(NAIVE), 2), (NORM, 1), (str(FLOOR), 1))
    ]


def test_exponent_of_power_law() -> None:
    values = (12, 24, 96)
    assert exponent(values, [5 * v**1.5 for v in values]) == pytest.approx(1.5)


def test_exponents_of_each_measure(made_up: list[Sample]) -> None:
    assert exponents(made_up, "layers", str(NAIVE)) == pytest.approx(
        {"kept": 2, "peak": 2, "seconds": 1}
    )
    assert exponents(made_up, "layers", str(FLOOR)) == pytest.approx({"seconds": 1})


def test_report_has_every_competitor_and_conditions(made_up: list[Sample], tmp_path: Path) -> None:
    write(made_up, {"device": "a made-up machine"}, tmp_path)
    text = (tmp_path / "growth.md").read_text(encoding="utf-8")
    assert text == markdown(made_up, {"device": "a made-up machine"})
    assert text.count(f"| {NORM} ") == 1 + len(AXES)
    assert "a made-up machine" in text
    assert (tmp_path / "growth.png").stat().st_size > 10_000


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
