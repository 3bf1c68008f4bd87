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
from efficient_densenet.modules import calls as stage
from efficient_densenet.modules.block import RecomputingBlock
from efficient_densenet.modules.parts import CONV, DROPOUT, NORM, RELU, Anatomy
from efficient_densenet.modules.sequence import RecomputingSequence, RecomputingTransition, Stem

KINDS = {kind.role: kind for kind in (NORM, RELU, CONV, DROPOUT)}
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
        if self.why_naive(x):
            return super().forward(x)
        return self.run(x)[:, x.shape[1] :]


class Stage(RecomputingBlock):
    """A sequence of, perhaps, a transition, and then of dense layers."""

    def transition(self) -> nn.Module | None:
        """The first child if it is no layer."""
        first: nn.Module | None = next(iter(self._modules.values()))
        return None if first is None or self.anatomy_of(first) else first

    def dense_layers(self) -> list[tuple[str, nn.Module]]:
        return super().dense_layers()[self.transition() is not None :]

    def forward(self, x: Tensor) -> Tensor:
        transition = self.transition()
        if transition is not None:
            x = transition(x)
        if not self.why_naive(x):
            return self.run(x)
        for _, layer in self.dense_layers():
            x = layer(x)
        return x


class StemBlock(nn.Module):
    """A module that is a stem, and keeps the image alone."""

    anatomy: ClassVar[Anatomy]

    def why_naive(self, x: Tensor) -> str | None:
        """Why ``x`` would take the naive path, or ``None`` if it takes the efficient one."""
        reason = self.unsupported()
        return f"the stem{reason}" if reason else self.stem().why_naive(x)

    def unsupported(self) -> str | None:
        """What about its modules the efficient path does not know, as the end of a sentence."""
        return self.anatomy.unsupported(self)

    def stem(self) -> Stem:
        """The modules of the stem as they are now."""
        conv, norm, pool = (self.anatomy.find(self, role)[0] for role in ("conv", "norm", "pool"))
        return Stem(conv, norm, pool, len(self._modules))

    def forward(self, x: Tensor) -> Tensor:
        if self.why_naive(x):
            return super().forward(x)
        stem = self.stem()
        return in_format_of(x, stage.run_stem(stem.conv, stem.norm, stem.pool, x))


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
        names["layer_classes"] = tuple((cls, _layer_anatomy(cls, parts)) for cls, parts in layers)
    for anatomies in (libraries.TRANSITIONS, libraries.STEMS):
        known = libraries.known_class(original, anatomies)
        if known:
            names["anatomy"] = anatomies[libraries.class_name(known)]
    return type(original.__name__, (Converted, FRONTS[role], original), names)


def _layer_anatomy(cls: type[nn.Module], parts: Sequence[tuple[str, str]]) -> Anatomy:
    if parts:
        return Anatomy({name: KINDS[role] for name, role in parts})
    return libraries.LAYERS[libraries.class_name(cls)]


def rebuild(original: Any, role: str, layers: tuple[LayerClass, ...]) -> Any:
    """An empty module of a converted class: what copies and pickles are filled into."""
    cls = converted_class(original, role, layers)
    return cls.__new__(cls)
