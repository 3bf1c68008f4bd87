"""Arguments of recorded calls: stand-ins for them, and what a call changes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from efficient_densenet.convert.recording.twin import Unrecordable, hollow
from efficient_densenet.convert.state.contents import Contents, contents_of
from efficient_densenet.convert.state.values import Describer, Nest, TooLarge, described


def own_class(tensor: Tensor) -> type[Tensor] | None:
    """A class that carries something besides what ``Tensor`` does, and that Python may ask for."""
    cls = type(tensor)
    is_tensor = cls is Tensor or cls.__torch_dispatch__ is not Tensor.__torch_dispatch__
    return None if is_tensor or isinstance(tensor, nn.Parameter) else cls


def stand_ins(thing: Nest, as_own: bool = False) -> Nest:
    """Arguments with hollow tensors for tensors, in containers of their own.

    They are plain tensors, unless they are to be ``as_own`` classes.

    Raises:
        Unrecordable: if one is used up by reading it.
    """
    if isinstance(thing, nn.Parameter):
        return nn.Parameter(hollow(thing), thing.requires_grad)
    if isinstance(thing, Tensor):
        made = hollow(thing)
        made = made.requires_grad_().clone() if made.is_floating_point() else made  # no leaf
        if as_own and (own := own_class(thing)):
            made.__class__ = own
        return made
    if isinstance(thing, (list, tuple)):
        items = [stand_ins(item, as_own) for item in thing]
        return type(thing)(*items) if hasattr(thing, "_fields") else type(thing)(items)
    if isinstance(thing, Mapping):
        return {key: stand_ins(item, as_own) for key, item in thing.items()}
    if isinstance(thing, Iterator):
        raise Unrecordable(f"An argument is a {type(thing).__name__}, which reading uses up.")
    return thing


class ArgumentContents:
    """What the containers and objects among ``arguments`` hold at this moment.

    Raises:
        Unrecordable: if that is more than can be looked at.
    """

    def __init__(self, *arguments: Nest) -> None:
        describe = Describer(draws=True)
        try:
            self._arguments, self._description = arguments, describe(arguments)
        except TooLarge:
            raise Unrecordable("An argument holds more than can be looked at.") from None
        self._met = describe.met

    def are_left(self) -> bool:
        """Whether all hold the same now, and nothing is used up by looking at it."""
        if any(isinstance(thing, Iterator) for thing in self._met):
            return False
        return bool(described(self._arguments) == self._description)

    def copied(self) -> Contents:
        """All that can be put back, with what it holds."""
        return contents_of(self._met)
