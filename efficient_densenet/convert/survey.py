"""Finds what a model is made of: dense blocks, transitions, stems, and what nearly is one.

The model's forward pass is recorded once, and every call in it is looked at; parts that it did not
come to are recorded by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from efficient_densenet.convert.converted import Converted, converted_class, is_derived
from efficient_densenet.convert.fronts import (
    DenseFront,
    Front,
    Recognised,
    StemFront,
    TransitionFront,
)
from efficient_densenet.convert.recognition.dense import match_dense
from efficient_densenet.convert.recognition.match import DenseMatch
from efficient_densenet.convert.recognition.near import nearly_dense
from efficient_densenet.convert.recording.graph import Arguments, Call, Keywords, Recording, Value
from efficient_densenet.convert.recording.inputs import input_for, map_for
from efficient_densenet.convert.recording.record import record
from efficient_densenet.convert.recording.twin import Unrecordable
from efficient_densenet.convert.state.snapshot import Snapshot
from efficient_densenet.convert.state.values import Nest, class_of
from efficient_densenet.modules.block import RecomputingBlock
from efficient_densenet.modules.reading import Unsupported
from efficient_densenet.modules.recomputing import Recomputing, Settings
from efficient_densenet.modules.sequence import RecomputingTransition

NATIVE: dict[type[nn.Module], type[Front]] = {
    RecomputingBlock: DenseFront,
    RecomputingTransition: TransitionFront,
}
"""Modules of this package, which are what they are; and what stands before others like them."""


@dataclass(frozen=True)
class Found:
    """A module that was recognised.

    Attributes:
        front: what would stand before its class.
        match: what it is, ``None`` if it only looks like a dense block; of a module of this package
            its class.
        others: the same in other states: snapshots, and what it is then.
        args: what it is called with, as stand-ins, and ``kwargs``.
        reason: why it is none.
    """

    front: type[Front]
    match: Any
    args: Arguments = ()
    kwargs: Keywords = field(default_factory=dict)
    reason: Unsupported | None = None
    others: list[tuple[Snapshot, Any]] = field(default_factory=list)

    def why_naive(self, module: nn.Module) -> str | None:
        """Why ``module`` would be naive if it were converted, or is if it is native."""
        if self.match is None:
            return str(self.reason)
        if not isinstance(module, Settings) or isinstance(module, Converted):
            cls = type(module)
            if not is_derived(cls):
                cls = converted_class(class_of(module), self.front)
            shell = object.__new__(cls)
            vars(shell).update(vars(module))
            vars(shell).pop("_recomputing_known", None)
            self.teach(shell)
            module = shell
        if not isinstance(module, Recomputing):
            return None
        return module.why_naive(*self.args, **self.kwargs)

    def teach(self, module: nn.Module) -> None:
        """Tell a converted module what it is."""
        assert isinstance(module, Front)
        module._recomputing_learn(self.match, self.args, self.kwargs)
        for snapshot, match in self.others:
            module._recomputing_learn(match, self.args, self.kwargs, snapshot)


class Survey:
    """What there is in ``model``.

    Attributes:
        found: the modules that were recognised, by path.
        in_parts: the paths of modules that were not called, but their parts were.

    Args:
        model: any module.
        args: what it is called with; by default a map of as many channels as its first norm or
            convolution reads.
    """

    def __init__(self, model: nn.Module, args: Arguments | None = None) -> None:
        self.found: dict[str, Found] = {}
        self.in_parts: set[str] = set()
        self._record(model, "", args)

    def _record(self, module: nn.Module, path: str, args: Arguments | None) -> None:
        """Record the module at ``path``, and after that what its forward pass did not come to."""
        if args is None:
            x = input_for(module)
            if x is None:
                return
            args = (x,)
        reached: set[str] = set()
        try:
            recording = record(module, args)
        except Unrecordable:
            pass
        else:
            here = dict(_found_in(recording, module))
            _look_in_other_mode(module, args, here)
            if path in self.in_parts and here.get("") and here[""].front is DenseFront:
                here.pop("")  # its layers have been found one by one
            for name, found in here.items():
                self.found.setdefault(_joined(path, name), found)
            reached = {call.path for call in recording.calls() if call.stop is not None}
        self._record_rest(module, path, "", reached)

    def _record_rest(self, module: nn.Module, path: str, below: str, reached: set[str]) -> None:
        """What was not ``reached`` in the recording at ``path``; ``module`` is ``below`` that."""
        for name, child in module.named_children():
            if isinstance(child, torch.jit.ScriptModule):
                continue
            inner = _joined(below, name)
            in_parts = any(other.startswith(f"{inner}.") for other in reached)
            is_callable = type(child).forward is not nn.Module.forward
            if inner not in reached:
                if in_parts:
                    self.in_parts.add(_joined(path, inner))
                if is_callable and any(True for _ in child.children()):
                    self._record(child, _joined(path, inner), None)
            if in_parts or not is_callable:
                self._record_rest(child, path, inner, reached)


def _found_in(recording: Recording, module: nn.Module) -> Iterator[tuple[str, Found]]:
    """What is recognised in a recording, outer modules first, by the path of each."""
    known: dict[str, Call] = {}
    entries: list[str] = []
    for call in recording.calls():
        if call.path not in entries and any(call.within(other) for other in known.values()):
            continue
        found = _recognised(recording, call)
        if found is not None and found[2].path not in known:
            front, match, inner = found
            known[inner.path] = inner
            if isinstance(match, DenseMatch) and match.entry is not None:
                entries.append(_joined(inner.path, match.entry))
            args, kwargs = _stand_ins(inner.args, module), _stand_ins(inner.kwargs, module)
            yield inner.path, Found(front, match, args, kwargs)
    for call in nearly_dense(recording, known.values()):
        try:
            match_dense(recording, call)
        except Unsupported as reason:
            yield call.path, Found(DenseFront, None, reason=reason.with_traceback(None))


def _look_in_other_mode(module: nn.Module, args: Arguments, found: dict[str, Found]) -> None:
    """Add what the same modules are in training, or in evaluation, so that nobody has to wait."""
    try:
        recording = record(module, args, training=not module.training)
    except Unrecordable:
        return
    calls = {call.path: call for call in recording.calls()}
    for path, what in found.items():
        if path in calls and what.match is not None and issubclass(what.front, Recognised):
            with suppress(Unsupported):
                match = what.front._recomputing_recognise(recording, calls[path])
                snapshot = Snapshot(recording.root.module.get_submodule(path))
                what.others.append((snapshot, match))


def _recognised(recording: Recording, call: Call) -> tuple[type[Front], Any, Call] | None:
    """What a call is, and the innermost call that is all of it."""
    for native, like in NATIVE.items():
        if isinstance(call.module, native):
            return like, native, call
    fronts: tuple[type[Recognised], ...] = (DenseFront, TransitionFront, StemFront)
    for front in fronts:
        try:
            match = front._recomputing_recognise(recording, call)
        except Unsupported:
            continue
        if getattr(match, "pool", match) is None:
            continue
        for child in call.children:
            if child.result is call.result:
                inner = _recognised(recording, child)
                if inner is not None and inner[0] is front and _is_as_much(match, inner[1]):
                    return inner
        return front, match, call
    return None


def _is_as_much(match: Any, inner: Any) -> bool:
    """Whether a dense block inside another one holds all layers of it."""
    return len(getattr(match, "layers", ())) == len(getattr(inner, "layers", ()))


def _stand_ins(nest: Nest, module: nn.Module) -> Nest:
    if isinstance(nest, Value):
        return map_for(module, nest.shape)
    if isinstance(nest, tuple):
        return tuple([_stand_ins(item, module) for item in nest])
    if isinstance(nest, dict):
        return {name: _stand_ins(item, module) for name, item in nest.items()}
    return nest


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
