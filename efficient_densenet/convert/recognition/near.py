"""Calls that nearly are dense blocks: in them, maps are joined to what was joined before."""

from __future__ import annotations

from collections.abc import Collection

from efficient_densenet.convert.recording.graph import Call, Node, Recording, Value, values_in

Pieces = tuple[Value, ...]


def nearly_dense(recording: Recording, known: Collection[Call]) -> list[Call]:
    """The innermost calls in which a map is joined to a concatenation that was itself extended.

    The first map of all need not be in it. What happens in ``known`` calls does not count.
    """
    joins = {pieces: node for pieces, node in _joins(recording) if not _within(node.call, known)}
    found: dict[Call, None] = {}
    for pieces, node in joins.items():
        for before in (pieces[:-1], pieces[1:]):
            if len(before) > 1 and before in joins:
                found[_innermost_around(node.call, joins[before].call)] = None
        for before, earlier in joins.items():
            forwards = before[1:] == pieces[:-1] and _reads(pieces[-1], earlier)
            backwards = before[:-1] == pieces[1:] and _reads(pieces[0], earlier)
            if len(before) > 1 and (forwards or backwards):
                found[_innermost_around(node.call, earlier.call)] = None
    return [call for call in found if not any(_is_below(other, call) for other in found)]


def _reads(value: Value, join: Node) -> bool:
    """Whether a value depends on what was joined."""
    waiting, seen = [value.maker], set[Node | None]()
    while waiting:
        node = waiting.pop()
        if node is join:
            return True
        if node is not None and node not in seen and node.index > join.index:
            seen.add(node)
            waiting += [read.maker for read in node.values()]
    return False


def _joins(recording: Recording) -> list[tuple[Pieces, Node]]:
    """Every concatenation of channels, with the maps that are no concatenations themselves."""
    pieces: dict[Value, Pieces] = {}
    joins = []
    for node in recording.nodes:
        if node.name == "cat" and node.inputs["dim"] in (1, 1 - len(node.results[0].shape)):
            parts = [pieces.get(part, (part,)) for part in values_in(node.inputs["tensors"])]
            joined = tuple([piece for part in parts for piece in part])
            pieces[node.results[0]] = joined
            joins.append((joined, node))
    return joins


def _within(call: Call, known: Collection[Call]) -> bool:
    return any(call.within(other) for other in known)


def _is_below(call: Call, other: Call) -> bool:
    return call is not other and call.within(other)


def _innermost_around(call: Call, other: Call) -> Call:
    while not other.within(call):
        assert call.parent is not None
        call = call.parent
    return call
