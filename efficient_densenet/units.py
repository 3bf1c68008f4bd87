"""Runs units - BN, ReLU, pooling, convolution - through one implementation of the operations."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_densenet import kernels
from efficient_densenet.kernels.interface import (
    Conv,
    Norm,
    Statistics,
    Tail,
    UnitGradients,
    per_channel,
)
from efficient_densenet.spec import Types, UnitSpec, UnitTensors


class UnitRunner:
    """One pass's operations and the BN storage that they share.

    ``like`` is a map of the samples and the size that the units read, ``widest`` the channels of
    the widest of them.
    """

    def __init__(
        self,
        implementation: str,
        types: Types,
        like: Tensor,
        widest: int,
        memory_format: torch.memory_format,
    ) -> None:
        self.ops = kernels.load(implementation)
        self.types, self.memory_format = types, memory_format
        self.workspace = self.ops.Workspace(like, widest, types.statistics, memory_format)

    def forward(
        self,
        x: Tensor,
        norm: Norm,
        unit: UnitSpec,
        tensors: UnitTensors,
        need_statistics: bool = False,
    ) -> tuple[Tensor, Statistics | None]:
        """What a unit makes of the map ``x``, and the batch statistics of the result."""
        tail = self._tail(unit, tensors)
        return self.ops.norm_relu_tail(
            x, norm, tail, self.workspace, need_statistics=need_statistics
        )

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        norm: Norm,
        unit: UnitSpec,
        tensors: UnitTensors,
        needs: UnitTensors,
        *,
        need_sums: bool,
        target: Tensor | None,
        accumulate: bool = False,
    ) -> UnitGradients:
        """The operation's gradients, ``needs`` those of its convolution; see the interface."""
        return self.ops.norm_relu_tail_backward(
            grad,
            x,
            norm,
            self._tail(unit, tensors),
            self.workspace,
            need_weight=bool(needs.conv_weight),
            need_bias=bool(needs.conv_bias),
            need_sums=need_sums,
            target=target,
            accumulate=accumulate,
        )

    def norm(
        self, unit: UnitSpec, tensors: UnitTensors, statistics: Statistics | None, dim: int
    ) -> Norm:
        """The unit's norm for maps of ``dim`` dimensions with these batch statistics."""
        if statistics is not None and unit.batch_statistics:
            mean, var = statistics
        else:
            vectors = (tensors.running_mean, tensors.running_var)
            mean, var = (per_channel(v.to(self.types.statistics), dim) for v in vectors)
        return self.ops.ready(mean, var, tensors.weight, tensors.bias, unit.eps)

    def _tail(self, unit: UnitSpec, tensors: UnitTensors) -> Tail:
        if unit.conv is None:
            return Tail(unit.pool, None, self.types.features)
        conv = Conv(tensors.conv_weight, tensors.conv_bias, unit.conv)
        return Tail(unit.pool, conv, self.types.compute)
