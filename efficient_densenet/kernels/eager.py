"""The operations in plain PyTorch: any device, any dtype, the truth of every other implementation.

Equations and shapes are in ``interface.py``. A slab is as many samples as the workspace holds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet.kernels.activations import (
    activate_,
    activate_backward_,
    derivative_reads_input,
)
from efficient_densenet.kernels.dropout import drop as drop
from efficient_densenet.kernels.interface import (
    Activation,
    Statistics,
    Tail,
    Unit,
    UnitGradients,
    per_channel,
)
from efficient_densenet.kernels.layout import (
    first_channels,
    in_dtype,
    is_channels_last,
    outer_format,
    rows_of,
)
from efficient_densenet.kernels.layout import inner_format as inner_format
from efficient_densenet.kernels.slabs import Activate, backward_of_slabs, tail_of_slabs
from efficient_densenet.kernels.workspace import Workspace

# Channels that PyTorch's batch-norm kernels should find in a row. They sum each in 32 bits, so that
# more and shorter sums are more precise, and take some at once: what is left over goes one by one
# (12 channels take 4.5 times as long, 132 take 1.7 times: `benchmarks/choices.py`).
ROW = 128
AT_ONCE = 16

aten = torch.ops.aten


class Norm(NamedTuple):
    """``y = (x - mean) * scale + bias`` with ``scale = γ * invstd``; four vectors."""

    mean: Tensor
    invstd: Tensor
    scale: Tensor
    bias: Tensor


class Sums(NamedTuple):
    """``Σ d`` and ``Σ d * (x - mean)``, two vectors."""

    d: Tensor
    dx: Tensor


def make_norm(
    statistics: Statistics,
    channels: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Norm:
    mean, var = statistics if len(statistics.mean) == channels else statistics.first(channels)
    invstd = (var + eps).rsqrt_()
    scale = invstd if weight is None else in_dtype(weight, mean.dtype).view(mean.shape) * invstd
    bias = torch.zeros_like(mean) if bias is None else in_dtype(bias, mean.dtype).view(mean.shape)
    return Norm(mean, invstd, scale, bias)


def make_tail(tail: Tail) -> Tail:
    if tail.conv is None:
        return tail
    return tail._replace(conv=tail.conv._replace(weight=in_dtype(tail.conv.weight, tail.dtype)))


def batch_statistics(x: Tensor, dtype: torch.dtype) -> Statistics:
    x = in_dtype(x, dtype)
    if type(x) is not Tensor or not x.is_cpu:  # fake tensors know no batch_norm_update_stats
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    else:
        fold = _fold(x)
        mean, var = torch.batch_norm_update_stats(_folded(x, fold), None, None, 0.0)
        if fold > 1:  # groups of equal size, joined by Chan's formula
            spread, mean = torch.var_mean(mean.view(fold, x.shape[1]), 0, correction=0)
            var = var.view(fold, x.shape[1]).mean(0).add_(spread)
    return Statistics(per_channel(mean, x.dim()), per_channel(var, x.dim()))


def append(y: Tensor, into: Tensor | None, start: int, statistics: Statistics | None) -> None:
    channels = slice(start, start + y.shape[1])
    into = None if into is None else into[:, channels]
    if into is not None and statistics is None:
        into.copy_(y)
        return
    if into is not None:
        y = y.to(into.dtype, memory_format=outer_format(into))  # what statistics are fast on
        into.copy_(y)
    if statistics is not None:
        mean, var = batch_statistics(y, statistics.mean.dtype)
        statistics.mean[channels].copy_(mean)
        statistics.var[channels].copy_(var)


def forward_unit(
    x: Tensor, unit: Unit, workspace: Workspace, *, need_statistics: bool
) -> tuple[Tensor, Statistics | None]:
    x = first_channels(x, unit.channels)
    activated = _activated(_normalised(unit.norm), unit.activation)
    y = tail_of_slabs(x, unit.tail, workspace, activated)
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
    norm, activation, tail, channels = unit
    x, target = (
        first_channels(x, channels),
        None if target is None else first_channels(target, channels),
    )
    normalised = _normalised(norm)
    activated = _activated(normalised, activation)
    sums: Sums | None = None

    def receive(rows: slice, y: Tensor, d: Tensor) -> None:
        nonlocal sums
        if derivative_reads_input(activation):
            normalised(rows_of(x, rows), y)
        activate_backward_(d, y, activation)
        if need_sums:
            part = channel_sums(d, rows_of(x, rows), norm.mean, workspace)
            sums = part if sums is None else Sums(sums.d + part.d, sums.dx + part.dx)
        if target is not None and accumulate:
            rows_of(target, rows).addcmul_(d, norm.scale)
        elif target is not None:
            torch.mul(d, norm.scale, out=rows_of(target, rows))

    needs = (need_sums or target is not None, need_weight, need_bias)
    weight, bias = backward_of_slabs(grad, x, tail, workspace, activated, needs, receive)
    return UnitGradients(weight, bias, sums)


def collect(
    sums: Sums,
    unit: Unit,
    share: float,
    totals: tuple[Tensor, Tensor] | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    norm: Norm = unit.norm
    dbeta, dgamma = sums.d, norm.invstd * sums.dx
    if totals is not None:
        a, b = (total[: unit.channels] for total in totals)
        if not accumulate:
            a.zero_()
            b.zero_()
        a.addcmul_(norm.scale, dbeta, value=share)
        b.addcmul_(norm.scale * norm.invstd, dgamma, value=share)
    return dbeta, dgamma


def correct(
    grad: Tensor,
    x: Tensor,
    channels: slice,
    mean: Tensor,
    a: Tensor,
    b: Tensor,
    out: Tensor,
) -> Tensor:
    grad, x = grad[:, channels], x[:, channels]
    mean, a, b = mean[channels], a[channels], b[channels]
    torch.sub(grad, torch.addcmul(a, mean, b, value=-1), out=out)
    return out.addcmul_(x, b, value=-1)


def scratch_dtype(features: torch.dtype, statistics: torch.dtype) -> torch.dtype:
    return statistics  # centred maps are summed in it


def corrected_dtype(compute: torch.dtype, statistics: torch.dtype) -> torch.dtype:
    return statistics  # rounded by those who read it, slab by slab


def _normalised(norm: Norm) -> Activate:
    shift = torch.addcmul(norm.bias, norm.mean, norm.scale, value=-1)

    def normalised(x: Tensor, out: Tensor) -> Tensor:
        # Reads x once, and rounds as PyTorch's own batch norm does on a CPU.
        return torch.addcmul(shift, x, norm.scale, out=out)

    return normalised


def _activated(normalised: Activate, activation: Activation) -> Activate:
    return lambda x, out: activate_(normalised(x, out), activation)


def channel_sums(d: Tensor, x: Tensor, mean: Tensor, workspace: Workspace) -> Sums:
    """``Σ d`` and ``Σ d * (x - mean)`` per channel, in one pass over maps that are dense."""
    channels, dim, mean = x.shape[1], x.dim(), mean.flatten()
    if x.dtype != mean.dtype or not x.is_contiguous(memory_format=workspace.memory_format):
        centered = workspace.scratch(x, mean.dtype)
        x, mean = torch.sub(x, per_channel(mean, dim), out=centered), torch.zeros_like(mean)
    fold = _fold(x)
    if fold > 1:
        mean = mean.expand(fold, -1).flatten()
    _, sum_dx, sum_d = aten.native_batch_norm_backward(
        _folded(in_dtype(d, mean.dtype), fold),
        _folded(x, fold),
        None,
        None,
        None,
        mean,
        torch.ones_like(mean),
        True,
        0.0,
        [False, True, True],
    )
    if fold > 1:
        sum_d, sum_dx = sum_d.view(fold, channels).sum(0), sum_dx.view(fold, channels).sum(0)
    return Sums(per_channel(sum_d, dim), per_channel(sum_dx, dim))


def _fold(x: Tensor) -> int:
    """How many positions of a map with its channels last make up a row."""
    channels = x.shape[1]
    if not is_channels_last(x):
        return 1
    enough = 1 << max(1, ROW // channels).bit_length() - 1
    whole = AT_ONCE // math.gcd(AT_ONCE, channels)
    return math.gcd(x.numel() // channels, max(enough, whole))


def _folded(x: Tensor, fold: int) -> Tensor:
    """A map as a matrix of ``fold`` positions a row; itself if that is one."""
    return x if fold == 1 else x.movedim(1, -1).reshape(-1, fold * x.shape[1])
