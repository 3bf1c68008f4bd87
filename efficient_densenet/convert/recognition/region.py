"""What runs inside one recorded call, and what crosses its border."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from torch import nn

from efficient_densenet.convert.recording.graph import Call, Node, Note, Recording, Value, values_in
from efficient_densenet.convert.recording.twin import OWN_CALL, OWN_FORWARD
from efficient_densenet.modules.reading import Unsupported

FORWARD = "the forward function"


class Region:
    """A recorded call that came to its end and returned one tensor.

    Raises:
        Unsupported: if it did not.
    """

    def __init__(self, recording: Recording, call: Call) -> None:
        if call.stop is None:
            subject, predicate = recording.error or (FORWARD, "did not come to its end")
            raise Unsupported(subject, predicate)
        if not isinstance(call.result, Value):
            raise Unsupported(FORWARD, "does not return one tensor")
        if call.changes_arguments:
            raise Unsupported(FORWARD, "changes a list or an object that it is given")
        self.recording, self.call, self.result = recording, call, call.result
        self.arguments = list(values_in((call.args, call.kwargs)))

    @cached_property
    def nodes(self) -> list[Node]:
        """All operations of the call."""
        return self.recording.nodes_in(self.call)

    @cached_property
    def live(self) -> set[Node]:
        """The operations that the result, or anything else that outlasts the call, depends on."""
        found: set[Node] = set()
        waiting = [node for node in self.nodes if not all(map(self.call.made, node.effects))]
        waiting += [self.result.maker] if self.result.maker else []
        while waiting:
            node = waiting.pop()
            if node in self.call and node not in found:
                found.add(node)
                waiting += [value.maker for value in node.values() if value.maker]
        return found

    @cached_property
    def parameters(self) -> set[str]:
        """The paths of all parameters, in the recorded module."""
        module = self.recording.root.module
        return {path for path, _ in module.named_parameters(remove_duplicate=False)}

    def relative(self, path: str) -> str:
        """A path in the recorded module as one in the module that was called."""
        return path.removeprefix(self.call.path).removeprefix(".")

    def place(self, node: Node) -> str:
        """Where an operation ran, as the subject of a sentence."""
        return self.relative(node.call.path) or FORWARD

    def module(self, path: str) -> nn.Module:
        """The copied module at a path in the recorded one."""
        return self.recording.root.module.get_submodule(path)

    def pieces(self, value: Value) -> tuple[Value, ...]:
        """The maps of which a value is the concatenation; none of them is one, in this call."""
        join = self.join_of(value)
        if join is None:
            return (value,)
        return tuple(
            [piece for part in values_in(join.inputs["tensors"]) for piece in self.pieces(part)]
        )

    def join_of(self, value: Value) -> Node | None:
        """The concatenation of channels in this call that made a value, if one did."""
        node = value.maker
        if node is None or node not in self.call or node.name != "cat":
            return None
        return node if node.inputs["dim"] in (1, 1 - len(value.shape)) else None

    def check_expected(self, node: Node) -> None:
        """Raise :class:`Unsupported` if an operation is not only what its name says."""
        for oddity in node.oddities:
            raise Unsupported(self.place(node), f"computes {node.name}, {oddity}")
        if node.autocast != self.call.context[1:]:
            raise Unsupported(
                self.place(node), f"computes {node.name} under an autocast of its own"
            )

    def check_runs_forward(self) -> None:
        """Raise :class:`Unsupported` if the call is not that of its class's forward alone."""
        patch = self.recording.patched.get(self.call.path)
        if patch in (OWN_FORWARD, OWN_CALL):
            raise Unsupported("the module", patch)

    def check_plain(self, inner: Call) -> None:
        """Raise :class:`Unsupported` if a module from here in to ``inner`` is patched."""
        call: Call | None = inner
        while call is not None and call is not self.call:
            patch = self.recording.patched.get(call.path)
            if patch is not None:
                raise Unsupported(self.relative(call.path), patch)
            call = call.parent

    def check_all_plain(self, opaque: Sequence[Call]) -> None:
        """Raise :class:`Unsupported` if a module is patched and not called in ``opaque`` calls.

        One that is never called may have its forward function called instead, which nothing shows.
        """
        for inner in self.call.below():
            if not any(inner.within(call) for call in opaque):
                self.check_plain(inner)
        called = {self.call.path, *(inner.path for inner in self.call.below())}
        prefix = f"{self.call.path}." if self.call.path else ""
        for path, patch in self.recording.patched.items():
            if patch == OWN_FORWARD and path.startswith(prefix) and path not in called:
                raise Unsupported(self.relative(path), patch)

    def check_runs_again(self, run: Call) -> None:
        """Raise :class:`Unsupported` if a call cannot be made again, by ``torch.autograd.grad``.

        What writes into a parameter would do so again.
        """
        for call in (run, *run.below()):
            if call.checkpoints:
                raise Unsupported(self.relative(call.path), "runs a reentrant checkpoint")
        for note in self.recording.notes_in(run):
            if not note.repeats:
                raise self.refusal(note)
        for node in self.recording.nodes_in(run):
            for value in node.effects:
                if value.path is not None and value.path in self.parameters:
                    changed = f"changes {self.relative(value.path)} in place"
                    raise Unsupported(self.place(node), changed)

    def check_nothing_else(self, claimed: Iterable[Node], opaque: Sequence[Call] = ()) -> None:
        """Raise :class:`Unsupported` if the call does more than is claimed or runs in ``opaque``.

        Concatenations need not be claimed.
        """
        self.check_all_plain(opaque)
        known = set(claimed)
        for node in self.nodes:
            if node not in self.live or any(node in call for call in opaque):
                continue
            join = any(self.join_of(value) for value in node.results)
            if node not in known and not join:
                raise Unsupported(self.place(node), f"computes {node.name} beside what is known")
            self.check_expected(node)
        for note in self.recording.notes_in(self.call):
            if note.changed is not None or not any(note.call.within(call) for call in opaque):
                raise self.refusal(note)

    def refusal(self, note: Note) -> Unsupported:
        """A note as a reason."""
        predicate = note.text.format(self.relative(note.changed or ""))
        return Unsupported(self.relative(note.call.path) or FORWARD, predicate)
