"""Copies of modules without values, on which a forward pass can run and leaves no trace."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode

from efficient_densenet.convert.recording.graph import Arguments, Function, Keywords
from efficient_densenet.convert.state.values import (
    COMPILED,
    DEPTH,
    Describer,
    Nest,
    TooLarge,
    class_of,
    set_class,
)
from efficient_densenet.modules.reading import has_own_call
from efficient_densenet.modules.recomputing import Settings

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
INTERNAL = {*HOOKS, "_parameters", "_buffers", "_modules", COMPILED}
OWN_FORWARD = "has a forward function of its own"
OWN_CALL = "has a call function of its own"
SOME_MOMENTUM = 0.1


class Unrecordable(Exception):
    """Why a forward pass cannot be recorded, as a whole sentence."""


@dataclass(frozen=True)
class Twin:
    """A module's copy on the device ``meta``.

    Attributes:
        module: the copy; without hooks, and without forward functions of single instances.
        paths: of every parameter and buffer of the copy by its ``id``; the first of several.
        patched: what calling a module does beside its class's forward, by its path.
    """

    module: nn.Module
    paths: dict[int, str]
    patched: dict[str, str]


def twin_of(module: nn.Module) -> Twin:
    """The twin of a module.

    Raises:
        Unrecordable: if it cannot be copied, or runs what Python does not see.
    """
    if _has_any_global_hook():
        raise Unrecordable("There are global module hooks.")
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise Unrecordable(f"{called(path)} is a ScriptModule.")
    memo: dict[int, Any] = dict(_hollow_tensors(module))
    for part in module.modules():
        # Their owners may not be copied, let alone called.
        memo |= {id(vars(part)[name]): OrderedDict() for name in HOOKS if vars(part).get(name)}
        # What is compared with by identity alone.
        memo |= {id(value): value for value in vars(part).values() if type(value) is object}
    try:
        with _HollowCopies():
            twin = copy.deepcopy(module, memo)
    except Exception as error:
        raise Unrecordable(f"It cannot be copied: {told(error)}.") from error
    patched = dict(_patches(module))
    for part in twin.modules():
        _make_runnable(part)
    tensors: list[tuple[str, Tensor]] = [*twin.named_parameters(remove_duplicate=False)]
    tensors += twin.named_buffers(remove_duplicate=False)
    return Twin(twin, {id(tensor): path for path, tensor in reversed(tensors)}, patched)


def called(path: str) -> str:
    """What a module is called in a sentence."""
    return path or "The module"


def told(error: Exception) -> str:
    """The kind and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _hollow_tensors(module: nn.Module) -> Iterator[tuple[int, Tensor]]:
    """The hollow tensor of every parameter and buffer, by the ``id`` of its original."""
    ours = dict(module.named_parameters())
    for path, tensor in (*ours.items(), *module.named_buffers()):
        if type(tensor) not in (nn.Parameter, Tensor, nn.Buffer):
            raise Unrecordable(f"{path} is a {type(tensor).__name__}.")
        copied = hollow(tensor)
        yield id(tensor), nn.Parameter(copied, tensor.requires_grad) if path in ours else copied


def hollow(tensor: Tensor) -> Tensor:
    """A tensor without values of the same shape and type."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def tensors_in(nest: Nest) -> Iterator[Tensor]:
    """All tensors among arguments, in order."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, (list, tuple)):
        for item in nest:
            yield from tensors_in(item)
    elif isinstance(nest, Mapping):
        for item in nest.values():
            yield from tensors_in(item)


class _HollowCopies(TorchFunctionMode):
    """Copies of tensors are hollow."""

    def __torch_function__(
        self, func: Function, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> Nest:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), hollow(tensor))
        if func is Tensor.clone:
            return hollow(args[0])
        return func(*args, **(kwargs or {}))


class _Alone(nn.SyncBatchNorm):
    """A synchronised norm in a process without others."""

    forward = _BatchNorm.forward


def _make_runnable(part: nn.Module) -> None:
    """Take from a copied module what would run elsewhere, or reads values."""
    vars(part).pop("forward", None)
    vars(part).pop(COMPILED, None)
    set_class(part, class_of(part))
    if isinstance(part, Settings):
        vars(part)["_recomputing_mode"] = "none"
    if isinstance(part, nn.SyncBatchNorm):
        cls = type(part)
        bases = (_Alone,) if cls is nn.SyncBatchNorm else (cls, _Alone)
        set_class(part, type(cls.__name__, bases, {"_recomputing_original": cls}))
    if isinstance(part, _BatchNorm) and part.momentum is None:
        vars(part)["momentum"] = SOME_MOMENTUM  # else it reads how many batches there were


def _patches(module: nn.Module) -> Iterator[tuple[str, str]]:
    for path, part in module.named_modules():
        if "forward" in vars(part):
            yield path, OWN_FORWARD
        elif not path and has_own_call(type(part)):
            yield path, OWN_CALL  # that of a module below is recorded as its caller's
        elif any(vars(part).get(name) for name in HOOKS):
            yield path, "has hooks"


@contextmanager
def untouched_random_numbers() -> Iterator[None]:
    """Leaves all generators of random numbers as they were.

    Raises:
        Unrecordable: if the state of one of them changed.
    """
    generators: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (torch.get_rng_state, torch.set_rng_state),
        (random.getstate, random.setstate),
    ]
    if "numpy" in sys.modules:
        numpy_random = sys.modules["numpy"].random
        generators.append((numpy_random.get_state, numpy_random.set_state))
    if torch.cuda.is_initialized():
        generators.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    states = [get() for get, _ in generators]
    try:
        yield
        after = [get() for get, _ in generators]
    finally:
        for (_, restore), state in zip(generators, states, strict=True):
            restore(state)
    if _as_lists(after) != _as_lists(states):
        raise Unrecordable("It draws or seeds random numbers, but not by an operation.")


def _as_lists(state: Nest) -> Nest:
    """The state of a generator with lists for tensors and arrays."""
    if isinstance(state, (list, tuple)):
        return [_as_lists(item) for item in state]
    return state.tolist() if hasattr(state, "tolist") else state


def plain_attributes(module: nn.Module) -> dict[str, Keywords]:
    """By the path of every module below ``module``: all that Python may decide by.

    That is its class, its attributes, the names and shapes of its tensors and which of them are
    one, its children and what is patched. Two such are equal if a forward pass that was recorded
    with one holds for the other.

    Raises:
        Unrecordable: if there is more than can be looked at.
    """
    try:
        return _plain_attributes(module)
    except TooLarge:
        raise Unrecordable(f"It holds values that lie more than {DEPTH} deep.") from None


def _plain_attributes(module: nn.Module) -> dict[str, Keywords]:
    parts = dict(module.named_modules())
    describe = Describer([*parts.values()], draws=True)
    numbers: dict[int, int] = {}

    def identity(thing: object) -> int:
        return numbers.setdefault(id(thing), len(numbers))

    found = {}
    for path, part in parts.items():
        entries: Keywords = {"": type(part)}
        for name, value in vars(part).items():
            if name in HOOKS:
                if value:
                    entries[name] = len(value)
            elif name == "_modules":
                entries[name] = [(key, identity(child)) for key, child in value.items()]
            elif name in ("_parameters", "_buffers"):
                entries[name] = [
                    (key, None if t is None else (identity(t), t.shape)) for key, t in value.items()
                ]
            elif name != COMPILED:
                entries[name] = describe(value)
        found[path] = entries
    return found
