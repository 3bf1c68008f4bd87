"""What a forward pass changes outside of the module that runs it: found, and put back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from torch import nn

from efficient_densenet.convert.converted import class_of
from efficient_densenet.convert.graph import Nest
from efficient_densenet.convert.surroundings import Found, Surroundings
from efficient_densenet.convert.twin import INTERNAL, Unrecordable
from efficient_densenet.convert.values import LIMIT, Describer, TooLarge


class Outside:
    """What the code of a module finds outside of it, before it runs.

    Raises:
        Unrecordable: if that is more than can be looked at.
    """

    def __init__(self, module: nn.Module) -> None:
        parts = dict(module.named_modules())
        self._parts = [*parts.values()]
        try:
            around = [(path, _Around(part, self._parts)) for path, part in parts.items()]
        except (TooLarge, RecursionError):
            raise Unrecordable(f"Its code reads more than {LIMIT} values outside of it.") from None
        self._around = [(path, found) for path, found in around if found.found or found.caches]

    def put_back(self) -> Iterator[tuple[str, str]]:
        """Undo what changed, after telling what that is, and by the code of which module."""
        changed = [(path, name) for path, around in self._around for name in around.changed()]
        for _, around in self._around:
            around.put_back()
        return iter(changed)


class _Around:
    """What the code of one module, which is one of ``parts``, finds outside of it."""

    def __init__(self, module: nn.Module, parts: list[nn.Module]) -> None:
        held, describe = Describer(parts), Describer(parts, limit=LIMIT, draws=True)
        for name, value in vars(module).items():
            if name not in INTERNAL:
                held(value)
        around = Surroundings([class_of(module)], held.code, describe)
        self.found: list[tuple[Found, Nest]] = [(found, found.get()) for found in around.found]
        self._members = [(cls, {*vars(cls)}) for cls in around.classes]
        self.caches = [(cache, cache.cache_info().misses) for cache in around.caches]
        self._kept = list(_contents(describe.met))
        self._parts = parts

    def changed(self) -> Iterator[str]:
        """What is not as it was: the first of what is replaced or changed, and all that is new."""
        describe = Describer(self._parts, draws=True)
        for found, _ in self.found:
            if not found.fits(describe):
                yield found.name
                break
        for cls, members in self._members:
            for name in vars(cls).keys() - members:
                yield f"{cls.__name__}.{name}"

    def put_back(self) -> None:
        """Let names stand for what they did, and containers and objects hold what they held."""
        for found, value in self.found:
            if found.get() is not value:
                found.put(value)
        for cls, members in self._members:
            for name in vars(cls).keys() - members:
                delattr(cls, name)
        for cache, misses in self.caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()  # of tensors without values
        for thing, contents in self._kept:
            if _held(thing) != _held(contents):
                thing.clear()
                thing.extend(contents) if hasattr(thing, "extend") else thing.update(contents)


def _held(thing: Nest) -> list[int]:
    """What a container holds, by identity: things need not know whether they are equal."""
    items = [*thing, *thing.values()] if isinstance(thing, dict) else thing
    return [id(item) for item in items]


def _contents(things: list[Nest]) -> Iterator[tuple[Nest, Nest]]:
    """What can be put back: lists, sets and dicts, also those of the attributes of objects."""
    for thing in things:
        for inside in (thing, getattr(thing, "__dict__", None)):
            if isinstance(inside, (list, deque, set)):
                yield inside, [*inside]
            elif isinstance(inside, dict):
                yield inside, dict(inside)
