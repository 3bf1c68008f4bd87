"""Runs units - BN, activation, pool, convolution - through one implementation of the operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet.functional.spec import (
    BlockSpec,
    LayerSpec,
    StemSpec,
    UnitSpec,
    UnitTensors,
    operations_of,
)
from efficient_densenet.kernels.interface import (
    Conv,
    Statistics,
    Tail,
    Unit,
    UnitGradients,
)
from efficient_densenet.kernels.layout import first_channels, in_dtype
from efficient_densenet.kernels.workspace import Workspace


class Reading(NamedTuple):
    """What a part reads: the first ``channels`` of a map.

    Its batch statistics are of as many channels or more; ``None`` if none are used.
    """

    maps: Tensor
    channels: int
    statistics: Statistics | None

    def parts(self, channels: Sequence[int]) -> tuple[Tensor, ...]:
        """Its parts of so many ``channels`` each."""
        return first_channels(self.maps, self.channels).split(channels, 1)


class UnitRunner:
    """One pass's operations and the scratch that they share.

    ``like`` is a map of the samples and the size that the units read, ``widest`` the channels of
    the widest of them.
    """

    def __init__(
        self,
        spec: BlockSpec | StemSpec,
        like: Tensor,
        widest: int,
        memory_format: torch.memory_format,
    ) -> None:
        self.types, self.memory_format = spec.types, memory_format
        self.ops = operations_of(spec, like)
        scratch = self.ops.scratch_dtype(spec.types.features, spec.types.statistics)
        self.workspace = Workspace(like, widest, scratch, memory_format)

    def can_wait(self, maps: Tensor, ready: Unit) -> bool:
        """Whether the gradient of maps that only this unit reads can wait for their batch terms."""
        return ready.batch_statistics and self.ops.can_wait(maps, ready, self.workspace)

    def ready(self, unit: UnitSpec, tensors: UnitTensors, reading: Reading) -> Unit:
        """The unit for what it reads."""
        maps, channels, statistics = reading
        return self.ready_for(unit, tensors, maps.dtype, channels, statistics)

    def ready_for(
        self,
        unit: UnitSpec,
        tensors: UnitTensors,
        dtype: torch.dtype,
        channels: int,
        statistics: Statistics | None,
    ) -> Unit:
        """The same, for maps of ``dtype`` that need not be there yet."""
        if statistics is None or not unit.batch_statistics:
            running = (tensors.running_mean, tensors.running_var)
            statistics = Statistics(*(in_dtype(v, self.types.statistics) for v in running))
        norm = self.ops.make_norm(statistics, channels, tensors.weight, tensors.bias, unit.eps)
        tail = self._tail(unit, tensors, dtype)
        return Unit(norm, unit.activation, tail, channels, unit.batch_statistics)

    def _tail(self, unit: UnitSpec, tensors: UnitTensors, dtype: torch.dtype) -> Tail:
        if unit.conv is None:
            return Tail(unit.pool, None, dtype)
        conv = Conv(tensors.conv_weight, tensors.conv_bias, unit.conv)
        return self.ops.make_tail(Tail(unit.pool, conv, self.types.compute))

    def forward(
        self, x: Tensor, ready: Unit, need_statistics: bool = False, reader: Unit | None = None
    ) -> tuple[Tensor, Statistics | None]:
        """What a unit makes of the map ``x``, and the batch statistics of the result."""
        return self.ops.forward_unit(
            x, ready, self.workspace, need_statistics=need_statistics, reader=reader
        )

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        ready: Unit,
        needs: UnitTensors,
        *,
        need_sums: bool,
        target: Tensor | None,
        accumulate: bool = False,
    ) -> UnitGradients:
        """The operation's gradients, ``needs`` those of its convolution; see the interface."""
        return self.ops.backward_unit(
            grad,
            x,
            ready,
            self.workspace,
            need_weight=bool(needs.conv_weight),
            need_bias=bool(needs.conv_bias),
            need_sums=need_sums,
            target=target,
            accumulate=accumulate,
        )

    def dropped(self, y: Tensor, layer: LayerSpec, seed: Tensor) -> Tensor:
        """The maps that a layer has made after its dropout; overwritten only if a unit made them.

        What a part that is not known returns may be kept by who has a hook on it.
        """
        if layer.drop_rate and not isinstance(layer.parts[-1], UnitSpec):
            y = y.clone()
        self.drop(y, layer, seed)
        return y

    def drop(self, y: Tensor, layer: LayerSpec, seed: Tensor) -> None:
        """A layer's dropout of ``y``, in place."""
        if layer.drop_rate:
            self.ops.drop(y, seed, layer.drop_rate, layer.drops_maps, self.memory_format)

    @property
    def summed_dtype(self) -> torch.dtype:
        """The type in which the gradients of a block's features are summed."""
        return self.ops.summed_dtype(self.types.features, self.types.statistics)

    @property
    def corrected_dtype(self) -> torch.dtype:
        """The type of a map's gradient when it has been corrected."""
        return self.ops.corrected_dtype(self.types.compute, self.types.statistics)
