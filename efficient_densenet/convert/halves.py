"""Finds the half of a recorded layer that is a unit, where the other half is calls of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from efficient_densenet.convert.graph import Call, Node, Value
from efficient_densenet.convert.match import HalfMatch, UnitMatch, units_of
from efficient_densenet.convert.region import Region
from efficient_densenet.convert.steps import chain
from efficient_densenet.modules.reading import Unsupported

IsStart = Callable[[Value], bool]


def match_half(
    region: Region, run: Call, value: Value, prefix: tuple[Value, ...]
) -> HalfMatch | None:
    """The halves of the layer that ``run`` is, which reads ``prefix`` and makes ``value``.

    ``None`` unless one of them is a unit and the other a row of module calls, each of which takes
    what the one before returned, and the forward function does nothing else.
    """
    if run.path in region.recording.patched:
        return None
    for calls, unit_first in _rows(region, run, value, prefix):
        unit = _unit_beside(region, calls, unit_first, value, prefix)
        if unit is not None and _is_all(region, run, calls, unit_first, unit[1]):
            paths = tuple([region.relative(call.path) for call in calls])
            return HalfMatch(unit[0], paths, unit_first)
    return None


def _rows(
    region: Region, run: Call, value: Value, prefix: tuple[Value, ...]
) -> Iterator[tuple[list[Call], bool]]:
    """Rows of calls that may be one half: from the start on, or up to the end."""
    calls = [call for call in run.children if len(call.args) == 1 and not call.kwargs]
    row: list[Call] = []
    for call in calls:
        taken = call.args[0]
        follows = taken is row[-1].result if row else _is_prefix(region, taken, prefix)
        if not follows:
            break
        row.append(call)
        yield row, False
    row = []
    for call in reversed(calls):
        if call.result is not (row[0].args[0] if row else value):
            break
        row = [call, *row]
        yield row, True


def _is_prefix(region: Region, taken: object, prefix: tuple[Value, ...]) -> bool:
    return isinstance(taken, Value) and region.pieces(taken) == prefix


def _unit_beside(
    region: Region,
    calls: Sequence[Call],
    unit_first: bool,
    value: Value,
    prefix: tuple[Value, ...],
) -> tuple[UnitMatch, set[Node]] | None:
    """The unit that is the other half, and its operations."""
    middle = calls[0].args[0] if unit_first else calls[-1].result
    if not isinstance(middle, Value):
        return None
    try:
        if unit_first:
            steps = chain(region, middle, lambda start: region.pieces(start) == prefix)
        else:
            steps = chain(region, value, lambda start: start is middle)
        units = units_of(steps)
        nodes = {node for step in steps for node in step.nodes}
        for node in nodes:
            region.check_plain(node.call)
    except Unsupported:
        return None
    if len(units) != 1 or (unit_first and units[0].dropout.rate):
        return None
    return units[0], nodes


def _is_all(
    region: Region, run: Call, calls: Sequence[Call], unit_first: bool, unit: set[Node]
) -> bool:
    """Whether a layer does nothing but a unit and these calls, of which each reads its argument.

    What a first half takes is a copy then: it may not be overwritten.
    """
    if any(call.context != run.context for call in calls):
        return False
    for node in region.nodes:
        if node not in run or node not in region.live:
            continue
        call = next((call for call in calls if node in call), None)
        if call is None:
            if node not in unit and not any(map(region.join_of, node.results)):
                return False
            continue
        if any(run.made(v) and not call.made(v) and v is not call.args[0] for v in node.values()):
            return False
        if not unit_first and calls[0].args[0] in node.effects:
            return False
    notes = region.recording.notes_in(run)
    return all(any(note.call.within(call) for call in calls) for note in notes)
