"""The largest size whose peak is within a budget, found from a few peaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

SECANT_STEPS = 8
"""Peaks after which a search goes on by halves."""


@dataclass(frozen=True)
class Fit:
    """What fits a budget.

    Attributes:
        largest: the largest size that fits; 0 if not even the smallest does.
        peak: bytes at its largest moment; 0 with ``largest``.
        next: one size up, which does not fit; ``None`` if the search ended before.
        next_peak: bytes of that.
        peaks: every size that was looked at, and its bytes.
    """

    largest: int
    peak: int
    next: int | None
    next_peak: int | None
    peaks: dict[int, int]


def find_largest(peak: Callable[[int], int], budget: int, sizes: range) -> Fit:
    """The largest of ``sizes`` whose ``peak`` is within ``budget`` bytes.

    The peak must rise with the size. Sizes are guessed along the straight line through the two
    peaks nearest to the budget, which is right at once where the peak is affine, as it is between
    two kinks in the batch.
    """
    known: dict[int, int] = {}  # by position in sizes, from 1
    low, high, guess = 0, len(sizes) + 1, 1
    while high - low > 1:
        known[guess] = peak(sizes[guess - 1])
        if known[guess] <= budget:
            low = guess
        else:
            high = guess
        guess = _extrapolate(known, budget)
        if len(known) > SECANT_STEPS and high in known:
            guess = (low + high) // 2
        guess = max(low + 1, min(guess, 4 * max(low, 1), high - 1))
    return Fit(
        largest=sizes[low - 1] if low else 0,
        peak=known.get(low, 0),
        next=sizes[high - 1] if high in known else None,
        next_peak=known.get(high),
        peaks={sizes[n - 1]: known[n] for n in sorted(known)},
    )


def _extrapolate(known: dict[int, int], budget: int) -> int:
    nearest = sorted(known, key=lambda n: abs(known[n] - budget))[:2]
    first, second = min(nearest), max(nearest)
    rise = known[second] - known[first]
    if rise <= 0:
        return 4 * second
    return math.floor(first + (budget - known[first]) * (second - first) / rise)
