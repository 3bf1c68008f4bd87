"""The curves of cost against size: exponents and tables, from made-up samples."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from benchmarks.cases import FLOOR, NAIVE, Competitor
from benchmarks.growth import AXES, Sample
from docs.tables.growth import exponent, exponents, page_of

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


def test_page_has_every_competitor_and_conditions(made_up: list[Sample]) -> None:
    conditions = {"device": "a machine", "threads": "1", "torch": "3", "commit": "c", "date": "d"}
    found = {"base": {"layers": 2}, "conditions": conditions, "samples": map(asdict, made_up)}
    text = page_of(found)
    assert text.count(f"| {NORM} ") == 1 + len(AXES)
    assert "(layers 2)" in text and "a machine" in text
