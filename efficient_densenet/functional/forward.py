"""The forward passes: what they compute, and the little that they keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet.functional.precision import outside_autocast
from efficient_densenet.functional.spec import BlockSpec, UnitSpec, UnitTensors
from efficient_densenet.functional.synchronise import joined_statistics
from efficient_densenet.functional.units import UnitRunner
from efficient_densenet.kernels.interface import Statistics
from efficient_densenet.kernels.layout import empty_map, inner_format, outer_format


class Saved(NamedTuple):
    """What a block's forward pass leaves for its backward pass.

    ``bottlenecks`` and ``bottleneck_statistics`` have an entry per layer.
    """

    features: Tensor
    statistics: Statistics
    bottlenecks: list[Tensor | None]
    bottleneck_statistics: list[Statistics | None]

    def flat(self, spec: BlockSpec) -> list[Tensor]:
        """Its tensors in order; the features only if they are not at the block's border."""
        pairs = [self.statistics, *filter(None, self.bottleneck_statistics)]
        maps = [bottleneck for bottleneck in self.bottlenecks if bottleneck is not None]
        inside = [self.features] if spec.layers and spec.exit else []
        return inside + [vector for pair in pairs for vector in pair] + maps

    @classmethod
    def of(cls, spec: BlockSpec, border: Tensor | None, flat: Sequence[Tensor]) -> Saved:
        """The inverse of :meth:`flat`; ``border`` is :func:`features_at_border`."""
        tensors = iter(flat)
        features = next(tensors) if border is None else border
        statistics = Statistics(next(tensors), next(tensors))
        seconds = [layer.units[1] if len(layer.units) == 2 else None for layer in spec.layers]
        bottleneck_statistics = [
            Statistics(next(tensors), next(tensors)) if unit and unit.batch_statistics else None
            for unit in seconds
        ]
        bottlenecks = [
            next(tensors) if unit and spec.keeps_bottlenecks else None for unit in seconds
        ]
        return cls(features, statistics, bottlenecks, bottleneck_statistics)


def features_at_border(spec: BlockSpec, x: Tensor, out: Tensor) -> Tensor | None:
    """The features if they are the block's result or, without layers, its input."""
    if not spec.layers:
        return x
    return None if spec.exit else out


class FeatureBuffer:
    """The concatenation storage, and the batch statistics of every map in it.

    Starts with the input ``x``; in a block without layers it is ``x`` itself.
    """

    def __init__(self, spec: BlockSpec, x: Tensor) -> None:
        memory_format = inner_format(x) if spec.layers else outer_format(x)
        shape = (spec.channels, *(1,) * (x.dim() - 2))
        mean, var = (x.new_zeros(shape, dtype=spec.types.statistics) for _ in range(2))
        self.statistics = Statistics(mean, var)
        self._filled, self._process_group = 0, spec.process_group
        self._read = spec.maps_with_statistics  # of the maps to come
        if spec.layers:
            self.maps = empty_map(x, spec.channels, memory_format, spec.types.features)
        else:
            self.maps = x.to(spec.types.features).contiguous(memory_format=memory_format)
        self.units = UnitRunner(spec, self.maps, spec.widest, memory_format)
        self.append(x if spec.layers else self.maps)

    def append(self, y: Tensor) -> None:
        """Write the next map, and its statistics if a norm reads them."""
        channels = slice(self._filled, self._filled + y.shape[1])
        statistics = self.statistics.of(channels) if self._read > 0 else None
        into = None if y is self.maps else self.maps[:, channels]
        self.units.ops.append(y, into, statistics)
        if statistics is not None and self._process_group is not None:
            joined = joined_statistics(statistics, y, self._process_group)
            statistics.mean.copy_(joined.mean)
            statistics.var.copy_(joined.var)
        self._filled, self._read = channels.stop, self._read - 1

    def read(
        self, unit: UnitSpec, tensors: UnitTensors, need_statistics: bool = False
    ) -> tuple[Tensor, Statistics | None]:
        """The result of a unit that reads all maps so far, and its batch statistics."""
        x, statistics = self.maps[:, : self._filled], self.statistics.first(self._filled)
        ready = self.units.ready(unit, tensors, statistics, x.dim())
        return self.units.forward(x, ready, need_statistics)


def forward_block(
    spec: BlockSpec, seeds: Tensor | None, x: Tensor, flat: Sequence[Tensor | None]
) -> tuple[Tensor, Saved]:
    """Run the block layer by layer; returns the result, and what to save.

    ``seeds`` are those of :func:`draw_seeds`.
    """
    with outside_autocast(x.device):
        return _forward_block(spec, seed_of_each(spec, seeds), x, flat)


def draw_seeds(x: Tensor, layers: int) -> Tensor:
    """A seed ``(layers,)`` for the dropout mask of each layer, on the device of ``x``.

    From that device's default generator, so that a graph draws others when it is replayed.
    """
    return torch.randint(2**62, (layers,), device=x.device)


def seed_of_each(spec: BlockSpec, seeds: Tensor | None) -> Sequence[Tensor | None]:
    """The seed of each layer, where anything drops."""
    return [None] * len(spec.layers) if seeds is None else seeds.unbind()


def _forward_block(
    spec: BlockSpec, seeds: Sequence[Tensor | None], x: Tensor, flat: Sequence[Tensor | None]
) -> tuple[Tensor, Saved]:
    layers, exit_tensors = spec.nested(flat)
    buffer = FeatureBuffer(spec, x)
    bottlenecks: list[Tensor | None] = []
    bottleneck_statistics: list[Statistics | None] = []
    for layer, tensors, seed in zip(spec.layers, layers, seeds, strict=True):
        first, *second = layer.units
        wanted = any(unit.batch_statistics for unit in second)
        y, statistics = buffer.read(first, tensors[0], wanted)
        if statistics is not None:
            statistics = joined_statistics(statistics, y, spec.process_group)
        bottleneck = y if second else None
        if second:
            ready = buffer.units.ready(second[0], tensors[1], statistics, y.dim())
            y, _ = buffer.units.forward(y, ready)
        bottlenecks.append(bottleneck if spec.keeps_bottlenecks else None)
        bottleneck_statistics.append(statistics)
        if seed is not None:
            buffer.units.drop(y, layer, seed)
        buffer.append(y)
        del y, bottleneck
    features = buffer.maps
    if spec.exit:
        out, _ = buffer.read(spec.exit, exit_tensors)
    else:
        features = out = features.contiguous(memory_format=outer_format(x))
    return out, Saved(features, buffer.statistics, bottlenecks, bottleneck_statistics)
