"""The forward passes: what they compute, and the little that they keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet.functional.opaque import Expected, run_once
from efficient_densenet.functional.precision import outside_autocast
from efficient_densenet.functional.spec import BlockSpec, LayerSpec, UnitSpec, UnitTensors
from efficient_densenet.functional.synchronise import joined_statistics
from efficient_densenet.functional.units import UnitRunner
from efficient_densenet.kernels.interface import Statistics
from efficient_densenet.kernels.layout import empty_map, outer_format


class Saved(NamedTuple):
    """What a block's forward pass leaves for its backward pass; lists have an entry per layer.

    Attributes:
        features: ``(N, channels, *spatial)``, the input's channels first, in the features' type.
        statistics: theirs, two vectors ``(channels,)`` in the statistics' type, written as far
            as a norm reads them.
        bottlenecks: ``(N, width, *spatial)`` in the compute type; ``None`` if recomputed or absent.
        bottleneck_statistics: two vectors ``(width,)``; ``None`` if there is no bottleneck or
            its norm uses running statistics.
        random: ``uint8``, the state of the random generators from which an opaque layer drew,
            empty if it drew nothing; ``None`` for other layers.
    """

    features: Tensor
    statistics: Statistics
    bottlenecks: list[Tensor | None]
    bottleneck_statistics: list[Statistics | None]
    random: list[Tensor | None]

    def flat(self, spec: BlockSpec) -> list[Tensor]:
        """Its tensors in order; the features only if they are not at the block's border."""
        pairs = [self.statistics, *filter(None, self.bottleneck_statistics)]
        maps = [bottleneck for bottleneck in self.bottlenecks if bottleneck is not None]
        inside = [self.features] if spec.layers and spec.exit else []
        random = [state for state in self.random if state is not None]
        return inside + [vector for pair in pairs for vector in pair] + maps + random

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
        random = [next(tensors) if layer.opaque else None for layer in spec.layers]
        return cls(features, statistics, bottlenecks, bottleneck_statistics, random)


def features_at_border(spec: BlockSpec, x: Tensor, out: Tensor) -> Tensor | None:
    """The features if they are the block's result or, without layers, its input."""
    if not spec.layers:
        return x
    return None if spec.exit else out


class FeatureBuffer:
    """The storage of all features, ``(N, channels, *spatial)``, and their batch statistics.

    Starts with the input ``x``; in a block without layers it is ``x`` itself.
    """

    def __init__(self, spec: BlockSpec, x: Tensor) -> None:
        memory_format = spec.format(x)
        dtype = spec.types.statistics
        self.statistics = Statistics(*(x.new_zeros(spec.channels, dtype=dtype) for _ in range(2)))
        self._filled, self._process_group = 0, spec.process_group
        self._spec = spec
        self._read = spec.maps_with_statistics  # of the maps to come
        if spec.layers:
            self.maps = empty_map(x, spec.channels, memory_format, spec.types.features)
        else:
            self.maps = x.to(spec.types.features).contiguous(memory_format=memory_format)
        self.units = UnitRunner(spec, self.maps, spec.widest, memory_format)
        self.append(x if spec.layers else self.maps)

    def append(self, y: Tensor) -> None:
        """Write the next map, and its statistics if a norm reads them."""
        filled = self._filled + y.shape[1]
        channels = self._spec.span(self._filled, filled)
        into, is_read = None if y is self.maps else self.maps, self._read > 0
        self.units.ops.append(y, into, channels.start, self.statistics if is_read else None)
        if is_read and self._process_group is not None:
            statistics = self.statistics.of(channels)
            joined = joined_statistics(statistics, y, self._process_group)
            statistics.mean.copy_(joined.mean)
            statistics.var.copy_(joined.var)
        self._filled, self._read = filled, self._read - 1

    def read(
        self, unit: UnitSpec, tensors: UnitTensors, need_statistics: bool = False
    ) -> tuple[Tensor, Statistics | None]:
        """The result of a unit that reads all maps so far, and its batch statistics."""
        channels = self._filled
        statistics = self._spec.oldest_statistics(self.statistics, channels)
        ready = self.units.ready(unit, tensors, statistics, channels)
        maps = self._spec.oldest(self.maps, channels, 1)
        return self.units.forward(maps, ready, need_statistics)

    def run(
        self, layer: LayerSpec, tensors: Sequence[Tensor], learns: bool
    ) -> tuple[Tensor, Tensor]:
        """The new maps of an opaque layer, and the random state that it drew from."""
        surroundings = self._spec.surroundings
        assert layer.opaque is not None and surroundings is not None
        prefix = self.maps[:, self._spec.span(0, self._filled)]
        shape = torch.Size([len(prefix), layer.growth, *prefix.shape[2:]])
        expected = Expected(shape, prefix.dtype)
        maps = prefix.split(layer.opaque.channels, 1)
        return run_once(layer.opaque, surroundings, maps, tensors, learns, expected)


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

    From that device's default generator, so that a CUDA graph draws others when it is replayed.
    """
    return torch.randint(2**62, (layers,), device=x.device)


def seed_of_each(spec: BlockSpec, seeds: Tensor | None) -> Sequence[Tensor | None]:
    """The seed of each layer, where anything drops."""
    return [None] * len(spec.layers) if seeds is None else seeds.unbind()


def _forward_block(
    spec: BlockSpec, seeds: Sequence[Tensor | None], x: Tensor, flat: Sequence[Tensor | None]
) -> tuple[Tensor, Saved]:
    layers, exit_tensors = spec.nested(flat)
    learns = any(tensor is not None and tensor.requires_grad for tensor in (x, *flat))
    buffer = FeatureBuffer(spec, x)
    saved = Saved(buffer.maps, buffer.statistics, [], [], [])
    for layer, tensors, seed in zip(spec.layers, layers, seeds, strict=True):
        random = bottleneck = statistics = None
        if layer.opaque:
            y, random = buffer.run(layer, tensors[0], learns)
        else:
            y, bottleneck, statistics = _run_units(buffer, spec, layer, tensors)
        saved.bottlenecks.append(bottleneck if spec.keeps_bottlenecks else None)
        saved.bottleneck_statistics.append(statistics)
        saved.random.append(random)
        if seed is not None:
            buffer.units.drop(y, layer, seed)
        buffer.append(y)
        del y, bottleneck
    if spec.exit:
        return buffer.read(spec.exit, exit_tensors)[0], saved
    features = buffer.maps.contiguous(memory_format=outer_format(x))
    return features, saved._replace(features=features)


def _run_units(
    buffer: FeatureBuffer, spec: BlockSpec, layer: LayerSpec, tensors: Sequence[UnitTensors]
) -> tuple[Tensor, Tensor | None, Statistics | None]:
    """The new maps of a layer, its bottleneck map, and that one's batch statistics."""
    first, *second = layer.units
    wanted = any(unit.batch_statistics for unit in second)
    y, statistics = buffer.read(first, tensors[0], wanted)
    if not second:
        return y, None, None
    if statistics is not None:
        statistics = joined_statistics(statistics, y, spec.process_group)
    ready = buffer.units.ready(second[0], tensors[1], statistics, y.shape[1])
    return buffer.units.forward(y, ready)[0], y, statistics
