"""The classes of converted modules: each a subclass of the class that the module had.

They are made when they are needed, and again by :func:`rebuild` in the process that loads a pickle.
"""

from __future__ import annotations

from abc import ABCMeta
from functools import cache, wraps
from typing import Any, ClassVar

from torch import nn

from efficient_densenet.convert.state.surroundings import is_foreign
from efficient_densenet.convert.state.values import Nest, class_of, set_class
from efficient_densenet.modules.reading import Unsupported


class Converted(nn.Module):
    """First base of every converted class: how to go back, to copy and to pickle."""

    _recomputing_original: ClassVar[type[nn.Module]]
    _recomputing_front: ClassVar[type[nn.Module]]
    _recomputing_is_generated: ClassVar[bool]

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Of no concern to the class behind, which may list its subclasses or ask for keywords."""
        if "_recomputing_original" not in vars(cls):
            cls._recomputing_is_generated = False
            super().__init_subclass__(**keywords)

    def __reduce_ex__(self, protocol: Any) -> Nest:
        if is_derived(type(self)):
            return super().__reduce_ex__(protocol)
        reduced: tuple[Nest, ...] = super().__reduce_ex__(max(2, protocol))  # type: ignore[assignment]
        make, args, *state = reduced
        parts = [self._recomputing_original if p is type(self) else p for p in (make, *args)]
        own = {k: v for k, v in vars(self).items() if k.startswith("_recomputing_")}
        return rebuild, (self._recomputing_front, own, *parts), *state


def converted_class(original: Any, front: Any) -> Nest:
    """The class of a converted module that was an ``original``; ``front`` stands before that."""
    return _made(original, front)


def is_derived(cls: type[nn.Module]) -> bool:
    """Whether a class was made from that of a converted module, as ``fully_shard`` makes one."""
    return issubclass(cls, Converted) and not cls._recomputing_is_generated


def check_not_derived(cls: type[nn.Module]) -> None:
    """Raise :class:`Unsupported` for a class derived by anyone but PyTorch: it may compute more."""
    for base in cls.__mro__:
        if vars(base).get("_recomputing_is_generated"):
            return
        if not is_foreign(base):
            raise Unsupported("the class", "is derived from that of a converted module")


def check_convertible(module: nn.Module, front: Any) -> None:
    """Raise :class:`Unsupported` unless ``front`` can stand before a module's class."""
    original = class_of(module)
    for name in _offered(front):
        own = (vars(module), module._parameters, module._buffers, module._modules)
        if hasattr(original, name) or any(name in names for names in own):
            raise Unsupported("the module", f"has {name}, and so do converted modules")
    try:
        set_class(object.__new__(original), converted_class(original, front))
    except TypeError as error:
        raise Unsupported("the class", f"has no place for what recomputes: {error}") from error


@cache
def _offered(front: Any) -> list[str]:
    """The attributes that are for whoever uses a converted module."""
    bases = front.__mro__[: front.__mro__.index(nn.Module)]
    names = {name for base in bases for name in vars(base) if not name.startswith("_")}
    return sorted(names - {"forward", "extra_repr"})


@cache
def _made(original: Any, front: Any) -> Nest:
    @wraps(original.forward)  # what asks for the signature finds the original's
    def forward(self: Any, *args: Nest, **kwargs: Nest) -> Nest:
        return front.forward(self, *args, **kwargs)

    names = {"_recomputing_original": original, "_recomputing_front": front, "forward": forward}
    names |= {"_recomputing_is_generated": True, "__module__": __name__}
    names["__doc__"] = original.__doc__
    meta = type(original)
    make = ABCMeta.__new__ if issubclass(meta, ABCMeta) else type.__new__  # nothing of its own
    return make(meta, original.__name__, (*_layout(original), Converted, front, original), names)


def _layout(original: Any) -> tuple[type, ...]:
    """A first base for classes that have one without attributes before ``nn.Module``.

    An object can get another class only if both lay out objects by the same first bases.
    """
    first = original
    while first.__base__.__dictoffset__:
        first = first.__base__
    empty: type = first.__base__
    names = {"__orig_bases__": ()}  # else ``Generic`` asks for type variables
    return () if empty is object else (type(empty)(empty.__name__, (empty,), names),)


def rebuild(front: Any, own: dict[str, Nest], make: Any, *args: Nest) -> Nest:
    """A converted module that is yet to be filled: what copies and pickles begin with.

    ``make(*args)`` is what its class would begin with, ``own`` what the conversion has added.
    """
    module = make(*args)
    set_class(module, converted_class(type(module), front))
    vars(module).update(own)
    return module
