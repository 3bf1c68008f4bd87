"""The parts that a dense layer, a transition or a stem is made of, by name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from efficient_densenet.kernels.interface import Activation, Pool
from efficient_densenet.modules.opaque import read_part
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
    dropout: Dropout = NO_DROPOUT


Read = Callable[[nn.Module, str, Found], object]
"""Adds what a part is to what was found; raises :class:`Unsupported` for any other module."""


def add_norm(module: nn.Module, path: str, found: Found) -> None:
    """A batch norm."""
    found.norms.append(read_norm(module, path))


class NormWithActivation(nn.Module):
    """A batch norm that activates its result, and says which it does."""

    def read_parts(self) -> tuple[_BatchNorm, Activation]:
        """The norm and the activation; raises :class:`Unsupported` if it does anything else."""
        raise NotImplementedError


def add_norm_with_activation(module: nn.Module, path: str, found: Found) -> None:
    """A norm and an activation in one module."""
    if not isinstance(module, NormWithActivation):
        raise Unsupported(path, f"is a {type(module).__name__}")
    check_plain(module, path)
    norm, activation = module.read_parts()
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
    """A part of a module by its name, its path, and how it is read."""

    name: str
    path: str
    module: nn.Module
    read: Read


def found_in(children: Iterable[Child]) -> Found:
    """What these parts are; raises :class:`Unsupported` if one is not known."""
    found = Found()
    for child in children:
        child.read(child.module, child.path, found)
    return found


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
        return found_in(self.children(module, path))

    def children(self, module: nn.Module, path: str) -> list[Child]:
        """The parts of ``module`` before they are read."""
        children = []
        prefix = f"{path}." if path else ""
        expected = iter(self.parts.items())
        for name, part in module._modules.items():
            if part is None:
                continue
            known, read = next(expected, (None, None))
            if read is None:
                raise Unsupported(prefix + name, f"is a {type(part).__name__}")
            if known != name:
                raise Unsupported(path, f"has {name!r} where {known!r} is expected")
            children.append(Child(name, prefix + name, part, read))
        missing = next(expected, None)
        if missing is not None:
            raise Unsupported(path, f"has no {missing[0]!r}")
        return children

    def dropout(self, layer: nn.Module, last: Sequence[Child]) -> Dropout:
        """The dropout of a layer, whose ``last`` parts may be one."""
        if self.drop_rate is not None and layer.training:
            return Dropout(float(getattr(layer, self.drop_rate)))
        return found_in(last).dropout


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


UNIT_SIZE = 3
"""Norm, activation, convolution."""


def read_layer(
    module: nn.Module, structure: Structure, path: str, channels: int, growth: int
) -> Layer:
    """A dense layer that reads ``channels`` channels.

    Where one of two units is not known, its parts are run again as they are. A second one is taken
    to leave ``growth`` channels.

    Raises:
        Unsupported: if no unit is known.
    """
    check_plain(module, path)
    children = structure.children(module, path)
    rest = len(children) - len(children) % UNIT_SIZE
    groups = [children[i : i + UNIT_SIZE] for i in range(0, rest, UNIT_SIZE)]
    dropout = structure.dropout(module, children[rest:])
    units = [_unit_or_reason(group, path) for group in groups]
    known = _known(units)
    first, last = units[0], units[-1]
    if isinstance(first, Unit) and first.norm.num_features != channels:
        raise Misfit(path, f"expects {first.norm.num_features} channels and gets {channels}")
    growth = last.leaves if isinstance(last, Unit) else growth
    width = first.leaves if isinstance(first, Unit) else known[0].norm.num_features
    parts = [
        unit if isinstance(unit, Unit) else _opaque_part(module, path, group, reads)
        for unit, group, reads in zip(units, groups, (channels, width), strict=False)
    ]
    return Layer.of(parts, channels, width, growth, dropout)


def _unit_or_reason(children: Sequence[Child], path: str) -> Unit | Unsupported:
    """What norm, activation and convolution are, or why it is not known."""
    try:
        found = found_in(children)
    except Unsupported as reason:
        return reason
    (norm,), (activation,), (conv,) = found.norms, found.activations, found.convs
    if not keeps_size(conv):
        return Misfit(path, "has a convolution that changes the size of the map")
    return unit_of(norm, activation, conv)


def _known(units: Sequence[Unit | Unsupported]) -> list[Unit]:
    """Those that are known, at least one; raises why the others are not if none is."""
    known = [unit for unit in units if isinstance(unit, Unit)]
    reasons = [unit for unit in units if isinstance(unit, Unsupported)]
    misfits = [reason for reason in reasons if isinstance(reason, Misfit)]
    if misfits and len(misfits) == len(reasons):
        raise misfits[0]
    if not known:  # what is not known may be of any size inside
        raise next(reason for reason in reasons if reason not in misfits)
    return known


def _opaque_part(
    layer: nn.Module, path: str, children: Sequence[Child], channels: int
) -> OpaquePart:
    chain = nn.Sequential(OrderedDict((child.name, child.module) for child in children))
    return read_part(chain, path, (channels,), layer)


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
