"""Specifications: what a block or stem computes, and which implementation runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efficient_densenet.functional.modes import MODES, Recompute
from efficient_densenet.functional.opaque import Opaque, Surroundings
from efficient_densenet.functional.precision import Types
from efficient_densenet.kernels import implementations
from efficient_densenet.kernels.interface import (
    RELU,
    Activation,
    Geometry,
    Operations,
    Pool,
    Statistics,
)
from efficient_densenet.kernels.layout import device_of, outer_format


@dataclass(frozen=True)
class UnitSpec:
    """BN - activation [- pool] [- convolution].

    ``batch_statistics`` says whether the norm uses the batch's statistics or running ones.
    """

    eps: float
    batch_statistics: bool
    conv: Geometry | None
    pool: Pool | None = None
    activation: Activation = RELU


class UnitTensors(NamedTuple):
    """A value for each tensor of a unit, ``None`` where it has none.

    The values are the tensors, or their gradients, or whether those are wanted. The norm's are
    ``(channels,)`` of the map it reads, running statistics present only if it uses them; the
    convolution's are ``(out_channels, in_channels / groups, *kernel)`` and ``(out_channels,)``.
    """

    weight: Any = None
    bias: Any = None
    running_mean: Any = None
    running_var: Any = None
    conv_weight: Any = None
    conv_bias: Any = None

    def only(self, channels: slice) -> UnitTensors:
        """The part for some channels of a convolution's result and of the norm that reads it."""
        return UnitTensors(*(None if t is None else t[channels] for t in self))

    @classmethod
    def take(cls, values: Iterator[Any]) -> UnitTensors:
        """The next values of one unit; of none if there are no more."""
        return cls(*islice(values, len(cls._fields)))


Part = UnitSpec | Opaque


class Keeps(NamedTuple):
    """What is kept of a part: the map that it leaves, its statistics, and the random state."""

    made: bool
    statistics: bool
    random: bool


@dataclass(frozen=True)
class LayerSpec:
    """A dense layer: a chain of parts, of which the first reads the first ``channels`` features.

    A part is a unit, or ``Opaque`` where it is anything else. Each leaves a map of as many channels
    as ``widths`` says for the next one, the last one the layer's new maps. What comes after an
    opaque part is a unit. Dropout zeroes single values, or with ``drops_maps`` whole maps of a
    sample.
    """

    parts: tuple[Part, ...]
    channels: int
    widths: tuple[int, ...]
    drop_rate: float
    drops_maps: bool = False

    @property
    def growth(self) -> int:
        """Channels that it adds."""
        return self.widths[-1]

    @property
    def units(self) -> tuple[UnitSpec, ...]:
        """Those of its parts that are units."""
        return tuple([part for part in self.parts if isinstance(part, UnitSpec)])

    @property
    def is_known(self) -> bool:
        """Whether all its parts are units."""
        return len(self.units) == len(self.parts)

    @property
    def widest(self) -> int:
        """Channels of the widest map that one of its norms reads; 1 if it has none."""
        reads = zip(self.parts, (self.channels, *self.widths), strict=False)
        return max((width for part, width in reads if isinstance(part, UnitSpec)), default=1)

    def take(self, values: Iterator[Any]) -> list[tuple[Any, ...]]:
        """The next values of its parts."""
        return [
            UnitTensors.take(values)
            if isinstance(part, UnitSpec)
            else tuple(islice(values, part.tensors))
            for part in self.parts
        ]


def _keeps(part: Part, reader: Part | None, convolved: bool) -> Keeps:
    is_opaque = isinstance(part, Opaque)
    made = convolved and isinstance(part, UnitSpec) and part.conv is not None and reader is not None
    statistics = isinstance(reader, UnitSpec) and (is_opaque or reader.batch_statistics)
    return Keeps(made, statistics, is_opaque)


@dataclass(frozen=True)
class BlockSpec:
    """A dense block, what is recomputed, and in which types.

    ``exit`` is a last unit that reads all features (a transition, or the norm before the
    classifier); with it the block returns its result and the features stay inside.
    ``recompute`` is ``"norm"`` or ``"bottleneck"``: a naive block has no specification.
    ``kernels`` says which implementation of the operations to try first
    (``kernels/implementations.py``). Batch statistics are those of all processes of
    ``process_group``, if there is one. Opaque parts run in ``surroundings``. With ``new_first``
    layers put their maps before those that they read: the input's channels are the last. ``small``
    says whether every map that is normalised takes at most ``whole.MOST_BYTES``.
    """

    layers: tuple[LayerSpec, ...]
    exit: UnitSpec | None
    input_channels: int
    recompute: Recompute
    types: Types
    kernels: str = "auto"
    process_group: Any = None
    surroundings: Surroundings | None = None
    new_first: bool = False
    small: bool = False

    def span(self, start: int, stop: int) -> slice:
        """Where the features lie that are the ``start``-th up to the ``stop``-th, by age."""
        if self.new_first:
            return slice(self.channels - stop, self.channels - start)
        return slice(start, stop)

    def oldest(self, vector: Tensor, channels: int, dim: int = 0) -> Tensor:
        """A vector (or map, ``dim=1``) of all features, seen so that the oldest come first.

        ``channels`` of them are to be read.
        """
        if not self.new_first:
            return vector
        return vector.narrow(dim, self.channels - channels, channels)

    def oldest_statistics(self, statistics: Statistics, channels: int) -> Statistics:
        """Those of the features, seen in the same way."""
        if not self.new_first:
            return statistics
        return Statistics(*(self.oldest(vector, channels) for vector in statistics))

    def format(self, like: Tensor) -> torch.memory_format:
        """The memory format of the features inside, by the input or the features.

        Opaque parts take that of ``like``: only layers of units are faster in another one.
        """
        if not any(layer.is_known for layer in self.layers):
            return outer_format(like)
        return operations_of(self, like).inner_format(like)

    @property
    def drops(self) -> bool:
        """Whether any layer applies dropout."""
        return any(layer.drop_rate > 0 for layer in self.layers)

    @property
    def keeps(self) -> list[list[Keeps]]:
        """What is kept of each part of each layer.

        Of the map that it leaves for the next one: itself, if a unit's convolution made it, and the
        mode is not to convolve again; statistics, if the next one's norm uses them, or if an opaque
        part made it, and they have to show whether it makes the same again.
        """
        convolved = MODES[self.recompute].keeps_bottlenecks
        return [
            [
                _keeps(part, reader, convolved)
                for part, reader in zip(layer.parts, (*layer.parts[1:], None), strict=True)
            ]
            for layer in self.layers
        ]

    @property
    def channels(self) -> int:
        """Channels of the features."""
        return self.input_channels + sum(layer.growth for layer in self.layers)

    @property
    def activations(self) -> tuple[Activation, ...]:
        """The activations of its units, each once."""
        units = [unit for layer in self.layers for unit in layer.units]
        units += [self.exit] if self.exit else []
        return tuple(dict.fromkeys(unit.activation for unit in units))

    @property
    def widest(self) -> int:
        """Channels of the widest map that is normalised; 1 if none is."""
        return max(self.widest_in_layers, self.channels if self.exit else 1)

    @property
    def widest_in_layers(self) -> int:
        """Channels of the widest map that a layer's norm reads."""
        return max((layer.widest for layer in self.layers), default=1)

    @property
    def maps_with_statistics(self) -> int:
        """How many maps, the input first, a norm reads the batch statistics of."""
        count = 0
        for i, reader in enumerate((*(layer.parts[0] for layer in self.layers), self.exit)):
            if isinstance(reader, UnitSpec) and reader.batch_statistics:
                count = i + 1
        return count

    def nested(self, flat: Sequence[Any]) -> tuple[list[list[Any]], UnitTensors]:
        """Values of all parts, given flat, as those of each layer's parts and those of the exit."""
        values = iter(flat)
        return [layer.take(values) for layer in self.layers], UnitTensors.take(values)


@dataclass(frozen=True)
class StemSpec:
    """Convolution - BN - activation - pool: a convolution of the image, and the unit that reads it.

    ``kernels``, ``process_group`` and ``small`` as in :class:`BlockSpec`.
    """

    conv: Geometry
    unit: UnitSpec
    types: Types
    kernels: str = "auto"
    process_group: Any = None
    small: bool = False

    @property
    def activations(self) -> tuple[Activation, ...]:
        """The activation of its unit, alone."""
        return (self.unit.activation,)

    def format(self, like: Tensor) -> torch.memory_format:
        """The memory format inside, by the image."""
        return operations_of(self, like).inner_format(like)


def operations_of(spec: BlockSpec | StemSpec, like: Tensor) -> Operations:
    """The implementation that runs a pass on a map like this."""
    dtypes = (spec.types.compute, spec.types.features)
    device = device_of(like)
    return implementations.choose(spec.kernels, device, dtypes, spec.activations, spec.small)
