"""What a value is, as far as Python may decide by it."""

from __future__ import annotations

import random
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Nest = Any
"""Numbers, strings, ``None``, tensors, other objects, and lists, tuples, dicts of them."""
PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
ATOMS = (FunctionType, BuiltinFunctionType, type, ModuleType, Enum)
"""What a copy of a module shares with it: decided by as it is, or by what its code names."""
CHOICES = {"_recomputing_mode", "_recomputing_kernels", "_recomputing_known"}
"""What a converted module has besides."""
COMPILED = "_compiled_call_impl"
LIMIT = 50_000
"""How many values with contents may be looked at before a call."""
DEPTH = 100
"""How deep they may lie in each other."""


class TooLarge(Exception):
    """There is more to look at than a call should wait for."""


class Describer:
    """Describes values, one after the other.

    Python decides the same by two series of values if their descriptions are equal. A description
    holds for copies as well: whatever has contents is described by these, and by a number when it
    is met again, so that it may contain itself. Contents are those that ``copy`` would carry over;
    what cannot be copied, tensors and code are described as themselves.

    Attributes:
        numbers: of everything that was met, by its ``id``; the first of several for a part.
        code: the functions and classes that were met; what they name is not described.

    Args:
        parts: modules that are looked at anyhow: they are described by their places.
        limit: how many values may have contents, ``None`` for any number.
        draws: whether generators of random numbers are described by how far they are.

    Raises:
        TooLarge: if there are more, or they lie too deep in each other.
    """

    def __init__(
        self, parts: Sequence[nn.Module] = (), *, limit: int | None = None, draws: bool = False
    ) -> None:
        last_first = range(len(parts) - 1, -1, -1)
        self.numbers = dict(zip(map(id, reversed(parts)), last_first, strict=True))
        self.parts = len(parts)
        self.met: list[object] = []  # which keeps it alive, and its number its own
        self.code: list[Nest] = []
        self.limit, self.draws, self.depth = limit, draws, 0

    def __call__(self, value: Nest) -> Nest:
        if value is None or isinstance(value, PLAIN):
            return type(value), value
        if isinstance(value, ATOMS):
            self.code.append(value)
            return Same(value)
        if isinstance(value, Tensor):
            return Same(value)
        if isinstance(value, tuple):
            return type(value), [self(item) for item in value]
        number = self.numbers.get(id(value))
        if number is not None:
            return number
        self.numbers[id(value)] = number = self.parts + len(self.met)
        self.met.append(value)
        if self.depth >= DEPTH or (self.limit is not None and len(self.met) > self.limit):
            raise TooLarge
        self.depth += 1
        contents = self._contents(value)
        self.depth -= 1
        return class_of(value), number, contents

    def _contents(self, value: Nest) -> Nest:
        kind = type(value)
        if isinstance(value, nn.Module):
            self.code.append(class_of(value))
            left_out = {*CHOICES, COMPILED}
            return [(name, self(v)) for name, v in vars(value).items() if name not in left_out]
        if isinstance(value, torch.autocast):  # keeps what it has to put back
            return [(k, self(v)) for k, v in vars(value).items() if not k.startswith("prev")]
        if kind is list:
            return [self(item) for item in value]
        if kind is dict or kind is OrderedDict:
            return [(self(key), self(item)) for key, item in value.items()]
        if kind is set or kind is frozenset:
            return {(type(v), v) if isinstance(v, PLAIN) else Same(v) for v in value}
        if kind is MethodType:
            return self(value.__func__), self(value.__self__)
        if kind is weakref.ref:
            return self(value())
        if not self.draws and _is_generator(value):
            return None
        return self._copied(value)

    def _copied(self, value: Nest) -> Nest:
        """What a copy of it would be made of."""
        hasattr(value, "__dict__")  # which some objects make when they are asked for it
        try:
            parts = value.__reduce_ex__(4)
        except Exception:
            return Same(value)
        if isinstance(parts, str):
            self.code.append(value)
            return Same(value)
        self.code.append(type(value))
        return [self([*part] if isinstance(part, Iterator) else part) for part in parts]


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before it was converted."""
    cls: type[nn.Module] = getattr(type(module), "_recomputing_original", type(module))
    return cls


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, whatever its own says to attributes that are set."""
    object.__setattr__(module, "__class__", cls)


def is_constant(value: object) -> bool:
    """Whether a value never changes, but for what the code in it finds."""
    if isinstance(value, tuple):
        return all(is_constant(item) for item in value)
    return value is None or isinstance(value, (*PLAIN, *ATOMS))


def is_same(found: object, value: object) -> bool:
    """Whether it is the same value, or an equal constant."""
    same_kind = type(found) is type(value) and is_constant(value)
    return found is value or (same_kind and bool(found == value))


def _is_generator(value: object) -> bool:
    """Whether it draws random numbers: what Python decides by is the next one."""
    is_numpys = type(value).__module__.startswith("numpy.random")
    return is_numpys or isinstance(value, (random.Random, torch.Generator))


class Same:
    """Equal only to what wraps the same object, which it does not keep alive if it need not."""

    def __init__(self, thing: Nest) -> None:
        self.number = id(thing)
        try:
            self.thing: Callable[[], object] = weakref.ref(thing)
        except TypeError:
            self.thing = lambda: thing

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Same) or self.number != other.number:
            return False
        return self.thing() is other.thing()

    def __hash__(self) -> int:
        return self.number


def described(value: Nest) -> Nest:
    """One value by itself; what lies too deep in it equals nothing."""
    try:
        return Describer(draws=True)(value)
    except TooLarge:
        return object()
