"""The operations on whole maps, for small ones: half as many calls into PyTorch as slab by slab.

Equations and shapes are in ``interface.py``. A norm is PyTorch's own, and so is its gradient, batch
terms included: they are subtracted for each reader of a map, not once a map.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet.kernels.activations import (
    activate_,
    activate_backward_,
    derivative_reads_input,
)
from efficient_densenet.kernels.eager import can_wait as can_wait
from efficient_densenet.kernels.eager import correct as correct
from efficient_densenet.kernels.eager import corrected_dtype as corrected_dtype
from efficient_densenet.kernels.eager import drop as drop
from efficient_densenet.kernels.eager import make_tail as make_tail
from efficient_densenet.kernels.eager import scratch_dtype as scratch_dtype
from efficient_densenet.kernels.eager import summed_dtype as summed_dtype
from efficient_densenet.kernels.interface import Activation, Statistics, Unit, UnitGradients
from efficient_densenet.kernels.layout import first_channels, is_hollow, outer_format, some_channels
from efficient_densenet.kernels.slabs import apply_tail, tail_backward
from efficient_densenet.kernels.workspace import Workspace

# The largest map that is normalised whole: beyond, slabs take as long (`benchmarks/choices.py`).
MOST_BYTES = 2 << 20


class Norm(NamedTuple):
    """``y = (x - mean) * (var + eps)^(-1/2) * weight + bias``; four vectors."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def why_not(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    activations: tuple[Activation, ...],
    small: bool,
) -> str | None:
    """Why small maps are not worth a pass of their own, or ``None``."""
    if not small:
        return "its maps are not small"
    if device.type != "cpu":
        return f"the input is on {device.type!r}"
    if len(set(dtypes)) > 1 or dtypes[0] not in (torch.float32, torch.float64):
        return "it computes in one type, float32 or float64"
    return None


def make_norm(
    statistics: Statistics,
    channels: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Norm:
    return Norm(*statistics.first(channels), weight, bias, eps)


def batch_statistics(x: Tensor, dtype: torch.dtype) -> Statistics:
    if is_hollow(x):  # fake tensors know no batch_norm_update_stats
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        return Statistics(mean, var)
    return Statistics(*torch.batch_norm_update_stats(x, None, None, 0.0))


def append(y: Tensor, into: Tensor | None, start: int, statistics: Statistics | None) -> None:
    channels = slice(start, start + y.shape[1])
    if into is not None:
        some_channels(into, channels).copy_(y)
    if statistics is not None:
        mean, var = batch_statistics(y, statistics.mean.dtype)
        statistics.mean[channels] = mean
        statistics.var[channels] = var


def forward_unit(
    x: Tensor,
    unit: Unit,
    workspace: Workspace,
    *,
    need_statistics: bool,
    reader: Unit | None = None,
) -> tuple[Tensor, Statistics | None]:
    a = activate_(_normalised(_dense(x, unit, workspace), unit.norm), unit.activation)
    y = apply_tail(a, unit.tail)
    return y, batch_statistics(y, unit.norm.mean.dtype) if need_statistics else None


def backward_unit(
    grad: Tensor,
    x: Tensor,
    unit: Unit,
    workspace: Workspace,
    *,
    need_weight: bool,
    need_bias: bool,
    need_sums: bool,
    target: Tensor | None,
    accumulate: bool,
) -> UnitGradients:
    norm, activation = unit.norm, unit.activation
    x = _dense(x, unit, workspace)
    y = _normalised(x, norm)
    a = activate_(y.clone() if derivative_reads_input(activation) else y, activation)
    needs = (need_sums or target is not None, need_weight, need_bias)
    d, conv_weight, conv_bias = tail_backward(grad, a, unit.tail, needs)
    if d is None:
        return UnitGradients(conv_weight, conv_bias, None)
    activate_backward_(d, y, activation)
    dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        d,
        x,
        norm.weight,
        norm.mean,
        norm.var,
        norm.mean,
        (norm.var + norm.eps).rsqrt_(),
        unit.batch_statistics,
        norm.eps,
        [target is not None, need_sums, need_sums],
    )
    if target is not None:
        target = first_channels(target, unit.channels)
        target.add_(dx) if accumulate else target.copy_(dx)
    return UnitGradients(conv_weight, conv_bias, (dbeta, dgamma))


def collect(
    sums: tuple[Tensor, Tensor],
    unit: Unit,
    share: float,
    totals: tuple[Tensor, Tensor] | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    return sums


def corrects_each_reader() -> bool:
    return True


def inner_format(x: Tensor) -> torch.memory_format:
    return outer_format(x)


def _dense(x: Tensor, unit: Unit, workspace: Workspace) -> Tensor:
    """What a unit reads of a map, in the memory that PyTorch's batch norms are fast on."""
    return first_channels(x, unit.channels).contiguous(memory_format=workspace.memory_format)


def _normalised(x: Tensor, norm: Norm) -> Tensor:
    mean, var, weight, bias, eps = norm
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)
