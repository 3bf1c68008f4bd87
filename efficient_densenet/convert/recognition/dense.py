"""Finds the dense connections in a recorded call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from efficient_densenet.convert.recognition.chains import match_chain
from efficient_densenet.convert.recognition.match import (
    DenseMatch,
    LayerCall,
    LayerMatch,
    Returns,
    units_of,
)
from efficient_densenet.convert.recognition.region import FORWARD, Region
from efficient_densenet.convert.recognition.steps import chain
from efficient_densenet.convert.recording.graph import Call, Node, Recording, Value, values_in
from efficient_densenet.convert.recording.twin import OWN_FORWARD
from efficient_densenet.modules.opaque import Form
from efficient_densenet.modules.reading import Unsupported

OTHER_MODE = "runs in a mode of autograd or autocast of its own"


def match_dense(recording: Recording, call: Call) -> DenseMatch:
    """The dense block that a recorded call is.

    Raises:
        Unsupported: if it is none, or one that holds something else, with the reason.
    """
    region = Region(recording, call)
    region.check_runs_forward()
    reasons: list[tuple[int, Unsupported]] = []
    for reading in _readings(region):
        layers: list[_Layer] = []
        try:
            for value, prefix in reading.layers():
                layers.append(_layer(region, value, prefix, reading.joined(prefix, value)))
            return _finished(region, reading, layers)
        except Unsupported as reason:
            reasons.append((len(layers), reason))
    raise max(reasons, key=lambda found: found[0])[1]


@dataclass(frozen=True)
class _Reading:
    """One way to read the pieces of a result: what enters, and what is new, the oldest first."""

    base: Value
    new: tuple[Value, ...]
    new_first: bool
    returns_base: bool

    def joined(self, prefix: tuple[Value, ...], value: Value) -> tuple[Value, ...]:
        """The maps that a layer leaves behind if it reads ``prefix`` and makes ``value``."""
        return (value, *prefix) if self.new_first else (*prefix, value)

    def layers(self) -> Iterator[tuple[Value, tuple[Value, ...]]]:
        """What each layer makes, and the maps that it must read."""
        prefix: tuple[Value, ...] = (self.base,)
        for value in self.new:
            yield value, prefix
            prefix = self.joined(prefix, value)


def _readings(region: Region) -> list[_Reading]:
    pieces = region.pieces(region.result)
    if len(pieces) < 2:
        raise Unsupported(FORWARD, "does not return a concatenation of maps")
    first, last, backwards = pieces[0], pieces[-1], pieces[::-1]
    with_first = _Reading(first, pieces[1:], False, True)
    with_last = _Reading(last, backwards[1:], True, True)
    if first in region.arguments:
        return [with_first]
    if last in region.arguments:
        return [with_last]
    only_new = [
        _Reading(argument, new, new_first, False)
        for argument in region.arguments
        for new, new_first in ((pieces, False), (backwards, True))
    ]
    return [*only_new, with_first, with_last]


@dataclass(frozen=True)
class _Layer:
    """A matched layer, its operations, and the call that is exactly this layer."""

    match: LayerMatch
    nodes: tuple[Node, ...]
    run: Call | None

    @property
    def opaque(self) -> Call | None:
        return None if self.match.units else self.run


def _layer(
    region: Region, value: Value, prefix: tuple[Value, ...], joined: tuple[Value, ...]
) -> _Layer:
    run, call = _call_of(region, value, prefix, joined) or (None, None)
    growth = value.shape[1]
    try:
        steps = chain(region, value, lambda start: region.pieces(start) == prefix)
        units = units_of(steps)
        nodes = tuple([node for step in steps for node in step.nodes])
        if run is not None:
            for inner in (run, *run.below()):
                region.check_plain(inner)
            for note in region.recording.notes_in(run):
                raise region.refusal(note)
    except Unsupported as why:
        if run is None:
            raise
        region.check_runs_again(run)
        made_of = match_chain(region, run, value, prefix)
        return _Layer(LayerMatch(growth, (), call, why.args, made_of), (), run)
    return _Layer(LayerMatch(growth, units, call), nodes, run)


def _call_of(
    region: Region, value: Value, prefix: tuple[Value, ...], joined: tuple[Value, ...]
) -> tuple[Call, LayerCall] | None:
    """The innermost call that is exactly a layer, and holds all that Python does beside it."""
    around = [call for call in region.call.below() if call.stop is not None and call.made(value)]
    found = []
    for call in reversed(around):
        form, result = _form(call), call.result
        taken = list(values_in(call.args))
        read = tuple([piece for part in taken for piece in region.pieces(part)])
        if form is None or read != prefix or not isinstance(result, Value):
            continue
        if call.context != region.call.context:
            continue
        if result is not value and region.pieces(result) != joined:
            continue
        if _is_closed(region, call, {*taken}, {value, result}):
            channels = tuple([part.shape[1] for part in taken])
            returns: Returns = "new" if result is value else "all"
            new_first = joined[0] is value
            made = LayerCall(region.relative(call.path), Form(form, channels, returns, new_first))
            found.append((call, made))
    notes = region.recording.notes_in(found[-1][0]) if found else []
    for call, made in found:
        if all(note.call.within(call) for note in notes):
            return call, made
    return None


def _form(call: Call) -> Literal["tensor", "list", "arguments"] | None:
    """How a call takes maps, ``None`` if it takes anything else."""
    if call.kwargs or not call.args:
        return None
    if all(isinstance(arg, Value) for arg in call.args):
        return "tensor" if len(call.args) == 1 else "arguments"
    maps = call.args[0]
    listed = len(call.args) == 1 and isinstance(maps, tuple)
    return "list" if listed and all(isinstance(item, Value) for item in maps) else None


def _is_closed(region: Region, run: Call, taken: set[Value], left: set[Value]) -> bool:
    """Whether a call reads only what it takes, and only ``left`` is read after it."""
    patched = region.recording.patched
    inside = {run.path, *(call.path for call in run.below())}
    if any(patched.get(path) == OWN_FORWARD for path in inside):
        return False
    around = run.parent
    while around is not None and around is not region.call:
        if around.path in patched:
            return False
        around = around.parent
    for node in region.live:
        for value in node.values():
            if node in run:
                outside = not run.made(value) and value not in taken
                if outside and (value.path is None and (value.given or value.maker)):
                    return False
            elif run.made(value) and value not in left:
                return False
        if node in run and any(not run.made(v) and v.path is None for v in node.effects):
            return False
    return True


def _finished(region: Region, reading: _Reading, layers: Sequence[_Layer]) -> DenseMatch:
    opaque = [layer.opaque for layer in layers if layer.opaque]
    if opaque and len(layers) < 2:
        raise Unsupported(FORWARD, "joins one module's result to what it reads")
    if not reading.returns_base and len(layers) < 2:
        raise Unsupported(FORWARD, "does not return a concatenation of maps")
    entry = None if reading.base in region.arguments else _entry(region, reading.base)
    runs = [*opaque, entry] if entry else opaque
    region.check_nothing_else((node for layer in layers for node in layer.nodes), runs)
    argument = reading.base if entry is None else next(values_in(entry.args))
    return DenseMatch(
        input_channels=reading.base.shape[1],
        layers=tuple([layer.match for layer in layers]),
        new_first=reading.new_first,
        returns="all" if reading.returns_base else "new",
        argument=region.arguments.index(argument),
        entry=region.relative(entry.path) if entry else None,
    )


def _entry(region: Region, base: Value) -> Call:
    """The call that makes of an argument the map that enters."""
    for run in region.call.children:
        takes_argument = _form(run) == "tensor" and run.args[0] in region.arguments
        if run.result is base and takes_argument and _is_closed(region, run, {*run.args}, {base}):
            if run.context != region.call.context:
                raise Unsupported(region.relative(run.path), OTHER_MODE)
            return run
    raise Unsupported(FORWARD, "does not connect its first map densely")
