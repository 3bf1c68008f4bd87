"""The parts that a dense layer, a transition or a stem is made of, by their paths below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from efficient_densenet.functional.spec import LayerSpec
from efficient_densenet.kernels.interface import Activation, Pool
from efficient_densenet.modules.reading import (
    Dropout,
    Layer,
    Unit,
    Unsupported,
    check_plain,
    is_plain_average,
    is_pointwise,
    keeps_size,
    read_activation,
    read_conv,
    read_dropout,
    read_norm,
    read_norm_act,
    read_pool,
    unit_of,
)

NO_DROPOUT = Dropout()


@dataclass
class Found:
    """The parts of one module as they are now, those of each kind in the order of their use."""

    norms: list[_BatchNorm] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    convs: list[_ConvNd] = field(default_factory=list)
    pools: list[Pool] = field(default_factory=list)
    dropout: Dropout = NO_DROPOUT


class Kind(NamedTuple):
    """What a part does. ``read(module, path, found)`` adds what the part is to ``found``.

    It raises :class:`Unsupported` for a module that does not do this. ``holds_parts`` is true of a
    container, whose children are parts themselves; a part that is not ``required`` may be missing.
    """

    read: Callable[[nn.Module, str, Found], object]
    holds_parts: bool = False
    required: bool = True


def _dropout(module: nn.Module, path: str, found: Found) -> None:
    found.dropout = read_dropout(module, path)


def _norm_act(module: nn.Module, path: str, found: Found) -> None:
    norm, activation = read_norm_act(module, path)
    found.norms.append(norm)
    found.activations.append(activation)


def _sequential(module: nn.Module, path: str, found: Found) -> None:
    if type(module) is not nn.Sequential:
        raise Unsupported(path, f"is a {type(module).__name__}")
    check_plain(module, path)


NORM = Kind(lambda module, path, found: found.norms.append(read_norm(module, path)))
NORM_ACT = Kind(_norm_act)
ACTIVATION = Kind(
    lambda module, path, found: found.activations.append(read_activation(module, path))
)
CONV = Kind(lambda module, path, found: found.convs.append(read_conv(module, path)))
POOL = Kind(lambda module, path, found: found.pools.append(read_pool(module, path)))
DROPOUT = Kind(_dropout, required=False)
SEQUENTIAL = Kind(_sequential, holds_parts=True)


@dataclass(frozen=True)
class Structure:
    """The parts of a module by path, in the order of registration and of use.

    Norms and convolutions alternate, with an activation after each norm; a norm that has its
    activation inside has none beside it. ``drop_rate`` is the attribute of a layer that drops by
    itself.
    """

    parts: Mapping[str, Kind]
    drop_rate: str | None = None

    def read(self, module: nn.Module, path: str) -> Found:
        """The parts of ``module``, which is called ``path`` in a reason."""
        check_plain(module, path)
        found = Found()
        prefix = f"{path}." if path else ""
        expected = iter(self.parts.items())
        for name, part in _below(module, self.parts, ""):
            for known, kind in expected:
                if known == name:
                    kind.read(part, prefix + name, found)
                    break
                if kind.required:
                    raise Unsupported(path, f"has {name!r} where {known!r} is expected")
            else:
                raise Unsupported(prefix + name, f"is a {type(part).__name__}")
        missing = next((known for known, kind in expected if kind.required), None)
        if missing is not None:
            raise Unsupported(path, f"has no {missing!r}")
        if self.drop_rate is not None and module.training:
            found.dropout = Dropout(float(getattr(module, self.drop_rate)))
        return found


def _below(
    module: nn.Module, parts: Mapping[str, Kind], prefix: str
) -> Iterator[tuple[str, nn.Module]]:
    """Every part and its path, a container before what it holds."""
    for name, part in module._modules.items():
        if part is None:
            continue
        path = prefix + name
        yield path, part
        kind = parts.get(path)
        if kind is not None and kind.holds_parts:
            yield from _below(part, parts, f"{path}.")


BOTTLENECK = Structure(
    {
        "norm1": NORM,
        "relu1": ACTIVATION,
        "conv1": CONV,
        "norm2": NORM,
        "relu2": ACTIVATION,
        "conv2": CONV,
    },
    drop_rate="drop_rate",
)
BASIC = Structure({"norm1": NORM, "relu1": ACTIVATION, "conv1": CONV}, drop_rate="drop_rate")
TRANSITION = Structure({"norm": NORM, "relu": ACTIVATION, "conv": CONV, "pool": POOL})


def read_layer(module: nn.Module, structure: Structure, path: str, channels: int | None) -> Layer:
    """A dense layer that reads ``channels`` channels, ``None``: as many as it expects."""
    found = structure.read(module, path)
    for conv in found.convs:
        if not keeps_size(conv):
            raise Unsupported(path, "has a convolution that changes the size of the map")
    expected = found.norms[0].num_features
    if channels is not None and expected != channels:
        raise Unsupported(path, f"expects {expected} channels and gets {channels}")
    units = tuple(map(unit_of, found.norms, found.activations, found.convs))
    rate, drops_maps = found.dropout
    width, growth = found.convs[0].out_channels, found.convs[-1].out_channels
    specs = tuple(unit.spec for unit in units)
    return Layer(LayerSpec(specs, expected, width, growth, rate, drops_maps), units)


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
