"""Builds a recording while a forward pass runs on tensors without values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_densenet.convert.recording.arguments import ArgumentContents
from efficient_densenet.convert.recording.graph import (
    Arguments,
    Call,
    Keywords,
    Node,
    Note,
    Recording,
    Value,
    values_in,
)
from efficient_densenet.convert.recording.questions import (
    OF_THE_GRAPH,
    Functions,
    context_now,
    is_grad_enabled,
)
from efficient_densenet.convert.recording.twin import Unrecordable, hollow, tensors_in, told
from efficient_densenet.convert.state.contents import put_back
from efficient_densenet.convert.state.values import Nest

aten = torch.ops.aten


class Tracer:
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
        self.given: dict[Call, ArgumentContents]

    def run(self, module: nn.Module, args: Arguments, kwargs: Keywords) -> Recording:
        args_, kwargs_ = self.nest(args, given=True), self.nest(kwargs, given=True)
        root = Call("", module, args_, kwargs_, None, 0, context_now())
        self.call, self.recording = root, Recording(root)
        self.given = {root: ArgumentContents(args, kwargs)}
        before = self.given[root].copied()
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
            self.given[here] = ArgumentContents(args, kwargs)

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

    def __init__(self, tracer: Tracer) -> None:
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
