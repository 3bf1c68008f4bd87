"""The classes of converted modules: each a subclass of the class that the module had.

They are made when they are needed, and again by :func:`rebuild` in the process that loads a pickle.
"""

from __future__ import annotations

from abc import ABCMeta
from functools import cache, wraps
from typing import Any, ClassVar

from torch import nn

from efficient_densenet.convert.graph import Nest


class Converted(nn.Module):
    """First base of every converted class: how to go back, to copy and to pickle."""

    converted_from: ClassVar[type[nn.Module]]
    front: ClassVar[type[nn.Module]]

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Of no concern to the class behind, which may list its subclasses or ask for keywords."""
        if "converted_from" not in vars(cls):
            super().__init_subclass__(**keywords)

    def __reduce_ex__(self, protocol: Any) -> Nest:
        reduced: tuple[Nest, ...] = super().__reduce_ex__(max(2, protocol))  # type: ignore[assignment]
        return rebuild, (self.converted_from, self.front), *reduced[2:]


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before it was converted."""
    cls: type[nn.Module] = getattr(type(module), "converted_from", type(module))
    return cls


def converted_class(original: Any, front: Any) -> Nest:
    """The class of a converted module that was an ``original``; ``front`` stands before that."""
    return _made(original, front)


@cache
def _made(original: Any, front: Any) -> Nest:
    @wraps(original.forward)  # what asks for the signature finds the original's
    def forward(self: Any, *args: Nest, **kwargs: Nest) -> Nest:
        return front.forward(self, *args, **kwargs)

    names = {"converted_from": original, "front": front, "forward": forward, "is_generated": True}
    names |= {"__module__": __name__, "__doc__": original.__doc__}
    meta = type(original)
    make = ABCMeta.__new__ if issubclass(meta, ABCMeta) else type.__new__  # nothing of its own
    return make(meta, original.__name__, (Converted, front, original), names)


def rebuild(original: Any, front: Any) -> Nest:
    """An empty module of a converted class: what copies and pickles are filled into."""
    cls = converted_class(original, front)
    return cls.__new__(cls)
