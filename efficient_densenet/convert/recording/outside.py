"""What a forward pass changes outside of the module that runs it: found, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from efficient_densenet.convert.recording.twin import INTERNAL, Unrecordable
from efficient_densenet.convert.state.contents import contents_of, put_back
from efficient_densenet.convert.state.surroundings import Found, Surroundings, is_foreign
from efficient_densenet.convert.state.values import LIMIT, Describer, Nest, TooLarge, class_of


@contextmanager
def put_back_outside(module: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """In the end undoes what the code of ``module`` changed outside of it.

    Gives a list, for what that was then: the path of the module whose code can reach it, its name.

    Raises:
        Unrecordable: if there is more than can be looked at.
    """
    parts = dict(module.named_modules())
    try:
        around = dict(_around(parts))
    except TooLarge:
        raise Unrecordable("Its code reads more outside of it than can be looked at.") from None
    changed: list[tuple[str, str]] = []
    try:
        yield changed
    finally:
        changed += [(path, name) for path, found in around.items() for name in found.changed()]
        for found in around.values():
            found.put_back()


def _around(parts: dict[str, nn.Module]) -> Iterator[tuple[str, _Around]]:
    """What the code of each module finds outside of it, for those that have code of the user's."""
    modules = [*parts.values()]
    held = Describer(modules)
    for path, part in parts.items():
        held.code = []
        for name, value in vars(part).items():
            if name not in INTERNAL:
                held(value)
        if held.code or not is_foreign(class_of(part)):
            yield path, _Around(class_of(part), held.code, modules)


class _Around:
    """What the code of a class, and other ``code``, finds outside of ``modules``."""

    def __init__(self, cls: type[nn.Module], code: list[Nest], modules: list[nn.Module]) -> None:
        describe = Describer(modules, limit=LIMIT, draws=True)
        around = Surroundings([cls], code, describe)
        self._found: list[tuple[Found, Nest]] = [(found, found.get()) for found in around.found]
        self._members = [(cls, {*vars(cls)}) for cls in around.classes]
        self._caches = [(cache, cache.cache_info().misses) for cache in around.caches]
        self._contents = contents_of(describe.met)
        self._modules = modules

    def changed(self) -> Iterator[str]:
        """What is not as it was: the first of what is replaced or changed, and all that is new."""
        describe = Describer(self._modules, draws=True)
        for found, _ in self._found:
            if not found.fits(describe):
                yield found.name
                break
        for cls, members in self._members:
            for name in vars(cls).keys() - members:
                yield f"{cls.__name__}.{name}"

    def put_back(self) -> None:
        """Let names stand for what they did, and containers and objects hold what they held."""
        for found, value in self._found:
            if found.get() is not value:
                found.put(value)
        for cls, members in self._members:
            for name in vars(cls).keys() - members:
                delattr(cls, name)
        for cache, misses in self._caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()  # of tensors without values
        put_back(self._contents)
