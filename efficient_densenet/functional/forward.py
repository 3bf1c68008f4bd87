"""The forward passes: what they compute, and the little that they keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efficient_densenet.functional.opaque import Expected, Opaque, Unfit, run_once
from efficient_densenet.functional.precision import outside_autocast
from efficient_densenet.functional.spec import BlockSpec, Keeps, LayerSpec, UnitSpec, UnitTensors
from efficient_densenet.functional.synchronise import joined_statistics
from efficient_densenet.functional.units import Reading, UnitRunner
from efficient_densenet.kernels.interface import Statistics
from efficient_densenet.kernels.layout import empty_map, outer_format


class Kept(NamedTuple):
    """What is kept of a part of a layer, as far as ``BlockSpec.keeps`` says.

    Attributes:
        made: the map ``(N, width, *spatial)`` that it left for the next part, in the compute type.
        statistics: of that map, two vectors ``(width,)``.
        random: ``uint8``, the state of the random generators from which an opaque part drew,
            empty if it drew nothing.
    """

    made: Tensor | None = None
    statistics: Statistics | None = None
    random: Tensor | None = None

    @classmethod
    def take(cls, keeps: Keeps, values: Iterator[Tensor]) -> Kept:
        """The next values, as far as there are any."""
        return cls(
            next(values) if keeps.made else None,
            Statistics(next(values), next(values)) if keeps.statistics else None,
            next(values) if keeps.random else None,
        )


class Saved(NamedTuple):
    """What a block's forward pass leaves for its backward pass.

    Attributes:
        features: ``(N, channels, *spatial)``, the input's channels first, in the features' type.
        statistics: theirs, two vectors ``(channels,)`` in the statistics' type, written as far
            as a norm reads them.
        layers: of each layer what is kept of its parts.
    """

    features: Tensor
    statistics: Statistics
    layers: list[list[Kept]]

    def flat(self, spec: BlockSpec) -> list[Tensor]:
        """Its tensors in order; the features only if they are not at the block's border."""
        found = [self.features] if spec.layers and spec.exit else []
        found += self.statistics
        for made, statistics, random in chain.from_iterable(self.layers):
            found += [t for t in (made, *(statistics or ()), random) if t is not None]
        return found

    @classmethod
    def of(cls, spec: BlockSpec, border: Tensor | None, flat: Sequence[Tensor]) -> Saved:
        """The inverse of :meth:`flat`; ``border`` is :func:`features_at_border`."""
        tensors = iter(flat)
        features = next(tensors) if border is None else border
        statistics = Statistics(next(tensors), next(tensors))
        layers = [[Kept.take(keeps, tensors) for keeps in layer] for layer in spec.keeps]
        return cls(features, statistics, layers)


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

    def so_far(self) -> Reading:
        """All maps so far, for a part that reads them."""
        channels = self._filled
        statistics = self._spec.oldest_statistics(self.statistics, channels)
        return Reading(self._spec.oldest(self.maps, channels, 1), channels, statistics)

    def read(self, unit: UnitSpec, tensors: UnitTensors) -> Tensor:
        """The result of a unit that reads all maps so far."""
        reading = self.so_far()
        return self.units.forward(reading.maps, self.units.ready(unit, tensors, reading))[0]


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
    run = LayerForward(spec, buffer.units, learns)
    saved = Saved(buffer.maps, buffer.statistics, [])
    for layer, tensors, keeps, seed in zip(spec.layers, layers, spec.keeps, seeds, strict=True):
        y, kept = run(layer, tensors, keeps, buffer.so_far())
        saved.layers.append(kept)
        if seed is not None:
            y = buffer.units.dropped(y, layer, seed)
        buffer.append(y)
        del y, kept
    if spec.exit:
        return buffer.read(spec.exit, exit_tensors), saved
    features = buffer.maps.contiguous(memory_format=outer_format(x))
    return features, saved._replace(features=features)


class LayerForward:
    """Runs layers part by part; ``learns`` says whether anything that the block reads does."""

    def __init__(self, spec: BlockSpec, units: UnitRunner, learns: bool) -> None:
        self.spec, self.units, self.learns = spec, units, learns

    def __call__(
        self, layer: LayerSpec, tensors: Sequence[Any], keeps: Sequence[Keeps], reading: Reading
    ) -> tuple[Tensor, list[Kept]]:
        """The maps that a layer makes of what it reads, and what is kept of its parts."""
        found = []
        parts = zip(layer.parts, tensors, layer.widths, keeps, strict=True)
        for part, own, width, keep in parts:
            random = None
            if isinstance(part, UnitSpec):
                ready = self.units.ready(part, own, reading)
                y, statistics = self.units.forward(reading.maps, ready, keep.statistics)
            else:
                y, random = self._run(part, own, reading, width)
                y, statistics = self._normed(part, y) if keep.statistics else (y, None)
            if statistics is not None:
                statistics = joined_statistics(statistics, y, self.spec.process_group)
            found.append(Kept(y if keep.made else None, statistics, random))
            reading = Reading(y, width, statistics)
        return reading.maps, found

    def _run(
        self, part: Opaque, tensors: Sequence[Tensor], reading: Reading, width: int
    ) -> tuple[Tensor, Tensor]:
        """What an opaque part makes, and the random state that it drew from."""
        assert self.spec.surroundings is not None
        maps = reading.parts(part.channels)
        shape = torch.Size([len(maps[0]), width, *maps[0].shape[2:]])
        expected = Expected(shape, self.spec.types.features)
        return run_once(part, self.spec.surroundings, maps, tensors, self.learns, expected)

    def _normed(self, part: Opaque, y: Tensor) -> tuple[Tensor, Statistics]:
        """What an opaque part has made, as a norm reads it."""
        types = self.spec.types
        if y.dtype not in (types.compute, types.features):
            raise Unfit(part.name, f"hands {y.dtype} to a norm")
        y = y.contiguous(memory_format=self.units.memory_format)
        return y, self.units.ops.batch_statistics(y, types.statistics)
