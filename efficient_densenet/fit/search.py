"""The fastest choice for every part whose peak is within a budget, and the least possible peak."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

MOST_STATES = 4096


class Choice(NamedTuple):
    """A part in one of its modes.

    Attributes:
        kept: bytes that live between its forward and its backward pass, beyond those of its base
            choice, which keeps about the least.
        top: bytes at the largest moment of its two passes, if all parts before have their base
            choice.
        seconds: that it takes.
    """

    kept: int
    top: int
    seconds: float


class Part(NamedTuple):
    """What has a choice.

    Attributes:
        choices: in any order.
        gap: bytes at the largest moment between this part and the next one, in the forward and in
            the backward pass, if all parts so far have their base choice.
    """

    choices: Sequence[Choice]
    gap: int


class Chain(NamedTuple):
    """Parts in the order of the forward pass, and the largest moment outside of them.

    All that is kept lives while later parts run, forward and backward, and is gone when their own
    backward pass is: so the peak is that of the largest moment, each raised by what is kept before.
    """

    parts: Sequence[Part]
    gap: int

    def peak(self, picks: Sequence[int]) -> int:
        """Bytes at the largest moment with the choices ``picks``."""
        kept, peak = 0, self.gap
        for part, pick in zip(self.parts, picks, strict=True):
            choice = part.choices[pick]
            peak = max(peak, kept + choice.top)
            kept += choice.kept
            peak = max(peak, kept + part.gap)
        return peak

    def seconds(self, picks: Sequence[int]) -> float:
        """Time of the choices ``picks``."""
        chosen = zip(self.parts, picks, strict=True)
        return sum(part.choices[pick].seconds for part, pick in chosen)

    def fastest(self, room: int) -> tuple[int, ...] | None:
        """The choices that take least time and whose peak is within ``room``; ``None`` if none is.

        A choice fits or not by what is kept before it, so that of two beginnings one is of no use
        if it keeps no less and takes no less time.
        """
        states = [_State(0.0, 0, ())] if self.gap <= room else []
        for part in self.parts:
            found = []
            for state in states:
                for pick, choice in enumerate(part.choices):
                    kept = state.kept + choice.kept
                    if max(state.kept + choice.top, kept + part.gap) <= room:
                        seconds = state.seconds + choice.seconds
                        found.append(_State(seconds, kept, (*state.picks, pick)))
            states = _useful(found, room)
        return min(states).picks if states else None

    def least_peak(self) -> int:
        """The smallest peak of all choices."""
        enough = self.peak([_least(part) for part in self.parts])
        return bisect_left(range(enough), True, key=self._fits)

    def _fits(self, room: int) -> bool:
        kept = 0
        for part in self.parts:
            fitting = (c.kept for c in part.choices if kept + c.top <= room)
            least = min(fitting, default=None)
            if least is None:
                return False
            kept += least
            if kept + part.gap > room:
                return False
        return self.gap <= room


class _State(NamedTuple):
    """Choices for the first parts."""

    seconds: float
    kept: int
    picks: tuple[int, ...]


def _least(part: Part) -> int:
    return min(range(len(part.choices)), key=lambda pick: part.choices[pick].kept)


def _useful(states: list[_State], room: int) -> list[_State]:
    """Without those that another one is at least as good as; of very many, the fastest of a few."""
    useful: list[_State] = []
    for state in sorted(states):
        if not useful or state.kept < useful[-1].kept:
            useful.append(state)
    if len(useful) <= MOST_STATES:
        return useful
    fastest: dict[int, _State] = {}
    for state in useful:
        fastest.setdefault(state.kept * MOST_STATES // room, state)
    return [*fastest.values(), useful[-1]]
