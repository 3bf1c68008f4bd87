"""The forward passes: what they compute, and the little that they keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efficient_densenet.functional.opaque import Expected, Opaque, Unfit, run_once
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
        bottleneck_statistics: two vectors ``(width,)``; ``None`` if they are not kept
            (``LayerSpec.keeps_bottleneck_statistics``).
        random: ``uint8``, the state of the random generators from which an opaque part drew,
            empty if it drew nothing; ``None`` for layers of units.
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
        bottleneck_statistics = [
            Statistics(next(tensors), next(tensors)) if layer.keeps_bottleneck_statistics else None
            for layer in spec.layers
        ]
        bottlenecks = [
            next(tensors) if spec.keeps_bottleneck(layer) else None for layer in spec.layers
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
        self,
        opaque: Opaque,
        channels: int,
        tensors: Sequence[Tensor],
        learns: bool,
        z: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The ``channels`` maps that an opaque part makes, and the random state it drew from.

        It reads all maps so far, or a bottleneck map ``z``.
        """
        surroundings, prefix = (
            self._spec.surroundings,
            self.maps[:, self._spec.span(0, self._filled)],
        )
        assert surroundings is not None
        shape = torch.Size([len(prefix), channels, *prefix.shape[2:]])
        expected = Expected(shape, prefix.dtype, shares=z is None)
        maps = prefix.split(opaque.channels, 1) if z is None else [z]
        return run_once(opaque, surroundings, maps, tensors, learns, expected)


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
        y, bottleneck, statistics, random = _run_layer(buffer, spec, layer, tensors, learns)
        saved.bottlenecks.append(bottleneck if spec.keeps_bottleneck(layer) else None)
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


class _Made(NamedTuple):
    """What a layer makes: new maps, and what :class:`Saved` may keep of it."""

    y: Tensor
    bottleneck: Tensor | None = None
    statistics: Statistics | None = None
    random: Tensor | None = None


def _run_layer(
    buffer: FeatureBuffer,
    spec: BlockSpec,
    layer: LayerSpec,
    tensors: Sequence[Any],
    learns: bool,
) -> _Made:
    first, *second = layer.parts
    random = statistics = None
    if isinstance(first, Opaque):
        y, random = buffer.run(first, layer.width, tensors[0], learns)
    else:
        y, statistics = buffer.read(first, tensors[0], layer.keeps_bottleneck_statistics)
    if not second:
        return _Made(y, random=random)
    if isinstance(second[0], Opaque):
        new, random = buffer.run(second[0], layer.growth, tensors[1], learns, y)
        return _Made(new, y, random=random)
    if isinstance(first, Opaque):
        if y.dtype not in (spec.types.compute, spec.types.features):
            raise Unfit(first.name, f"hands {y.dtype} to a norm")
        y = y.contiguous(memory_format=buffer.units.memory_format)
        statistics = buffer.units.ops.batch_statistics(y, spec.types.statistics)
    if statistics is not None:
        statistics = joined_statistics(statistics, y, spec.process_group)
    ready = buffer.units.ready(second[0], tensors[1], statistics, y.shape[1])
    return _Made(buffer.units.forward(y, ready)[0], y, statistics, random)
