"""What Python may decide by in a module and all below it: whether a recording still holds.

Norms and convolutions are read at every call; their parameters, and what schedules change of them,
need not be what they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import is_

import torch
from torch import Tensor, nn

from efficient_densenet.convert.state.surroundings import MISSING, Surroundings
from efficient_densenet.convert.state.values import (
    CHOICES,
    COMPILED,
    LIMIT,
    Describer,
    Nest,
    TooLarge,
    class_of,
    is_constant,
    is_same,
)
from efficient_densenet.modules.reading import CONVS, NORMS, Unsupported, is_patched

OFTEN = {COMPILED, "_is_replica", "_former_parameters"}
IGNORED = {*vars(nn.Module()), *OFTEN} - {"training"}
"""What every module has, what is compiled, and ``DataParallel``'s replicas."""
READ: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys(NORMS, ("momentum",)),
    **dict.fromkeys(CONVS, ("_reversed_padding_repeated_twice",)),
}
"""What is read of exactly these classes at every call, or follows from something else."""


@dataclass(frozen=True)
class _Part:
    """One module as it was.

    Attributes:
        cls: its class, or what that was before the conversion.
        children: their names.
        patched: whether calling it did more than its class's forward.
        plain: attributes that never change in place.
        other: all other attributes, as a :class:`values.Describer` has them.
        held: names of attributes that are tensors.
        tensors: names and shapes of its own parameters and buffers.
        entries: how many attributes it had in all.
    """

    cls: type[nn.Module]
    children: tuple[str, ...]
    patched: bool
    plain: tuple[tuple[str, object], ...]
    other: tuple[tuple[str, object], ...]
    held: tuple[str, ...]
    tensors: tuple[tuple[str, object], ...]
    entries: int

    @classmethod
    def of(cls, module: nn.Module, describe: Describer) -> _Part:
        known = class_of(module)
        plain, other, held = [], [], []
        for name, value in _attributes(known, vars(module)):
            description = describe(value)  # by which it meets the code in a constant, too
            if isinstance(value, Tensor):
                held.append(name)
            elif is_constant(value):
                plain.append((name, value))
            else:
                other.append((name, description))
        return cls(
            known,
            tuple(module._modules),
            is_patched(module),
            tuple(plain),
            tuple(other),
            tuple(held),
            tuple(_tensors(module)),
            len(vars(module)),
        )

    def fits(self, module: nn.Module, describe: Describer) -> bool:
        """Whether Python would decide the same by ``module``."""
        values = vars(module)
        for name, value in self.plain:  # a loop, since this runs at every call
            found = values.get(name, MISSING)
            if found is not value and not is_same(found, value):
                return False
        for name, value in self.other:
            if name not in values or describe(values[name]) != value:
                return False
        for name in self.held:
            if not isinstance(values.get(name), Tensor):
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
        for name in self.held:
            if not isinstance(getattr(module, name), Tensor):
                return False
        return class_of(module) is self.cls and not (self.patched or self.other)

    @cached_property
    def is_torch(self) -> bool:
        """Whether its class is PyTorch's: it is read at every call, or is no known unit."""
        return self.cls.__module__.startswith("torch.nn.")

    def _names(self) -> set[str]:
        return {*self.held, *(name for name, _ in (*self.plain, *self.other))}


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
            or all(is_same(found[name], value) for name, value in members.items())
        )


class Snapshot:
    """What Python may decide by in a module and all below it, at one moment.

    It names no module, so that it holds for copies as well.

    Attributes:
        is_too_large: whether there is more than can be compared at every call; it always holds.
    """

    def __init__(self, module: nn.Module) -> None:
        live = _walked(module)
        describe = Describer(live, limit=LIMIT)
        self._places = _places(live, describe)
        self._ties = list(_ties(live))
        self._parts: list[_Part] = []
        self._classes: list[_Members] = []
        try:
            self._parts += [_Part.of(part, describe) for part in live]
            classes = list(dict.fromkeys([part.cls for part in self._parts]))
            self._around = Surroundings(classes, describe.code, describe)
        except TooLarge:
            self.is_too_large = True
            return
        self.is_too_large = False
        bases = (base for cls in (*classes, *self._around.classes) for base in cls.__mro__)
        self._classes += [_Members.of(base) for base in dict.fromkeys(bases)]

    def __deepcopy__(self, memo: dict[int, object]) -> Snapshot:
        return self  # which nothing changes

    def holds(self, module: nn.Module) -> bool:
        """Whether Python would decide the same now, and no class has another method."""
        if self.is_too_large:
            return True
        live = _walked(module)
        if len(live) != len(self._parts):
            return False
        if torch.compiler.is_compiling():
            # The compiler compares whatever is looked at here again before each call.
            return self._is_tied(live) and all(
                [part.fits_as_traced(module) for module, part in zip(live, self._parts)]  # noqa: B905
            )
        describe = Describer(live, limit=LIMIT)
        try:
            return (
                _places(live, describe) == self._places
                and all([members.fit() for members in self._classes])
                and self._is_tied(live)
                and all(
                    part.fits(module, describe)
                    for module, part in zip(live, self._parts, strict=True)
                )
                and self._around.fit(describe)
            )
        except TooLarge:
            return False

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


def _walked(module: nn.Module) -> list[nn.Module]:
    """A module and all below it, as often as they are held."""
    live: list[nn.Module] = []
    _walk([module], live)
    return live


def _places(live: list[nn.Module], describe: Describer) -> list[int]:
    """Where each module is met first."""
    return [describe.numbers[id(module)] for module in live]


def _walk(modules: Iterable[nn.Module | None], into: list[nn.Module]) -> None:
    for module in modules:
        if module is not None:
            into.append(module)
            _walk(module._modules.values(), into)


def _attributes(cls: type[nn.Module], values: Mapping[str, Nest]) -> Iterator[tuple[str, Nest]]:
    """The attributes that Python may decide by, without the parameters of replicas."""
    left_out = {*READ.get(cls, ()), *values.get("_former_parameters", ())}
    for name, value in values.items():
        if name not in IGNORED and name not in CHOICES and name not in left_out:
            yield name, value


def _names(cls: type[nn.Module], values: Mapping[str, Nest]) -> set[str]:
    return {name for name, _ in _attributes(cls, values)}


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
        if snapshot.is_too_large:
            result = Unsupported("the module", "holds more than can be compared at every call")
        self._entries = [(snapshot, arguments, result), *self._entries][: self.LENGTH]

    def find(self, module: nn.Module, arguments: object) -> Nest:
        """What ``module`` was recognised as in the state that it is in, else ``None``."""
        for snapshot, known, result in self._entries:
            if known == arguments and snapshot.holds(module):
                return result
        return None
