"""The forward passes: what they compute, and the little that they keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet.kernels import eager as ops
from efficient_densenet.kernels.interface import Conv, Norm, Tail, per_channel
from efficient_densenet.layout import empty_map, inner_format, outer_format
from efficient_densenet.spec import BlockSpec, StemSpec, Types, UnitSpec, UnitTensors


class Statistics(NamedTuple):
    """Batch statistics of a map: mean and biased variance, ``(channels, 1, ...)``."""

    mean: Tensor
    var: Tensor

    def first(self, channels: int) -> Statistics:
        """Those of the first ``channels``."""
        return Statistics(self.mean[:channels], self.var[:channels])


class Saved(NamedTuple):
    """What a block's forward pass leaves for its backward pass.

    ``bottlenecks`` and ``bottleneck_statistics`` have an entry per layer.
    """

    features: Tensor
    statistics: Statistics
    bottlenecks: list[Tensor | None]
    bottleneck_statistics: list[Statistics | None]


class FeatureBuffer:
    """The concatenation storage, and the batch statistics of every map in it.

    Starts with the input ``x``; in a block without layers it is ``x`` itself.
    """

    def __init__(self, spec: BlockSpec, x: Tensor) -> None:
        self._spec, self._types = spec, spec.types
        memory_format = inner_format(x) if spec.layers else outer_format(x)
        entry = x.to(spec.types.features).contiguous(memory_format=memory_format)
        self.maps = empty_map(entry, spec.channels, memory_format) if spec.layers else entry
        self.workspace = ops.Workspace(entry, spec.widest, spec.types.statistics, memory_format)
        shape = (2, spec.channels, *(1,) * (x.dim() - 2))
        vectors = entry.new_empty(shape, dtype=spec.types.statistics)
        self.statistics = Statistics(*vectors)
        self._filled, self._layer = 0, -1
        self.append(entry)

    def append(self, y: Tensor) -> None:
        """Write the next map, and its statistics if a norm reads them."""
        channels = slice(self._filled, self._filled + y.shape[1])
        if self._spec.layers:
            self.maps[:, channels] = y
        if self._spec.reads_statistics(self._layer):
            mean, var = ops.batch_statistics(y.to(self._types.features), self._types.statistics)
            self.statistics.mean[channels], self.statistics.var[channels] = mean, var
        self._filled, self._layer = channels.stop, self._layer + 1

    def read(self, unit: UnitSpec, tensors: UnitTensors) -> Tensor:
        """The result of a unit that reads all maps so far."""
        x, statistics = self.maps[:, : self._filled], self.statistics.first(self._filled)
        return forward_unit(x, unit, tensors, statistics, self._types, self.workspace)


def forward_block(
    spec: BlockSpec, seeds: Sequence[int], x: Tensor, flat: Sequence[Tensor | None]
) -> tuple[Saved, Tensor]:
    """Run the block layer by layer; returns what to save, and the result."""
    layers, exit_tensors = spec.nested(flat)
    buffer = FeatureBuffer(spec, x)
    bottlenecks: list[Tensor | None] = []
    bottleneck_statistics: list[Statistics | None] = []
    for layer, units, seed in zip(spec.layers, layers, seeds, strict=True):
        y = buffer.read(layer.units[0], units[0])
        bottleneck, statistics = None, None
        if len(layer.units) == 2:
            bottleneck = y
            if layer.units[1].batch_statistics:
                statistics = Statistics(*ops.batch_statistics(y, spec.types.statistics))
            y = forward_unit(y, layer.units[1], units[1], statistics, spec.types, buffer.workspace)
        bottlenecks.append(None if spec.recompute_bottleneck else bottleneck)
        bottleneck_statistics.append(statistics)
        if layer.drop_rate:
            y.mul_(dropout_mask(y, layer.drop_rate, seed, buffer.workspace.memory_format))
        buffer.append(y)
        del y, bottleneck
    features = buffer.maps
    if spec.exit:
        out = buffer.read(spec.exit, exit_tensors)
    else:
        features = out = features.contiguous(memory_format=outer_format(x))
    return Saved(features, buffer.statistics, bottlenecks, bottleneck_statistics), out


def forward_stem(
    spec: StemSpec, x: Tensor, conv: Conv, tensors: UnitTensors
) -> tuple[Tensor, Statistics | None, int]:
    """Convolve the image, normalise, rectify and pool.

    Returns the result, the convolution's batch statistics, and its values per channel.
    """
    memory_format = inner_format(x)
    y = ops.convolve(x.to(spec.types.compute, memory_format=memory_format), conv)
    statistics = None
    if spec.unit.batch_statistics:
        statistics = Statistics(*ops.batch_statistics(y, spec.types.statistics))
    workspace = ops.Workspace(y, y.shape[1], spec.types.statistics, memory_format)
    out = forward_unit(y, spec.unit, tensors, statistics, spec.types, workspace)
    return out, statistics, y.numel() // y.shape[1]


def forward_unit(
    x: Tensor,
    unit: UnitSpec,
    tensors: UnitTensors,
    statistics: Statistics | None,
    types: Types,
    workspace: ops.Workspace,
) -> Tensor:
    """What a unit makes of the map ``x``."""
    norm = ready_norm(unit, tensors, statistics, types, x.dim())
    return ops.norm_relu_tail(x, norm, ready_tail(unit, tensors, types), workspace)


def ready_norm(
    unit: UnitSpec, tensors: UnitTensors, statistics: Statistics | None, types: Types, dim: int
) -> Norm:
    """The unit's norm for maps of ``dim`` dimensions with these batch statistics."""
    dtype = types.statistics
    mean, var, weight, bias = (
        None if vector is None else per_channel(vector.to(dtype), dim)
        for vector in (tensors.running_mean, tensors.running_var, tensors.weight, tensors.bias)
    )
    if statistics is not None and unit.batch_statistics:
        mean, var = statistics
    assert mean is not None and var is not None
    invstd = (var + unit.eps).rsqrt_()
    scale = invstd if weight is None else weight * invstd
    return Norm(mean, invstd, scale, torch.zeros_like(mean) if bias is None else bias)


def ready_tail(unit: UnitSpec, tensors: UnitTensors, types: Types) -> Tail:
    """The unit's pooling and convolution with its weight."""
    if unit.conv is None:
        return Tail(unit.pool, None, types.features)
    conv = Conv(tensors.conv_weight, tensors.conv_bias, unit.conv)
    return Tail(unit.pool, conv, types.compute)


def dropout_mask(
    like: Tensor, rate: float, seed: int, memory_format: torch.memory_format
) -> Tensor:
    """Zeros and ``1 / (1 - rate)``, the same whenever it is drawn from one seed and layout."""
    mask = empty_map(like, like.shape[1], memory_format)
    if rate == 1.0:
        return mask.zero_()
    generator = None if like.is_meta else torch.Generator(like.device).manual_seed(seed)
    return mask.bernoulli_(1.0 - rate, generator=generator).div_(1.0 - rate)
