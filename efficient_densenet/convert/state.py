"""What Python may decide by in a module and all below it: whether a recording still holds.

Norms and convolutions are read at every call; their parameters, and what schedules change of them,
need not be what they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from types import BuiltinFunctionType, FunctionType

import torch
from torch import Tensor, nn

from efficient_densenet.convert.converted import class_of
from efficient_densenet.convert.graph import Nest
from efficient_densenet.convert.twin import PLAIN, described
from efficient_densenet.modules.reading import CONVS, NORMS, is_patched

OFTEN = {"_compiled_call_impl", "_is_replica", "_former_parameters"}
IGNORED = {*vars(nn.Module()), *OFTEN} - {"training"}
"""What every module has, what is compiled, and ``DataParallel``'s replicas."""
CHOICES = {"_recompute", "_kernels", "_known"}
"""What a converted module has besides."""
READ: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys(NORMS, ("eps", "momentum")),
    **dict.fromkeys(CONVS, ("_reversed_padding_repeated_twice",)),
}
"""What is read of exactly these classes at every call, or follows from something else."""
MISSING = object()


@dataclass(frozen=True)
class _Part:
    """One module as it was.

    Attributes:
        cls: its class, or what that was before the conversion.
        first: where in the walk it was met first.
        children: their names.
        patched: whether calling it did more than its class's forward.
        plain: attributes that never change in place.
        other: all other attributes, as :func:`twin.described` has them.
        tensors: names and shapes of its own parameters and buffers.
        entries: how many attributes it had in all.
    """

    cls: type[nn.Module]
    first: int
    children: tuple[str, ...]
    patched: bool
    plain: tuple[tuple[str, object], ...]
    other: tuple[tuple[str, object], ...]
    tensors: tuple[tuple[str, object], ...]
    entries: int

    @classmethod
    def of(cls, module: nn.Module, first: int) -> _Part:
        known = class_of(module)
        plain, other = [], []
        for name, value in _attributes(known, vars(module)):
            if _is_constant(value):
                plain.append((name, value))
            else:
                other.append((name, described(value)))
        return cls(
            known,
            first,
            tuple(module._modules),
            is_patched(module),
            tuple(plain),
            tuple(other),
            tuple(_tensors(module)),
            len(vars(module)),
        )

    def fits(self, module: nn.Module) -> bool:
        """Whether Python would decide the same by ``module``."""
        values = vars(module)
        for name, value in self.plain:  # a loop, since this runs at every call
            found = values.get(name, MISSING)
            if found is not value and not _is_same(found, value):
                return False
        for name, value in self.other:
            if name not in values or described(values[name]) != value:
                return False
        return (
            class_of(module) is self.cls
            and is_patched(module) == self.patched
            and tuple(module._modules) == self.children
            and (len(values) == self.entries or self._names() == _names(self.cls, values))
            and (self.is_torch or tuple(_tensors(module)) == self.tensors)
        )

    def fits_as_traced(self, module: nn.Module) -> bool:
        """The same in what is compiled; where it cannot look, false."""
        for name, value in self.plain:
            if getattr(module, name) != value:
                return False
        return class_of(module) is self.cls and not (self.patched or self.other)

    @cached_property
    def is_torch(self) -> bool:
        """Whether its class is PyTorch's: it is read at every call, or is no known unit."""
        return self.cls.__module__.startswith("torch.nn.")

    def _names(self) -> set[str]:
        return {name for name, _ in (*self.plain, *self.other)}


@dataclass(frozen=True)
class _Members:
    """What a class, without its bases, held."""

    cls: type
    members: dict[str, object]

    @classmethod
    def of(cls, base: type) -> _Members:
        return cls(base, dict(vars(base)))

    def fit(self) -> bool:
        """Whether it holds the same."""
        found, members = vars(self.cls), self.members
        return found.keys() == members.keys() and (
            all(map(is_, found.values(), members.values()))
            or all(_is_same(found[name], value) for name, value in members.items())
        )


class Snapshot:
    """What Python may decide by in a module and all below it, at one moment.

    It names no module, so that it holds for copies as well.
    """

    def __init__(self, module: nn.Module) -> None:
        firsts: dict[int, int] = {}
        live: list[nn.Module] = []
        _walk([module], live)
        self._parts = [
            _Part.of(part, firsts.setdefault(id(part), i)) for i, part in enumerate(live)
        ]
        self._ties = list(_ties(live))
        bases = (base for part in self._parts for base in part.cls.__mro__)
        self._classes = [_Members.of(base) for base in dict.fromkeys(bases)]

    def __deepcopy__(self, memo: dict[int, object]) -> Snapshot:
        return self  # which nothing changes

    def holds(self, module: nn.Module) -> bool:
        """Whether Python would decide the same now, and no class has another method."""
        live: list[nn.Module] = []
        _walk([module], live)
        if len(live) != len(self._parts):
            return False
        if torch.compiler.is_compiling():
            # The compiler compares whatever is looked at here again before each call.
            return self._is_tied(live) and all(
                [part.fits_as_traced(module) for module, part in zip(live, self._parts)]  # noqa: B905
            )
        firsts: dict[int, int] = {}
        return (
            all(
                firsts.setdefault(id(module), i) == part.first and part.fits(module)
                for i, (module, part) in enumerate(zip(live, self._parts, strict=True))
            )
            and self._is_tied(live)
            and all([members.fit() for members in self._classes])
        )

    def _is_tied(self, live: list[nn.Module]) -> bool:
        """Whether tensors that were one still are; of separate ones, each is read by its path."""
        for (i, name), (j, other) in self._ties:
            if getattr(live[i], name, None) is not getattr(live[j], other, None):
                return False
        return True


def _ties(live: list[nn.Module]) -> Iterator[tuple[tuple[int, str], tuple[int, str]]]:
    """Every tensor that was met before, and where that was: a module's number and its name."""
    met: dict[int, tuple[int, str]] = {}
    for i, module in enumerate(live):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            j, other = met.setdefault(id(tensor), (i, name))
            if tensor is not None and not (live[j] is module and other == name):
                yield (j, other), (i, name)


def _walk(modules: Iterable[nn.Module | None], into: list[nn.Module]) -> None:
    for module in modules:
        if module is not None:
            into.append(module)
            _walk(module._modules.values(), into)


def _attributes(cls: type[nn.Module], values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """The attributes that Python may decide by."""
    for name, value in values.items():
        ignored = name in IGNORED or name in CHOICES or name in READ.get(cls, ())
        if not ignored and not isinstance(value, Tensor):
            yield name, value


def _names(cls: type[nn.Module], values: Mapping[str, object]) -> set[str]:
    return {name for name, _ in _attributes(cls, values)}


def _is_constant(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_constant(item) for item in value)
    return value is None or isinstance(value, (*PLAIN, FunctionType, BuiltinFunctionType, type))


def _is_same(found: object, value: object) -> bool:
    same_kind = type(found) is type(value) and _is_constant(value)
    return found is value or (same_kind and bool(found == value))


def _tensors(module: nn.Module) -> Iterator[tuple[str, object]]:
    """What there is of a module's own tensors."""
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            yield name, None if tensor is None else tuple(tensor.shape)


class Known:
    """What a module was recognised as, and in which state; pickles forget it."""

    LENGTH = 8

    def __init__(self) -> None:
        self._entries: list[tuple[Snapshot, object, object]] = []

    def __deepcopy__(self, memo: dict[int, object]) -> Known:
        copied = Known()
        copied._entries = list(self._entries)
        return copied

    def __reduce__(self) -> tuple[object, ...]:
        return Known, ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known, as after unpickling."""
        return not self._entries

    def add(self, snapshot: Snapshot, arguments: object, result: object) -> None:
        """Note ``result`` for calls with ``arguments`` while ``snapshot`` holds."""
        self._entries = [(snapshot, arguments, result), *self._entries][: self.LENGTH]

    def find(self, module: nn.Module, arguments: object) -> Nest:
        """What ``module`` was recognised as in the state that it is in, else ``None``."""
        for snapshot, known, result in self._entries:
            if known == arguments and snapshot.holds(module):
                return result
        return None
