"""The parts that a dense layer, a transition or a stem is made of, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from efficient_densenet.functional.spec import LayerSpec
from efficient_densenet.kernels.interface import Activation, Pool
from efficient_densenet.modules.reading import (
    Dropout,
    Layer,
    Misfit,
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

NO_DROPOUT = Dropout()


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
            read(part, prefix + name, found)
        missing = next(expected, None)
        if missing is not None:
            raise Unsupported(path, f"has no {missing[0]!r}")
        if self.drop_rate is not None and module.training:
            found.dropout = Dropout(float(getattr(module, self.drop_rate)))
        return found


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


def read_layer(module: nn.Module, structure: Structure, path: str, channels: int | None) -> Layer:
    """A dense layer that reads ``channels`` channels, ``None``: as many as it expects."""
    found = structure.read(module, path)
    for conv in found.convs:
        if not keeps_size(conv):
            raise Misfit(path, "has a convolution that changes the size of the map")
    expected = found.norms[0].num_features
    if channels is not None and expected != channels:
        raise Misfit(path, f"expects {expected} channels and gets {channels}")
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
