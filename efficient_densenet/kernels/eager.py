"""The operations in plain PyTorch: any device, any dtype, the truth of every other implementation.

Equations and shapes are in ``interface.py``. A slab is as many samples as the workspace holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from efficient_densenet.kernels.convolution import convolve, convolve_backward
from efficient_densenet.kernels.interface import (
    Conv,
    Norm,
    Statistics,
    Tail,
    UnitGradients,
    per_channel,
)
from efficient_densenet.kernels.pooling import pooled, pooled_backward
from efficient_densenet.layout import is_channels_last, is_hollow, outer_format

# Scratch that a slab may fill before the next one starts. On two cores with 0.5 MiB of L2 each and
# 32 MiB of shared L3, blocks took the same time with 4, 5, 6 and 8 MiB (within the noise of 5%) and
# DenseNet-121 4% more with 4 than with 8; the peak of a step grows by twice the difference.
WORKSPACE_BYTES = 4 << 20

# Channels that PyTorch's batch-norm kernels should find in a row. They take 16 at once, and what is
# left over one by one, which costs up to twelve times as much (12 channels of 1.5 MiB: 0.43 against
# 0.03 ms); and they sum each in 32 bits, so that more and shorter sums are also more precise.
ROW = 128

aten = torch.ops.aten


class Workspace:
    """One scratch slab, allocated once a pass, overwritten by every layer."""

    def __init__(
        self, like: Tensor, widest: int, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> None:
        samples, _, *spatial = like.shape
        self.memory_format, self.dtype = memory_format, dtype
        self._threads = torch.get_num_threads()
        self._positions = math.prod(spatial)
        self._spatial_strides = [math.prod(spatial[i + 1 :]) for i in range(len(spatial))]
        self._capacity = WORKSPACE_BYTES // dtype.itemsize
        sample = widest * self._positions
        size = min(samples * sample, max(self._capacity, sample))
        self._storage = torch.empty(size, dtype=dtype, device=like.device)

    def slabs(self, x: Tensor) -> Iterator[slice]:
        """The rows of ``x`` that make up each slab: as few as fit, of equal size.

        A multiple of the threads, or some would wait (a 3x3 convolution's backward pass on 5 and 3
        samples takes a quarter more time than on 4 and 4).
        """
        samples, channels = x.shape[:2]
        most = max(1, self._capacity // (channels * self._positions))
        step = -(-samples // -(-samples // most))
        if most >= self._threads:
            step = min(-(-step // self._threads), most // self._threads) * self._threads
        for start in range(0, samples, step):
            yield slice(start, min(start + step, samples))

    def distinct_slabs(self, x: Tensor) -> Iterable[slice]:
        """The rows of each slab; of a map without values, of the slabs that differ in memory.

        From the third on all slabs but a shorter last one make and drop the same, and some hundred
        layers have tens of thousands of them: an estimate would take a minute.
        """
        slabs = list(self.slabs(x))
        return [*slabs[:3], *slabs[3:][-1:]] if is_hollow(x) else slabs

    def scratch(self, slab: Tensor, dtype: torch.dtype) -> Tensor:
        """The storage in the shape of ``slab``: whatever it held is lost."""
        channels = slab.shape[1]
        last = self.memory_format is not torch.contiguous_format
        across_channels, step = (1, channels) if last else (self._positions, 1)
        spatial = [step * stride for stride in self._spatial_strides]
        storage = self._storage if dtype == self.dtype else self._storage.view(dtype)
        return storage.as_strided(
            slab.shape, (channels * self._positions, across_channels, *spatial)
        )


def batch_statistics(x: Tensor, dtype: torch.dtype) -> Statistics:
    x = x.to(dtype)
    if type(x) is not Tensor or not x.is_cpu:  # fake tensors know no batch_norm_update_stats
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    else:
        fold = _fold(x)
        mean, var = torch.batch_norm_update_stats(_folded(x, fold), None, None, 0.0)
        if fold > 1:  # groups of equal size, joined by Chan's formula
            means = mean.view(fold, x.shape[1])
            mean = means.mean(0)
            var = var.view_as(means).mean(0).add_((means - mean).square_().mean(0))
    return Statistics(per_channel(mean, x.dim()), per_channel(var, x.dim()))


def append(y: Tensor, into: Tensor, dtype: torch.dtype | None) -> Statistics | None:
    if dtype is None:
        into.copy_(y)
        return None
    dense = y.to(into.dtype, memory_format=outer_format(into))  # what statistics are fast on
    into.copy_(dense)
    return batch_statistics(dense, dtype)


def norm_relu_tail(
    x: Tensor, norm: Norm, tail: Tail, workspace: Workspace, *, need_statistics: bool
) -> tuple[Tensor, Statistics | None]:
    y = _tail_of_slabs(x, norm, tail, workspace)
    return y, batch_statistics(y, workspace.dtype) if need_statistics else None


def _tail_of_slabs(x: Tensor, norm: Norm, tail: Tail, workspace: Workspace) -> Tensor:
    out: Tensor | None = None
    shift = _shift(norm)
    for rows in workspace.distinct_slabs(x):
        y = _rectify(x[rows], norm.scale, shift, workspace.scratch(x[rows], tail.dtype))
        y = pooled(y, tail.pool) if tail.pool else y
        y = convolve(y, tail.conv) if tail.conv else y
        if len(y) == len(x):
            return y
        if out is None:
            shape = (len(x), *y.shape[1:])
            out = torch.empty(
                shape, dtype=y.dtype, device=y.device, memory_format=workspace.memory_format
            )
        out[rows] = y
        del y  # or it would live beside the next slab's
    assert out is not None
    return out


def norm_relu_tail_backward(
    grad: Tensor,
    x: Tensor,
    norm: Norm,
    tail: Tail,
    workspace: Workspace,
    *,
    need_weight: bool,
    need_bias: bool,
    need_sums: bool,
    target: Tensor | None,
    accumulate: bool,
) -> UnitGradients:
    weight = bias = sum_d = sum_dx = None
    needs = (need_sums or target is not None, need_weight, need_bias)
    shift = _shift(norm)
    for rows in workspace.distinct_slabs(x):
        slab = x[rows]
        a = _rectify(slab, norm.scale, shift, workspace.scratch(slab, tail.dtype))
        d, slab_weight, slab_bias = _tail_backward(grad[rows].to(tail.dtype), a, tail, needs)
        weight, bias = _add(weight, slab_weight), _add(bias, slab_bias)
        if d is None:
            continue
        aten.threshold_backward.grad_input(d, a, 0, grad_input=d)
        if need_sums:
            slab_d, slab_dx = _channel_sums(d, slab, norm.mean, workspace)
            sum_d, sum_dx = _add(sum_d, slab_d), _add(sum_dx, slab_dx)
        if target is not None and accumulate:
            target[rows].addcmul_(d, norm.scale)
        elif target is not None:
            torch.mul(d, norm.scale, out=target[rows])
        del d  # or it would live beside the next slab's
    return UnitGradients(weight, bias, sum_d, sum_dx)


def correct(grad: Tensor, x: Tensor, mean: Tensor, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    torch.sub(grad, torch.addcmul(a, mean, b, value=-1), out=out)
    return out.addcmul_(x, b, value=-1)


def _shift(norm: Norm) -> Tensor:
    return torch.addcmul(norm.bias, norm.mean, norm.scale, value=-1)


def _rectify(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    # Reads x once, and rounds as PyTorch's own batch norm does on a CPU.
    return torch.addcmul(shift, x, scale, out=out).relu_()


def _tail_backward(
    grad: Tensor, a: Tensor, tail: Tail, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``tail(a)`` with respect to ``a``, the weight and the bias, as far as needed."""
    if tail.pool is None:
        return _convolution_backward(grad, a, tail.conv, needs)
    read = pooled(a, tail.pool) if tail.conv else a
    dread, weight, bias = _convolution_backward(grad, read, tail.conv, needs)
    return None if dread is None else pooled_backward(dread, a, tail.pool), weight, bias


def _convolution_backward(
    grad: Tensor, a: Tensor, conv: Conv | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if conv is None:
        return (grad if needs[0] else None), None, None
    return convolve_backward(grad, a, conv, needs)


def _channel_sums(
    d: Tensor, x: Tensor, mean: Tensor, workspace: Workspace
) -> tuple[Tensor, Tensor]:
    """``Σ d`` and ``Σ d * (x - mean)`` per channel, in one pass over maps that are dense."""
    channels, dim, mean = x.shape[1], x.dim(), mean.flatten()
    if x.dtype != mean.dtype or not x.is_contiguous(memory_format=workspace.memory_format):
        centered = workspace.scratch(x, mean.dtype)
        x, mean = torch.sub(x, per_channel(mean, dim), out=centered), torch.zeros_like(mean)
    fold = _fold(x)
    if fold > 1:
        mean = mean.repeat(fold)
    _, sum_dx, sum_d = aten.native_batch_norm_backward(
        _folded(d.to(mean.dtype), fold),
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
    return per_channel(sum_d, dim), per_channel(sum_dx, dim)


def _fold(x: Tensor) -> int:
    """How many positions of a map with its channels last make up a row."""
    channels = x.shape[1]
    if not is_channels_last(x) or channels > ROW:
        return 1
    return math.gcd(x.numel() // channels, 1 << (ROW // channels).bit_length() - 1)


def _folded(x: Tensor, fold: int) -> Tensor:
    """A map as a matrix of ``fold`` positions a row; itself if that is one."""
    return x if fold == 1 else x.movedim(1, -1).reshape(-1, fold * x.shape[1])


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total + part
