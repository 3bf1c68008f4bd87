"""Any mix of modes, put together from estimates of single changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from efficient_densenet.fit.estimates import Estimates, Mix
from efficient_densenet.fit.groups import Group, Modes
from efficient_densenet.fit.search import Chain, Choice, Part
from efficient_densenet.fit.timeline import Passes, Span, Timeline, find_passes
from efficient_densenet.fit.times import Times
from efficient_densenet.functional.modes import Recompute


class Studied(NamedTuple):
    """A group, and what each of its choices does to the step.

    Attributes:
        group: with choices that differ from each other.
        passes: where it runs.
        timelines: of the step with each of the choices, all else as in the base.
        numbers: which of the choices any modes are, those too that differ from another in name
            only.
    """

    group: Group
    passes: Passes
    timelines: Sequence[Timeline]
    numbers: Mapping[Modes, int]


class Composition(NamedTuple):
    """A base, and what single changes of it do.

    Attributes:
        base: a mix.
        timeline: that of ``base``.
        studied: in the order of the forward pass.
    """

    base: Mix
    timeline: Timeline
    studied: Sequence[Studied]

    @classmethod
    def of(cls, estimates: Estimates, groups: Sequence[Group]) -> Composition:
        """That of ``groups``; in the base each has its last choice."""
        base: dict[str, Recompute] = {}
        for group in groups:
            base |= group.mix(group.choices[-1])
        timeline = estimates.timeline(base)
        studied = []
        for group in groups:
            found = [estimates.timeline({**base, **group.mix(modes)}) for modes in group.choices]
            # The last of equal ones gives its name.
            choices = dict(zip(found, group.choices, strict=True))
            timelines = tuple(choices)
            if len(timelines) > 1:
                passes = find_passes(timeline, [t for t in timelines if t != timeline])
                named = replace(group, choices=tuple(choices.values()))
                numbers = (timelines.index(each) for each in found)
                by_modes = dict(zip(group.choices, numbers, strict=True))
                studied.append(Studied(named, passes, timelines, by_modes))
        studied.sort(key=lambda each: each.passes.before)
        return cls(base, timeline, studied)

    @property
    def groups(self) -> list[Group]:
        """What has a choice that makes a difference."""
        return [each.group for each in self.studied]

    def groups_within(self, room: int) -> list[Group]:
        """The same, with those choices that fit ``room`` bytes in some mix."""
        return [
            replace(
                each.group,
                choices=tuple(
                    modes
                    for modes, timeline in zip(each.group.choices, each.timelines, strict=True)
                    if each.passes.top(timeline) <= room
                ),
            )
            for each in self.studied
        ]

    def chain(self, times: Times) -> Chain:
        """What is searched; of a choice that ``times`` lacks the time is infinite."""
        base, (first, *rest) = self.timeline, self._gaps()
        parts = []
        for each, gap in zip(self.studied, rest, strict=True):
            seconds = times.get(each.group.paths, {})
            choices = []
            for modes, t in zip(each.group.choices, each.timelines, strict=True):
                kept = t.after_forward - base.after_forward
                choices.append(Choice(kept, each.passes.top(t), seconds.get(modes, math.inf)))
            parts.append(Part(choices, gap))
        return Chain(parts, first)

    def _gaps(self) -> list[int]:
        """The largest levels of the base before, between and after the groups, in either pass."""
        base = self.timeline
        forward = [each.passes.forward(base) for each in self.studied]
        backward = [each.passes.backward(base) for each in self.studied]
        there = [Span(0, 0), *forward, Span(base.turn, base.turn)]
        back = [Span(len(base.levels), len(base.levels)), *backward, Span(base.turn, base.turn)]
        return [
            max(
                Span(before.stop, after.start).top(base.levels),
                Span(later.stop, earlier.start).top(base.levels),
            )
            for (before, after), (earlier, later) in zip(
                pairwise(there), pairwise(back), strict=True
            )
        ]

    def picks(self, mix: Mix) -> tuple[int, ...]:
        """The choices by which ``mix`` differs from the base."""
        return tuple(
            each.numbers[tuple(mix[path] for path in each.group.paths)] for each in self.studied
        )

    def mix(self, picks: Sequence[int]) -> dict[str, Recompute]:
        """The mix in which each group has the choice of that number."""
        made = dict(self.base)
        for each, pick in zip(self.studied, picks, strict=True):
            made |= each.group.mix(each.group.choices[pick])
        return made
