"""A forward pass as data: operations, the values between them, and the module calls around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from efficient_densenet.convert.state.values import Nest

Arguments = tuple[Nest, ...]
Keywords = dict[str, Nest]
Function = Callable[..., Nest]
"""What a mode of PyTorch's is asked to run."""

DECIDED_BY = (bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format)


@dataclass(eq=False)
class Value:
    """A tensor at one moment: an operation that writes into a tensor makes a new value of it.

    Attributes:
        shape: its shape on the stand-ins; only the channels mean anything.
        maker: the operation that made it, ``None`` for what was there before.
        path: for a parameter or buffer its path in the module, ``None`` for all else.
        given: whether it is an argument of the recorded call.
    """

    shape: tuple[int, ...]
    maker: Node | None = field(default=None, repr=False)
    path: str | None = None
    given: bool = False
    uses: list[Node] = field(default_factory=list, repr=False)


@dataclass(eq=False, repr=False)
class Node:
    """One ATen operation.

    Attributes:
        name: as in ``aten::relu``, without ``aten::``, the overload and a trailing underscore.
        inputs: every argument by the name in its schema, defaults too, with values for tensors.
        results: the values it made; for an operation that writes in place, the new ones.
        effects: the first values of the tensors that it writes into.
        call: the module call in which it ran.
        index: its place in the order of execution.
        oddities: relative clauses about it that its name does not lead one to expect.
        autocast: the mode of autocast in which it ran, as in the context of a call.
    """

    name: str
    inputs: Mapping[str, Nest]
    results: list[Value]
    effects: list[Value]
    call: Call
    index: int
    oddities: list[str]
    autocast: tuple[object, ...]

    def values(self) -> Iterator[Value]:
        """The values that it reads."""
        return values_in(self.inputs)


@dataclass(eq=False, repr=False)
class Call:
    """One call of a module: its arguments, its result, and operations ``start`` to ``stop``.

    ``context`` is what a call depends on beside its arguments: autograd's mode and autocast's.
    ``changes_arguments`` says whether its caller would find something else in a list, or another
    container or object, that it gave; ``checkpoints``, whether its own forward function runs a
    reentrant checkpoint.
    """

    path: str
    module: nn.Module
    args: tuple[Nest, ...]
    kwargs: dict[str, Nest]
    parent: Call | None
    start: int
    context: tuple[object, ...] = ()
    stop: int | None = None
    result: Nest = None
    changes_arguments: bool = False
    checkpoints: bool = False
    children: list[Call] = field(default_factory=list)

    def within(self, outer: Call) -> bool:
        """Whether this is ``outer`` or a call that was made in it."""
        call: Call | None = self
        while call is not None and call is not outer:
            call = call.parent
        return call is outer

    def made(self, value: Value) -> bool:
        """Whether an operation of this call made a value."""
        return value.maker is not None and value.maker in self

    def __contains__(self, node: Node) -> bool:
        """Whether an operation ran in this call."""
        return self.start <= node.index and (self.stop is None or node.index < self.stop)

    def below(self) -> Iterator[Call]:
        """All calls that were made in this one, outer ones first."""
        for child in self.children:
            yield child
            yield from child.below()


@dataclass(frozen=True)
class Note:
    """Something that Python code did beside operations, and in which call.

    ``changed`` is the path of an attribute if that is what it did: it would still be seen after the
    call. ``repeats``: whether a second run of the same call, by autograd, would do the same.
    """

    text: str
    call: Call = field(repr=False)
    changed: str | None = None
    repeats: bool = True


@dataclass(repr=False)
class Recording:
    """What a forward pass did.

    Attributes:
        root: the recorded call; its parts are below it.
        nodes: all operations in the order of execution.
        notes: what the forward functions asked of tensors, or did to them, beside operations.
        patched: modules that do more than their class's forward, and what, by path.
        error: why the forward pass did not come to its end: subject and predicate of a sentence.
    """

    root: Call
    nodes: list[Node] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    patched: dict[str, str] = field(default_factory=dict)
    error: tuple[str, str] | None = None

    def calls(self) -> Iterator[Call]:
        """All module calls, outer ones first."""
        yield self.root
        yield from self.root.below()

    def last_call(self, path: str) -> Call:
        """The last call of a module, or of the innermost one around it that was called."""
        found = self.root
        for call in self.root.below():
            holds = f"{path}.".startswith(f"{call.path}.")
            if holds and len(call.path) >= len(found.path):
                found = call
        return found

    def nodes_in(self, call: Call) -> list[Node]:
        """The operations of a call that came to its end."""
        return self.nodes[call.start : call.stop]

    def notes_in(self, call: Call) -> list[Note]:
        """The notes of a call and of those in it."""
        return [note for note in self.notes if note.call.within(call)]

    def outline(self) -> Nest:
        """All that it says, by paths: of two recordings that are alike it is equal."""
        numbers: dict[Value, int] = {}

        def plain(nest: Nest) -> Nest:
            if isinstance(nest, Value):
                return numbers.setdefault(nest, len(numbers)), nest.path, nest.given
            if isinstance(nest, (list, tuple)):
                return [plain(item) for item in nest]
            if isinstance(nest, Mapping):
                return [(key, plain(item)) for key, item in nest.items()]
            return nest if nest is None or isinstance(nest, DECIDED_BY) else type(nest)

        calls = [
            (call.path, call.start, call.stop, plain((call.args, call.kwargs, call.result)))
            for call in self.calls()
        ]
        nodes = [
            (node.name, node.call.path, node.oddities, plain((node.inputs, node.results)))
            for node in self.nodes
        ]
        notes = [(note.text, note.call.path, note.changed) for note in self.notes]
        return calls, nodes, notes, self.error


def values_in(nest: Nest) -> Iterator[Value]:
    """All values in an argument or result, in order."""
    if isinstance(nest, Value):
        yield nest
    elif isinstance(nest, (list, tuple)):
        for item in nest:
            yield from values_in(item)
    elif isinstance(nest, Mapping):
        for item in nest.values():
            yield from values_in(item)
