"""The search finds the edge, from few peaks."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from efficient_densenet.memory.plan import find_largest


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=300),
    st.integers(0, 100_000),
    st.integers(1, 5),
)
def test_the_search_ends_at_the_edge(rises: list[int], budget: int, smallest: int) -> None:
    most = smallest + len(rises) - 1
    peaks = {smallest + i: sum(rises[: i + 1]) for i in range(len(rises))}
    fit = find_largest(peaks.__getitem__, budget, range(smallest, most + 1))
    edge = max((n for n, peak in peaks.items() if peak <= budget), default=0)
    above = edge + 1 if edge else smallest
    assert (fit.largest, fit.peak) == (edge, peaks.get(edge, 0))
    assert (fit.next, fit.next_peak) == ((None, None) if edge == most else (above, peaks[above]))
    assert fit.peaks == {n: peaks[n] for n in sorted(fit.peaks)}


@pytest.mark.parametrize(
    ("peak", "budget", "looks"),
    [
        (lambda n: 1000 + 7 * n, 1000 + 7 * 900, 8),
        (lambda n: 1000 + 7 * n + max(0, n - 100) * 5, 9000, 9),
        (lambda n: 50 * n * n + 300 * n + 9000, 2_000_000, 10),
    ],
    ids=["affine", "piecewise affine", "quadratic"],
)
def test_a_search_looks_at_few_sizes(peak, budget: int, looks: int) -> None:
    fit = find_largest(peak, budget, range(2, 2**20 + 1))
    assert peak(fit.largest) <= budget < peak(fit.largest + 1)
    assert len(fit.peaks) <= looks


def test_a_search_steps_as_its_sizes_do() -> None:
    fit = find_largest(lambda size: 10 * size, 1000, range(32, 1025, 32))
    assert (fit.largest, fit.next) == (96, 128)


def test_a_search_ends_even_if_everything_fits() -> None:
    fit = find_largest(lambda n: 1, 10, range(2, 1001))
    assert (fit.largest, fit.next) == (1000, None)
