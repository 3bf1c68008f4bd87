"""The classes of converted modules: each a subclass of the class that the module had.

They are made when they are needed, and again by :func:`rebuild` in the process that loads a pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

from torch import Tensor, nn

from efficient_densenet.convert import libraries
from efficient_densenet.kernels.layout import in_format_of
from efficient_densenet.modules.block import RecomputingBlock
from efficient_densenet.modules.calls import StemCall
from efficient_densenet.modules.parts import (
    ACTIVATION,
    CONV,
    DROPOUT,
    NORM,
    Found,
    Structure,
    stem_of,
)
from efficient_densenet.modules.recomputing import Recomputing
from efficient_densenet.modules.sequence import RecomputingSequence, RecomputingTransition

KINDS = {"norm": NORM, "relu": ACTIVATION, "conv": CONV, "dropout": DROPOUT}
LAYERS = "layers"

LayerClass = tuple[type[nn.Module], tuple[tuple[str, str], ...]]
"""A layer's class, and the names and roles of its children unless a library says them."""


class Converted(nn.Module):
    """First base of every converted class: how to go back, to copy and to pickle."""

    original: ClassVar[type[nn.Module]]
    made_by: ClassVar[tuple[str, tuple[LayerClass, ...]]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: tuple[Any, ...] = super().__reduce_ex__(max(2, protocol))  # type: ignore[assignment]
        return rebuild, (self.original, *self.made_by), *reduced[2:]


class ListBlock(RecomputingBlock):
    """A block whose layers are in a list; it returns input and new features."""

    def dense_layers(self) -> list[tuple[str, nn.Module]]:
        layers = self._modules[LAYERS]
        assert isinstance(layers, nn.ModuleList)
        return [(f"{LAYERS}.{i}", layer) for i, layer in enumerate(layers)]


class NewFeaturesBlock(ListBlock):
    """A block whose layers are in a list; it returns the new features only, a view of all."""

    def forward(self, x: Tensor) -> Tensor:
        call = self.read_or_none(x)
        return self.run_naive(x) if call is None else call.run()[:, x.shape[1] :]


class Stage(RecomputingBlock):
    """A sequence of, perhaps, a transition, and then of dense layers."""

    def transition(self) -> nn.Module | None:
        """The first child if it is no layer."""
        first: nn.Module | None = next(iter(self._modules.values()))
        return None if first is None or type(first).forward in self.structures else first

    def dense_layers(self) -> list[tuple[str, nn.Module]]:
        return super().dense_layers()[self.transition() is not None :]

    def forward(self, x: Tensor) -> Tensor:
        transition = self.transition()
        if transition is not None:
            x = transition(x)
        call = self.read_or_none(x)
        if call is not None:
            return call.run()
        for _, layer in self.dense_layers():
            x = layer(x)
        return x


class StemBlock(Recomputing):
    """A module that is a stem, and keeps only the image."""

    structure: ClassVar[Structure]

    def read(self, x: Tensor) -> StemCall:
        return StemCall.of(x, *stem_of(self.read_parts()), self.kernels)

    def read_parts(self) -> Found:
        """The modules of the stem as they are now."""
        return self.structure.read(self, "the stem")

    def forward(self, x: Tensor) -> Tensor:
        return in_format_of(x, super().forward(x))


FRONTS: dict[str, type[nn.Module]] = {
    "block": RecomputingBlock,
    "list": ListBlock,
    "new": NewFeaturesBlock,
    "stage": Stage,
    "transition": RecomputingTransition,
    "stem": StemBlock,
    "sequence": RecomputingSequence,
}
"""What stands in front of the class of a module, by its role."""


@cache
def converted_class(original: Any, role: str, layers: tuple[LayerClass, ...]) -> Any:
    """The class of a converted module that was an ``original``; ``layers`` are those of a block."""
    names: dict[str, Any] = {"original": original, "made_by": (role, layers)}
    names |= {"__module__": __name__, "__doc__": original.__doc__}
    if layers:
        names["structures"] = {cls.forward: _layer_structure(cls, parts) for cls, parts in layers}
    for structures in (libraries.TRANSITIONS, libraries.STEMS):
        known = libraries.known_class(original, structures)
        if known:
            names["structure"] = structures[libraries.class_name(known)]
    return type(original.__name__, (Converted, FRONTS[role], original), names)


def _layer_structure(cls: type[nn.Module], parts: Sequence[tuple[str, str]]) -> Structure:
    if parts:
        return Structure({name: KINDS[role] for name, role in parts})
    return libraries.LAYERS[libraries.class_name(cls)]


def rebuild(original: Any, role: str, layers: tuple[LayerClass, ...]) -> Any:
    """An empty module of a converted class: what copies and pickles are filled into."""
    cls = converted_class(original, role, layers)
    return cls.__new__(cls)
