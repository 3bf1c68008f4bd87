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
    some_channels,
)
from efficient_densenet.kernels.layout import inner_format as inner_format
from efficient_densenet.kernels.slabs import Activate, backward_of_slabs, tail_of_slabs
from efficient_densenet.kernels.workspace import Workspace

# Channels that PyTorch's batch-norm kernels should find in a row. They sum each in 32 bits, so that
# more and shorter sums are more precise, and take some at once: what is left over goes one by one
# (12 channels take 4.5 times as long, 132 take 1.7 times: `benchmarks/choices.py`).
ROW = 128
AT_ONCE = 16
FEW = 64
"""Positions whose sums are short as they are, and where calls into PyTorch cost more than sums."""

aten = torch.ops.aten


class Norm(NamedTuple):
    """``y = x * scale + shift``; four vectors."""

    mean: Tensor
    invstd: Tensor
    scale: Tensor
    shift: Tensor


class Sums(NamedTuple):
    """``Σ d`` and ``Σ d * (x - mean) * invstd``, two vectors: dβ and dγ."""

    beta: Tensor
    gamma: Tensor


def make_norm(
    statistics: Statistics,
    channels: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Norm:
    mean, var = statistics.first(channels)
    invstd = (var + eps).rsqrt_()
    scale = invstd if weight is None else in_dtype(weight, mean.dtype) * invstd
    bias = torch.zeros_like(mean) if bias is None else in_dtype(bias, mean.dtype)
    return Norm(mean, invstd, scale, torch.addcmul(bias, mean, scale, value=-1))


def make_tail(tail: Tail) -> Tail:
    if tail.conv is None or tail.conv.weight.dtype == tail.dtype:
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
    return Statistics(mean, var)


def append(y: Tensor, into: Tensor | None, start: int, statistics: Statistics | None) -> None:
    channels = slice(start, start + y.shape[1])
    into = None if into is None else some_channels(into, channels)
    if into is not None and statistics is None:
        into.copy_(y)
        return
    if into is not None:
        y = y.to(into.dtype, memory_format=outer_format(into))  # what statistics are fast on
        into.copy_(y)
    if statistics is not None:
        mean, var = batch_statistics(y, statistics.mean.dtype)
        rows_of(statistics.mean, channels).copy_(mean)
        rows_of(statistics.var, channels).copy_(var)


def forward_unit(
    x: Tensor,
    unit: Unit,
    workspace: Workspace,
    *,
    need_statistics: bool,
    reader: Unit | None = None,
) -> tuple[Tensor, Statistics | None]:
    x = first_channels(x, unit.channels)
    activated = _activated(_normalised(unit.norm, x.dim()), unit.activation)
    y = tail_of_slabs(x, unit.tail, workspace, activated)
    return y, batch_statistics(y, unit.norm.mean.dtype) if need_statistics else None


def can_wait(x: Tensor, unit: Unit, workspace: Workspace) -> bool:
    return False


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
    norm, activation, tail, channels, _ = unit
    x = first_channels(x, channels)
    target = None if target is None else first_channels(target, channels)
    scale = per_channel(norm.scale, x.dim())
    normalised = _normalised(norm, x.dim())
    activate = _activated(normalised, activation)
    sums: Sums | None = None

    def receive(rows: slice, y: Tensor, d: Tensor) -> None:
        nonlocal sums
        if derivative_reads_input(activation):
            normalised(rows_of(x, rows), y)
        activate_backward_(d, y, activation)
        if need_sums:
            part = channel_sums(d, rows_of(x, rows), norm, workspace)
            sums = part if sums is None else Sums(*map(torch.add, sums, part))
        if target is not None and accumulate:
            rows_of(target, rows).addcmul_(d, scale)
        elif target is not None:
            torch.mul(d, scale, out=rows_of(target, rows))

    needs = (need_sums or target is not None, need_weight, need_bias)
    weight, bias = backward_of_slabs(grad, x, tail, workspace, activate, needs, receive)
    return UnitGradients(weight, bias, sums)


def collect(
    sums: Sums,
    unit: Unit,
    share: float,
    totals: tuple[Tensor, Tensor] | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    if totals is not None:
        scaled = unit.norm.scale * share
        a, b = (rows_of(total, slice(0, unit.channels)) for total in totals)
        if accumulate:
            a.addcmul_(scaled, sums.beta)
            b.addcmul_(scaled.mul_(unit.norm.invstd), sums.gamma)
        else:
            torch.mul(scaled, sums.beta, out=a)
            torch.mul(scaled.mul_(unit.norm.invstd), sums.gamma, out=b)
    return sums


def correct(
    grad: Tensor,
    x: Tensor,
    channels: slice,
    mean: Tensor,
    a: Tensor,
    b: Tensor,
    out: Tensor,
) -> Tensor:
    grad, x = some_channels(grad, channels), some_channels(x, channels)
    mean, a, b = (rows_of(vector, channels) for vector in (mean, a, b))
    constant = per_channel(torch.addcmul(a, mean, b, value=-1), x.dim())
    exact = out if out.dtype == mean.dtype else torch.empty_like(out, dtype=mean.dtype)
    torch.sub(grad, constant, out=exact).addcmul_(x, per_channel(b, x.dim()), value=-1)
    return exact if exact is out else out.copy_(exact)  # rounded once


def corrects_each_reader() -> bool:
    return False


def scratch_dtype(features: torch.dtype, statistics: torch.dtype) -> torch.dtype:
    return statistics  # centred maps are summed in it


def summed_dtype(features: torch.dtype, statistics: torch.dtype) -> torch.dtype:
    return statistics  # what is added has been computed in it


def corrected_dtype(compute: torch.dtype, statistics: torch.dtype) -> torch.dtype:
    return statistics  # rounded by those who read it, slab by slab


def _normalised(norm: Norm, dim: int) -> Activate:
    """Of maps of ``dim`` dimensions."""
    scale, shift = per_channel(norm.scale, dim), per_channel(norm.shift, dim)

    def normalised(x: Tensor, out: Tensor) -> Tensor:
        # Reads x once, and rounds as PyTorch's own batch norm does on a CPU.
        return torch.addcmul(shift, x, scale, out=out)

    return normalised


def _activated(normalised: Activate, activation: Activation) -> Activate:
    return lambda x, out: activate_(normalised(x, out), activation)


def channel_sums(d: Tensor, x: Tensor, norm: Norm, workspace: Workspace) -> Sums:
    """The sums of a unit's gradient ``d`` of ``norm(x)``, in one pass over maps that are dense."""
    channels, mean, invstd = x.shape[1], norm.mean, norm.invstd
    if x.dtype != mean.dtype or not x.is_contiguous(memory_format=workspace.memory_format):
        centered = workspace.scratch(x, mean.dtype)
        x, mean = torch.sub(x, per_channel(mean, x.dim()), out=centered), torch.zeros_like(mean)
    fold = _fold(x)
    if fold > 1:
        mean, invstd = mean.repeat(fold), invstd.repeat(fold)
    _, gamma, beta = aten.native_batch_norm_backward(
        _folded(in_dtype(d, mean.dtype), fold),
        _folded(x, fold),
        None,
        None,
        None,
        mean,
        invstd,
        True,
        0.0,
        [False, True, True],
    )
    if fold > 1:
        beta, gamma = (total.view(fold, channels).sum(0) for total in (beta, gamma))
    return Sums(beta, gamma)


def _fold(x: Tensor) -> int:
    """How many positions of a map with its channels last make up a row."""
    channels = x.shape[1]
    if x.numel() <= FEW * channels or not is_channels_last(x):
        return 1
    enough = 1 << max(1, ROW // channels).bit_length() - 1
    whole = AT_ONCE // math.gcd(AT_ONCE, channels)
    return math.gcd(x.numel() // channels, max(enough, whole))


def _folded(x: Tensor, fold: int) -> Tensor:
    """A map as a matrix of ``fold`` positions a row; itself if that is one."""
    return x if fold == 1 else x.movedim(1, -1).reshape(-1, fold * x.shape[1])
