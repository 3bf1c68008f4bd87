"""The parts that a dense layer, a transition or a stem is made of, by name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from efficient_densenet.kernels.interface import Activation, Pool
from efficient_densenet.modules.opaque import COPIED, HANDED, TENSOR, Form, read_part
from efficient_densenet.modules.reading import (
    NO_DROPOUT,
    Dropout,
    Layer,
    Misfit,
    OpaquePart,
    Unit,
    Unsupported,
    check_plain,
    is_plain_average,
    is_pointwise,
    keeps_size,
    read_activation,
    read_conv,
    read_norm,
    read_pool,
    unit_of,
)


@dataclass
class Found:
    """The parts of one module as they are now, those of each kind in the order of their use."""

    norms: list[_BatchNorm] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    convs: list[_ConvNd] = field(default_factory=list)
    pools: list[Pool] = field(default_factory=list)


Read = Callable[[nn.Module, str, Found], object]
"""Adds what a part is to what was found; raises :class:`Unsupported` for any other module."""


def add_norm(module: nn.Module, path: str, found: Found) -> None:
    """A batch norm."""
    found.norms.append(read_norm(module, path))


class NormWithActivation(nn.Module):
    """A batch norm that activates its result, and says which it does."""

    def _recomputing_parts(self) -> tuple[_BatchNorm, Activation]:
        """The norm and the activation; raises :class:`Unsupported` if it does anything else."""
        raise NotImplementedError


def add_norm_with_activation(module: nn.Module, path: str, found: Found) -> None:
    """A norm and an activation in one module."""
    if not isinstance(module, NormWithActivation):
        raise Unsupported(path, f"is a {type(module).__name__}")
    check_plain(module, path)
    norm, activation = module._recomputing_parts()
    found.norms.append(norm)
    found.activations.append(activation)


def add_activation(module: nn.Module, path: str, found: Found) -> None:
    """A known activation."""
    found.activations.append(read_activation(module, path))


def add_conv(module: nn.Module, path: str, found: Found) -> None:
    """A convolution."""
    found.convs.append(read_conv(module, path))


def add_pool(module: nn.Module, path: str, found: Found) -> None:
    """A pooling of windows."""
    found.pools.append(read_pool(module, path))


class Child(NamedTuple):
    """A part of a module by its name and its path."""

    name: str
    path: str
    module: nn.Module


def children_of(module: nn.Module, path: str) -> list[Child]:
    """The parts of ``module`` in the order of registration; it is called ``path`` in a reason."""
    prefix = f"{path}." if path else ""
    return [
        Child(name, prefix + name, part)
        for name, part in module._modules.items()
        if part is not None
    ]


@dataclass(frozen=True)
class Structure:
    """The parts of a module by name, in the order of registration and of use.

    Norms and convolutions alternate, with an activation after each norm. ``drop_rate`` is the
    attribute of a layer that drops by itself.
    """

    parts: Mapping[str, Read]
    drop_rate: str | None = None

    def read(self, module: nn.Module, path: str) -> Found:
        """The parts of ``module``, which is called ``path`` in a reason."""
        check_plain(module, path)
        found = Found()
        for child, read in zip(self.children(module, path), self.parts.values(), strict=True):
            read(child.module, child.path, found)
        return found

    def children(self, module: nn.Module, path: str) -> list[Child]:
        """The parts of ``module`` before they are read."""
        children = children_of(module, path)
        expected = iter(self.parts)
        for child in children:
            known = next(expected, None)
            if known is None:
                raise Unsupported(child.path, f"is a {type(child.module).__name__}")
            if known != child.name:
                raise Unsupported(path, f"has {child.name!r} where {known!r} is expected")
        missing = next(expected, None)
        if missing is not None:
            raise Unsupported(path, f"has no {missing!r}")
        return children

    def dropout(self, layer: nn.Module) -> Dropout:
        """The dropout that a layer applies to its new maps."""
        if self.drop_rate is None or not layer.training:
            return NO_DROPOUT
        return Dropout(float(getattr(layer, self.drop_rate)))


BOTTLENECK = Structure(
    {
        "norm1": add_norm,
        "relu1": add_activation,
        "conv1": add_conv,
        "norm2": add_norm,
        "relu2": add_activation,
        "conv2": add_conv,
    },
    drop_rate="drop_rate",
)
BASIC = Structure(
    {"norm1": add_norm, "relu1": add_activation, "conv1": add_conv}, drop_rate="drop_rate"
)
TRANSITION = Structure(
    {"norm": add_norm, "relu": add_activation, "conv": add_conv, "pool": add_pool}
)


def read_layer(
    layer: nn.Module,
    path: str,
    children: Sequence[Child],
    channels: int,
    growth: int,
    dropout: Dropout,
    form: Form = TENSOR,
) -> Layer:
    """A dense layer that runs its ``children`` one after the other on ``channels`` channels.

    Norm, activation and perhaps convolution in a row are a unit; what is between units is run again
    as it is, and taken to leave ``growth`` channels if it is the last. ``form`` says how it takes
    the features.

    Raises:
        Unsupported: if no unit is known, or they do not fit together.
    """
    rows = _rows(children)
    known = [row for row in rows if isinstance(row, Unit)]
    if not known:
        raise Unsupported(path, "has no batch norm with an activation after it")
    if any(_changes_size(child) for child in children):
        if len(known) == len(rows):
            raise Misfit(path, "has a convolution that changes the size of the map")
        raise Unsupported(path, "may be of any size inside")  # what is not known may undo it
    parts = [row if isinstance(row, Unit) else _in_a_row(row) for row in rows]
    return layer_of(layer, path, parts, channels, growth, dropout, form)


def _rows(children: Sequence[Child]) -> list[Unit | list[Child]]:
    """Units, and what is between them."""
    rows: list[Unit | list[Child]] = []
    i = 0
    while i < len(children):
        unit, size = _unit_of(children[i : i + 3])
        if unit is not None:
            rows.append(unit)
        elif rows and isinstance(rows[-1], list):
            rows[-1].append(children[i])
        else:
            rows.append([children[i]])
        i += size
    return rows


def _unit_of(children: Sequence[Child]) -> tuple[Unit | None, int]:
    """The unit with which three children begin, and how many it is made of; one if it is none."""
    if len(children) < 2:
        return None, 1
    try:
        norm = read_norm(children[0].module, children[0].path)
        activation = read_activation(children[1].module, children[1].path)
    except Unsupported:
        return None, 1
    if len(children) == 3:
        try:
            return unit_of(norm, activation, read_conv(children[2].module, children[2].path)), 3
        except Unsupported:
            pass
    return unit_of(norm, activation), 2


def _changes_size(child: Child) -> bool:
    """Whether a child is a convolution that leaves smaller or larger maps."""
    try:
        return not keeps_size(read_conv(child.module, child.path))
    except Unsupported:
        return False


def _in_a_row(children: Sequence[Child]) -> nn.Sequential:
    return nn.Sequential(OrderedDict((child.name, child.module) for child in children))


def layer_of(
    layer: nn.Module,
    path: str,
    parts: Sequence[Unit | nn.Module],
    channels: int,
    growth: int,
    dropout: Dropout,
    form: Form = TENSOR,
) -> Layer:
    """A layer of units, and of modules between them that are run again; otherwise as above.

    Raises:
        Unsupported: if a module cannot be run again, or the units do not fit together.
    """
    found: list[Unit | OpaquePart] = []
    reads = channels
    for part in parts:
        if isinstance(part, Unit):
            found.append(part)
            # A convolution's result may be kept, so that what comes after it gets a copy.
            reads, form = part.leaves, HANDED if part.spec.conv is None else COPIED
        else:
            found.append(read_part(part, path, (reads,), layer, form))
    read = Layer.of(found, path, channels, growth, dropout)
    buffers = [id(buffer) for part in read.opaque for buffer, _ in part.buffers]
    if len(buffers) > len(set(buffers)):  # what one part leaves in them would be lost to the other
        raise Unsupported(path, "has buffers that two of its parts share")
    return read


def stem_of(found: Found) -> tuple[_ConvNd, Unit]:
    """The convolution of a stem, and the unit that reads its result."""
    (conv,), (norm,), (activation,), (pool,) = (
        found.convs,
        found.norms,
        found.activations,
        found.pools,
    )
    return conv, unit_of(norm, activation, pool=pool)


def read_transition(module: nn.Module, structure: Structure, path: str) -> Unit:
    """A transition as what reads all features of a block."""
    found = structure.read(module, path)
    (norm,), (activation,) = found.norms, found.activations
    (conv,), (pool,) = found.convs, found.pools
    if not (is_pointwise(conv) and is_plain_average(pool)):
        raise Unsupported(
            path, "does not convolve 1x1 and average without padding: the two do not commute"
        )
    return unit_of(norm, activation, conv, pool)
