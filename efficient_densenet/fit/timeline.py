"""What the mode of one part changes in the live bytes of a whole step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from efficient_densenet.memory.report import StepReport


class Timeline(NamedTuple):
    """Live bytes over one step.

    Attributes:
        levels: bytes before the first event, and after each; what lives before the step included.
        turn: the index of the level at which the forward pass ends.
    """

    levels: tuple[int, ...]
    turn: int

    @classmethod
    def of(cls, report: StepReport) -> Timeline:
        """That of a reported step."""
        static = report.peak.total - report.peak.step
        sizes = (event.size for event in report.events)
        turn = sum(event.phase == "forward" for event in report.events)
        return cls(tuple(accumulate(sizes, initial=static)), turn)

    @property
    def after_forward(self) -> int:
        """The level at which the forward pass ends."""
        return self.levels[self.turn]

    @property
    def peak(self) -> int:
        """The largest level."""
        return max(self.levels)


class Span(NamedTuple):
    """Events of a timeline from ``start`` to before ``stop``: the levels on both sides count."""

    start: int
    stop: int

    def top(self, levels: Sequence[int]) -> int:
        """The largest level; 0 if the span is turned round."""
        return max(levels[self.start : self.stop + 1], default=0)


class Passes(NamedTuple):
    """Where a part's forward and backward pass lie in a timeline, counted from its two ends.

    Attributes:
        before: events before the part's forward pass.
        after: events of the forward pass after the part's.
        until: events between the end of the forward pass and the part's backward pass.
        rest: events after the part's backward pass.
    """

    before: int
    after: int
    until: int
    rest: int

    def forward(self, timeline: Timeline) -> Span:
        """The part's forward pass in ``timeline``."""
        return Span(self.before, timeline.turn - self.after)

    def backward(self, timeline: Timeline) -> Span:
        """The part's backward pass in ``timeline``."""
        return Span(timeline.turn + self.until, len(timeline.levels) - 1 - self.rest)

    def top(self, timeline: Timeline) -> int:
        """The largest level in either pass."""
        spans = (self.forward(timeline), self.backward(timeline))
        return max(span.top(timeline.levels) for span in spans)


def find_passes(base: Timeline, others: Sequence[Timeline]) -> Passes:
    """The passes of a part, by what differs from ``base`` when its mode is another."""
    sizes, turn = _sizes(base), base.turn
    forward, backward = sizes[:turn], sizes[turn:]
    ends = []
    for other in others:
        changed = _sizes(other)
        first = _common(forward, changed[: other.turn])
        second = _common(backward, changed[other.turn :])
        ends.append((*first, *second))
    return Passes(*(min(column) for column in zip(*ends, strict=True)))


def _sizes(timeline: Timeline) -> list[int]:
    return [b - a for a, b in zip(timeline.levels, timeline.levels[1:], strict=False)]


def _common(one: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """How many numbers both begin with, and how many of the rest both end with."""
    shorter = min(len(one), len(other))
    start = next((i for i in range(shorter) if one[i] != other[i]), shorter)
    rest = shorter - start
    end = next((i for i in range(rest) if one[-1 - i] != other[-1 - i]), rest)
    return start, end
