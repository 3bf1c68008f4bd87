"""Arguments of recorded calls: stand-ins for them, and what a call changes of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType

from torch import Tensor, nn

from efficient_densenet.convert.graph import Nest
from efficient_densenet.convert.twin import Unrecordable, hollow
from efficient_densenet.convert.values import PLAIN

HOLD_NOTHING = (*PLAIN, type(None), Tensor, nn.Module, type, FunctionType, BuiltinFunctionType)
"""What is the same at any time, or is compared elsewhere."""
CONTAINERS = (list, tuple, set, frozenset, deque)


def stand_ins(thing: Nest) -> Nest:
    """Arguments with hollow tensors for tensors, in containers of their own.

    Raises:
        Unrecordable: if one is used up by reading it.
    """
    if isinstance(thing, nn.Parameter):
        return nn.Parameter(hollow(thing), thing.requires_grad)
    if isinstance(thing, Tensor):
        made = hollow(thing)
        return made.requires_grad_().clone() if made.is_floating_point() else made  # no leaf
    if isinstance(thing, (list, tuple)):
        items = [stand_ins(item) for item in thing]
        return type(thing)(*items) if hasattr(thing, "_fields") else type(thing)(items)
    if isinstance(thing, Mapping):
        return {key: stand_ins(item) for key, item in thing.items()}
    if isinstance(thing, Iterator):
        raise Unrecordable(f"An argument is a {type(thing).__name__}, which reading uses up.")
    return thing


@dataclass(frozen=True)
class _Held:
    """A container or an object, its items if it has some, and its attributes if it has some."""

    thing: Nest
    items: tuple[Nest, ...]
    attributes: dict[str, Nest]

    @classmethod
    def of(cls, thing: Nest) -> _Held:
        if isinstance(thing, Mapping):
            items = tuple([item for pair in thing.items() for item in pair])
        else:
            items = tuple(thing) if isinstance(thing, CONTAINERS) else ()
        slots = [name for base in type(thing).__mro__ for name in _slots(base)]
        found = {name: getattr(thing, name) for name in slots if hasattr(thing, name)}
        return cls(thing, items, found | getattr(thing, "__dict__", {}))

    def values(self) -> list[Nest]:
        """All that it holds."""
        return [*self.items, *self.attributes, *self.attributes.values()]

    def is_left(self) -> bool:
        """Whether it holds the same now, and looking at it does not use it up."""
        before, now = self.values(), _Held.of(self.thing).values()
        same = len(before) == len(now) and all(map(_is, before, now))
        return same and not isinstance(self.thing, Iterator)

    def restore(self) -> None:
        """Let an object have the attributes that it had."""
        for name in _Held.of(self.thing).attributes.keys() - self.attributes.keys():
            delattr(self.thing, name)
        for name, value in self.attributes.items():
            if getattr(self.thing, name, None) is not value:
                setattr(self.thing, name, value)


class Contents:
    """What the containers and objects among ``arguments`` hold at this moment."""

    def __init__(self, *arguments: Nest) -> None:
        self._held: dict[int, _Held] = {}
        waiting: list[Nest] = [*arguments]
        while waiting:
            thing = waiting.pop()
            if id(thing) not in self._held and not isinstance(thing, HOLD_NOTHING):
                self._held[id(thing)] = _Held.of(thing)
                waiting += self._held[id(thing)].values()

    def are_left(self) -> bool:
        """Whether all hold the same now."""
        return all(held.is_left() for held in self._held.values())

    def restore(self) -> None:
        """Let all objects have the attributes that they had."""
        for held in self._held.values():
            held.restore()


def _is(one: Nest, other: Nest) -> bool:
    return one is other or (isinstance(one, PLAIN) and type(one) is type(other) and one == other)


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
