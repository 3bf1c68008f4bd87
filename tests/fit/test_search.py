"""The search finds what trying everything finds, from where the parts of a step lie."""

from __future__ import annotations

from itertools import product

import hypothesis.strategies as st
from hypothesis import given

from efficient_densenet.fit.search import Chain, Choice, Part
from efficient_densenet.fit.timeline import Passes, Span, Timeline, find_passes

SIZES = st.integers(0, 40)


@st.composite
def parts(draw: st.DrawFn) -> Part:
    base = Choice(0, draw(SIZES), draw(st.integers(0, 9)))
    others = st.builds(Choice, st.integers(-5, 40), SIZES, st.integers(0, 9))
    return Part([*draw(st.lists(others, max_size=3)), base], draw(SIZES))


CHAINS = st.builds(Chain, st.lists(parts(), max_size=5), SIZES)


@given(CHAINS, st.integers(1, 150))
def test_no_mix_within_budget_is_faster(chain: Chain, room: int) -> None:
    every = list(product(*(range(len(part.choices)) for part in chain.parts)))
    within = [picks for picks in every if chain.peak(picks) <= room]
    found = chain.fastest(room)
    if not within:
        assert found is None
        return
    assert found in within
    assert chain.seconds(found) == min(map(chain.seconds, within))


@given(CHAINS)
def test_least_peak_is_that_of_some_mix(chain: Chain) -> None:
    every = product(*(range(len(part.choices)) for part in chain.parts))
    assert chain.least_peak() == min(map(chain.peak, every))


def test_many_parts_are_searched_to_end() -> None:
    """More mixes than can be tried: 2^200."""
    parts = [Part([Choice(1000 * (1 + i % 7), 0, 1.0), Choice(0, 0, 2.0)], 0) for i in range(200)]
    found = Chain(parts, 0).fastest(200_000)
    # The smallest fit: 29 of 1000, 29 of 2000, 29 of 3000, and 6 of 4000.
    assert Chain(parts, 0).seconds(found) == 400 - (3 * 29 + 6)
    assert Chain(parts, 0).peak(found) == 198_000


def timeline(forward: list[int], backward: list[int], static: int = 100) -> Timeline:
    levels = [static]
    for size in (*forward, *backward):
        levels.append(levels[-1] + size)
    return Timeline(tuple(levels), len(forward))


BASE = timeline([10, 5, -5, 7, 20], [3, -20, 4, -7, -4, -3, -10])
KEEPING = timeline([10, 5, 6, 7, 20], [3, -20, 4, -7, 50, -61, -4, -3, -10])


def test_part_lies_where_timelines_differ() -> None:
    passes = find_passes(BASE, [KEEPING])
    assert passes == Passes(before=2, after=2, until=4, rest=3)
    assert passes.forward(BASE) == Span(2, 3)
    assert passes.forward(KEEPING) == Span(2, 3)
    assert passes.backward(BASE) == Span(9, 9)
    assert passes.backward(KEEPING) == Span(9, 11)


def test_part_lies_where_any_of_its_choices_differs() -> None:
    early = timeline([1, 9, 5, -5, 7, 20], [3, -20, 4, -7, -4, -3, -10])
    passes = find_passes(BASE, [KEEPING, early])
    assert (passes.before, passes.after) == (0, 2)


def test_top_of_part_is_its_own() -> None:
    passes = find_passes(BASE, [KEEPING])
    assert passes.top(KEEPING) == KEEPING.levels[10] == 178
    assert passes.top(BASE) == BASE.levels[9] == 117
