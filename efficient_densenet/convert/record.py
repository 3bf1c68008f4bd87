"""Records a forward pass as a graph of ATen operations, on a copy of the module without values.

What is recorded holds for every shape and type: whatever Python asks of a map is noted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from efficient_densenet.convert.arguments import Contents, own_class, stand_ins
from efficient_densenet.convert.asked import (
    OF_THE_GRAPH,
    Functions,
    context_now,
    is_grad_enabled,
    told_to,
)
from efficient_densenet.convert.contents import put_back
from efficient_densenet.convert.graph import (
    Arguments,
    Call,
    Keywords,
    Nest,
    Node,
    Note,
    Recording,
    Value,
    values_in,
)
from efficient_densenet.convert.outside import put_back_outside
from efficient_densenet.convert.twin import (
    Unrecordable,
    hollow,
    plain_attributes,
    tensors_in,
    told,
    twin_of,
    untouched_random_numbers,
)

aten = torch.ops.aten
MOST_QUESTIONS = 3
"""Of how many all combinations of answers are tried."""


def record(
    module: nn.Module,
    args: Sequence[Nest],
    kwargs: Mapping[str, Nest] | None = None,
    *,
    training: bool | None = None,
) -> Recording:
    """What ``module(*args, **kwargs)`` does, without doing it.

    Tensors among the arguments give their shapes and types; no value is read, nothing is changed.
    ``training`` is the mode of the module and all in it, ``None`` the one that each is in. A
    forward pass that fails on stand-ins is recorded up to there.

    Raises:
        Unrecordable: if it does not even start, or leaves traces.
    """
    recording, answered = _recorded(module, args, kwargs or {}, training)

    def outline(contrary: frozenset[str] = frozenset(), made: type[Tensor] | None = None) -> Nest:
        try:
            return _recorded(module, args, kwargs or {}, training, contrary, made)[0].outline()
        except Unrecordable as reason:
            return str(reason)

    first, few = recording.outline(), len(answered) <= MOST_QUESTIONS
    outlines = {others: outline(others) for others in _subsets(answered)} if few else {}
    outlines[frozenset()] = first
    for question, notes in answered.items():
        if not few or any(outlines[o] != outlines[o - {question}] for o in outlines):
            recording.notes += notes
    for own in dict.fromkeys(filter(None, map(own_class, tensors_in((args, kwargs))))):
        # It says itself, when it runs, what its operations make.
        if any(outline(made=made) != first for made in (Tensor, own)):
            text = f"does something else with a {own.__name__}"
            recording.notes.append(Note(text, recording.root))
    return recording


def _subsets(names: Collection[str]) -> Iterator[frozenset[str]]:
    """All subsets of names but the empty one."""
    for number in range(1, len(names) + 1):
        yield from map(frozenset, combinations(names, number))


def _recorded(
    module: nn.Module,
    args: Sequence[Nest],
    kwargs: Mapping[str, Nest],
    training: bool | None,
    contrary: frozenset[str] = frozenset(),
    made: type[Tensor] | None = None,
) -> tuple[Recording, dict[str, list[Note]]]:
    """A recording, and by their names the questions that had two answers.

    To those that are ``contrary`` the answer is the other one. Arguments are of their own classes
    if ``made`` is given, the class of what operations make.
    """
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor))
        twin = twin_of(module)
        if training is not None:
            _set_mode(twin.module, training)
        before = plain_attributes(twin.module)
        outside = stack.enter_context(put_back_outside(twin.module))
        stack.enter_context(untouched_random_numbers())
        tracer = _Tracer(twin.paths, contrary, made or Tensor)
        stack.enter_context(told_to(tracer, twin.module))
        stack.enter_context(torch._C.DisableTorchFunctionSubclass())
        given = stand_ins((tuple(args), {**kwargs}), as_own=made is not None)
        recording = tracer.run(twin.module, *given)
        recording.patched = twin.patched
    after = plain_attributes(twin.module)
    for path in dict.fromkeys((*before, *after)):
        was, now = before.get(path, {}), after.get(path, {})
        for name in dict.fromkeys((*was, *now)):
            if name not in was or name not in now or was[name] != now[name]:
                call = recording.last_call(path)
                changed = f"{path}.{name}" if path else name
                recording.notes.append(Note("changes {} when it runs", call, changed))
    for path, name in outside:
        recording.notes.append(Note("changes {} when it runs", recording.last_call(path), name))
    return recording, tracer.answered


def _set_mode(module: nn.Module, training: bool) -> None:
    try:
        module.train(training)
    except Exception as error:
        raise Unrecordable(f"Its mode cannot be changed ({told(error)}).") from error


class _Tracer:
    """Builds a recording from what its two modes and the hooks of the twin see."""

    def __init__(
        self, paths: Mapping[int, str], contrary: frozenset[str], made: type[Tensor]
    ) -> None:
        self.paths, self.contrary, self.made = paths, contrary, made
        self.answered: dict[str, list[Note]] = {}
        self.values: dict[int, tuple[Tensor, Value, int]] = {}
        self.writes: dict[int, int] = {}
        self.owners: dict[int, Value] = {}
        self.functions = Functions(self)
        self.recording: Recording
        self.call: Call
        self.given: dict[Call, Contents]

    def run(self, module: nn.Module, args: Arguments, kwargs: Keywords) -> Recording:
        args_, kwargs_ = self.nest(args, given=True), self.nest(kwargs, given=True)
        root = Call("", module, args_, kwargs_, None, 0, context_now())
        self.call, self.recording = root, Recording(root)
        self.given = {root: Contents(args, kwargs)}
        before = self.given[root].kept()
        hooks = []
        for path, part in module.named_modules():
            if path:
                hooks.append(part.register_forward_pre_hook(self.enter(path), with_kwargs=True))
                hooks.append(part.register_forward_hook(self.leave, with_kwargs=True))
        try:
            with self.functions, _Operations(self):
                root.result = self.nest(module(*args, **kwargs))
            self.close(root)
        except Exception as error:
            subject = self.call.path or "the forward function"
            self.recording.error = subject, f"cannot run on stand-ins ({told(error)})"
        for hook in hooks:
            hook.remove()
        put_back(before)
        return self.recording

    def enter(self, path: str) -> Nest:
        def hook(module: nn.Module, args: Nest, kwargs: Nest) -> None:
            here = Call(
                path,
                module,
                self.nest(args),
                self.nest(kwargs),
                self.call,
                len(self.recording.nodes),
                context_now(),
            )
            self.call.children.append(here)
            self.call = here
            self.given[here] = Contents(args, kwargs)

        return hook

    def leave(self, module: nn.Module, args: Nest, kwargs: Nest, result: Nest) -> None:
        while self.call.module is not module:  # calls that raised, and were caught
            assert self.call.parent is not None
            self.call = self.call.parent
        self.call.result = self.nest(result)
        self.close(self.call)
        assert self.call.parent is not None
        self.call = self.call.parent

    def close(self, call: Call) -> None:
        """Note that a call came to its end."""
        call.stop = len(self.recording.nodes)
        if context_now() != call.context:
            text = "leaves autograd or autocast in another mode"
            self.recording.notes.append(Note(text, call, call.path))
        call.changes_arguments = not self.given.pop(call).are_left()

    def nest(self, thing: Nest, given: bool = False) -> Nest:
        """An argument or a result with values for tensors."""
        if isinstance(thing, Tensor):
            return self.value(thing, given)
        if isinstance(thing, (list, tuple)):
            return tuple([self.nest(item, given) for item in thing])
        if isinstance(thing, Mapping):
            return {key: self.nest(item, given) for key, item in thing.items()}
        return thing

    def value(self, tensor: Tensor, given: bool = False) -> Value:
        """What a tensor holds now."""
        found = self.values.get(id(tensor))
        if found is None:
            value = Value(tuple(tensor.shape), path=self.paths.get(id(tensor)), given=given)
            self.owners.setdefault(_storage(tensor), value)
            return self.hold(tensor, value)
        return found[1]

    def hold(self, tensor: Tensor, value: Value) -> Value:
        self.values[id(tensor)] = tensor, value, self.writes.get(_storage(tensor), 0)
        return value

    def is_stale(self, tensor: Tensor) -> bool:
        """Whether its memory was written since, but by way of another tensor."""
        found = self.values.get(id(tensor))
        return found is not None and found[2] != self.writes.get(_storage(tensor), 0)

    def add(self, func: OpOverload, args: Arguments, kwargs: Keywords) -> Nest:
        """Run an operation on stand-ins, and record it."""
        for tensor in tensors_in((args, kwargs)):
            if not tensor.is_meta and func is not aten.lift_fresh.default:
                raise Unrecordable("it reads a tensor that is no part of it")
        schema = func._schema
        inputs = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        inputs |= {a.name: arg for a, arg in zip(schema.arguments, args, strict=False)}
        inputs |= kwargs
        written = [inputs[a.name] for a in schema.arguments if a.is_write]
        oddities = self.oddities(inputs)
        read = self.nest(inputs)
        result = _run(func, args, kwargs)
        node = Node(
            name=schema.name.removeprefix("aten::").removesuffix("_"),
            inputs=read,
            results=[],
            effects=[],
            call=self.call,
            index=len(self.recording.nodes),
            oddities=oddities,
            autocast=self.functions.autocast,
        )
        self.recording.nodes.append(node)
        for value in dict.fromkeys(values_in(read)):
            value.uses.append(node)
        for tensor in tensors_in(written):
            storage = _storage(tensor)
            self.writes[storage] = self.writes.get(storage, 0) + 1
            node.effects.append(self.owners[storage])
        if func is aten.native_batch_norm.default and args[5]:
            node.effects += [
                value for value in (read["running_mean"], read["running_var"]) if value
            ]
        for tensor in tensors_in((result,)):
            path = self.paths.get(id(tensor))
            value = Value(tuple(tensor.shape), node, path)
            self.owners.setdefault(_storage(tensor), value)
            node.results.append(self.hold(tensor, value))
            if type(tensor) is Tensor and self.made is not Tensor:
                tensor.__class__ = self.made
        return result

    def oddities(self, inputs: Mapping[str, Nest]) -> list[str]:
        found = []
        if not self.functions.inside:
            found.append("which runs outside of Python")
        if any(self.is_stale(tensor) for tensor in tensors_in((inputs,))):
            found.append("which reads a map that was changed in place through another one")
        learns = any(tensor.requires_grad for tensor in tensors_in((inputs,)))
        if learns and not is_grad_enabled():
            found.append("which autograd does not see")
        return found

    def note_checkpoint(self) -> None:
        self.call.checkpoints = True

    def note(self, text: str, repeats: bool = True) -> None:
        self.recording.notes.append(Note(text, self.call, repeats=repeats))

    def answer(self, question: str, text: str, answer: Nest) -> Nest:
        if not isinstance(answer, bool):
            self.note(text)
            return answer
        note = Note(text, self.call, repeats=question not in OF_THE_GRAPH)
        self.answered.setdefault(question, []).append(note)
        return answer != (question in self.contrary)


class _Operations(TorchDispatchMode):
    """Records every operation."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> Nest:
        return self.tracer.add(func, args, kwargs or {})


def _run(func: OpOverload, args: Arguments, kwargs: Keywords) -> Nest:
    if func is aten.lift_fresh.default:
        return hollow(args[0])
    if func is aten.native_batch_norm.default and args[5]:
        x, weight, bias, mean, var = args[:5]
        vectors = [t for t in (weight, bias, mean, var) if t is not None]
        if all(t.shape == x.shape[1:2] for t in vectors):
            # PyTorch takes milliseconds to find this.
            mean, var = (torch.empty(x.shape[1:2], dtype=x.dtype, device="meta") for _ in range(2))
            return torch.empty_like(x), mean, var
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs = {**kwargs, "device": torch.device("meta")}
    return func(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
