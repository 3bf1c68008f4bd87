"""Finds the units in a recorded layer that is a chain of them and of module calls."""

from __future__ import annotations

from efficient_densenet.convert.recognition.match import ChainMatch, UnitMatch, units_of
from efficient_densenet.convert.recognition.region import Region
from efficient_densenet.convert.recognition.steps import Norm, Step, step
from efficient_densenet.convert.recording.graph import Call, Node, Value
from efficient_densenet.modules.reading import Unsupported


def match_chain(region: Region, run: Call, value: Value, prefix: tuple[Value, ...]) -> ChainMatch:
    """What the layer that ``run`` is, which reads ``prefix`` and makes ``value``, is made of.

    Nothing unless there is a unit in it, each part takes what the one before returned, and the
    forward function does nothing else.
    """
    if run.path in region.recording.patched:
        return ()
    made_by = {id(call.result): call for call in run.children if _takes_another(call)}
    chain: list[UnitMatch | tuple[str, ...]] = []
    nodes: set[Node] = set()
    calls: list[Call] = []
    now = value
    while region.pieces(now) != prefix:
        unit = _unit(region, now, prefix, drops=now is value)
        if unit is not None:
            match, steps = unit
            chain.append(match)
            nodes.update(node for found in steps for node in found.nodes)
            now = steps[0].input
        elif id(now) in made_by:
            call = made_by[id(now)]
            path = region.relative(call.path)
            if chain and isinstance(chain[-1], tuple):
                chain[-1] = (path, *chain[-1])
            else:
                chain.append((path,))
            calls.append(call)
            now = call.args[0]
        else:
            return ()
    has_unit = any(isinstance(part, UnitMatch) for part in chain)
    return tuple(chain[::-1]) if has_unit and _is_all(region, run, calls, nodes, prefix) else ()


def _takes_another(call: Call) -> bool:
    """Whether a call takes one tensor and returns another one."""
    if len(call.args) != 1 or call.kwargs:
        return False
    return isinstance(call.args[0], Value) and call.args[0] is not call.result


def _unit(
    region: Region, value: Value, prefix: tuple[Value, ...], drops: bool
) -> tuple[UnitMatch, list[Step]] | None:
    """The unit that made a value, and its steps; ``drops`` says whether dropout may be its last."""
    steps: list[Step] = []
    try:
        while not steps or not isinstance(steps[0].what, Norm):
            if region.pieces(value) == prefix:
                return None
            steps.insert(0, step(region, value))
            value = steps[0].input
            for node in steps[0].nodes:
                region.check_plain(node.call)
        (unit,) = units_of(steps)
    except Unsupported:
        return None
    return None if unit.dropout.rate and not drops else (unit, steps)


def _is_all(
    region: Region, run: Call, calls: list[Call], units: set[Node], prefix: tuple[Value, ...]
) -> bool:
    """Whether a layer does nothing but its units and these calls, of which each reads its argument.

    What reads the older maps takes a copy then: it may not overwrite them.
    """
    if any(call.context != run.context for call in calls):
        return False
    for inner in run.below():
        if inner.path in region.recording.patched and not any(map(inner.within, calls)):
            return False
    for node in region.nodes:
        if node not in run or node not in region.live:
            continue
        call = next((call for call in calls if node in call), None)
        if call is None:
            if node not in units and not any(map(region.join_of, node.results)):
                return False
            continue
        if any(run.made(v) and not call.made(v) and v is not call.args[0] for v in node.values()):
            return False
        if any(region.pieces(value) == prefix for value in node.effects):
            return False
    notes = region.recording.notes_in(run)
    return all(any(note.call.within(call) for call in calls) for note in notes)
