"""The operations in plain PyTorch: any device, any dtype, the truth of every other implementation.

A slab is as many samples as the workspace holds; a map is ``(samples, channels, *spatial)``.
Vectors of one value per channel have as many dimensions as the map, to broadcast over it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from efficient_densenet.kernels.interface import Conv, Norm, Tail, UnitGradients

# Scratch that a slab may fill before the next one starts. On two cores with 1 MiB of L2 each and
# 32 MiB of shared L3, times rise below 4 MiB (overhead of small operators) and above 16 MiB.
WORKSPACE_BYTES = 8 << 20

aten = torch.ops.aten


class Workspace:
    """The shared BN storage: two scratch slabs, allocated once a pass, overwritten by every layer.

    ``widest`` is the number of channels of the widest map that the pass will normalise. The centred
    slab has the dtype of the statistics, the rectified one the dtype in which convolutions compute.
    """

    def __init__(
        self,
        like: Tensor,
        widest: int,
        dtype: torch.dtype,
        statistics_dtype: torch.dtype,
        memory_format: torch.memory_format,
    ) -> None:
        samples, _, *self._spatial = like.shape
        self.memory_format = memory_format
        self._positions = math.prod(self._spatial)
        self._itemsize = statistics_dtype.itemsize
        size = min(samples, self._samples(widest)) * widest * self._positions
        size = min(max(size, WORKSPACE_BYTES // self._itemsize), samples * widest * self._positions)
        self._centered = torch.empty(size, dtype=statistics_dtype, device=like.device)
        self._rectified = torch.empty(size, dtype=dtype, device=like.device)

    def _samples(self, channels: int) -> int:
        return max(1, WORKSPACE_BYTES // (channels * self._positions * self._itemsize))

    def _view(self, storage: Tensor, samples: int, channels: int) -> Tensor:
        flat = storage[: samples * channels * self._positions]
        if self.memory_format is torch.contiguous_format:
            return flat.view(samples, channels, *self._spatial)
        return flat.view(samples, *self._spatial, channels).movedim(-1, 1)

    def slabs(self, x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield ``(rows, centred scratch, rectified scratch)`` for each slab of ``x``."""
        samples, channels = x.shape[:2]
        step = self._samples(channels)
        for start in range(0, samples, step):
            stop = min(start + step, samples)
            centered = self._view(self._centered, stop - start, channels)
            rectified = self._view(self._rectified, stop - start, channels)
            yield slice(start, stop), centered, rectified


def batch_statistics(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of a dense map, as vectors ``(channels,)``."""
    if x.is_cuda:
        dims = [0, *range(2, x.dim())]
        var, mean = torch.var_mean(x.to(dtype), dims, correction=0)
        return mean, var
    return torch.batch_norm_update_stats(x.to(dtype), None, None, 0.0)


def norm_relu_tail(x: Tensor, norm: Norm, tail: Tail, workspace: Workspace) -> Tensor:
    """``tail(relu((x - mean) * scale + bias))``, without keeping the normalised map."""
    out: Tensor | None = None
    for rows, _, a in _normalised_slabs(x, norm, workspace):
        y = tail.pool(a) if tail.pool else a
        y = _convolve(y, tail.conv) if tail.conv else y
        if len(y) == len(x) and y is not a:
            return y
        if out is None:
            shape = (len(x), *y.shape[1:])
            out = torch.empty(
                shape, dtype=y.dtype, device=y.device, memory_format=workspace.memory_format
            )
        out[rows] = y
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
    """Gradients of :func:`norm_relu_tail`; batch norm's correction is left to :func:`correct`.

    With ``d`` the gradient at the rectifier's input, writes ``scale * d`` into ``target`` (adds it
    if ``accumulate``; ``None``: not wanted) and returns the convolution's gradients, ``Σ d`` and
    ``Σ d * (x - mean)``.
    """
    weight = bias = sum_d = sum_dx = None
    need_d = need_sums or target is not None
    for rows, centered, a in _normalised_slabs(x, norm, workspace):
        da, slab_weight, slab_bias = _tail_backward(
            grad[rows].to(a.dtype), a, tail, (need_d, need_weight, need_bias)
        )
        weight, bias = _add(weight, slab_weight), _add(bias, slab_bias)
        if da is None:
            continue
        d = aten.threshold_backward.grad_input(da, a, 0, grad_input=a)
        if need_sums:
            slab_dx, slab_d = _channel_sums(d, centered)
            sum_d, sum_dx = _add(sum_d, slab_d), _add(sum_dx, slab_dx)
        if target is not None and accumulate:
            target[rows].addcmul_(d, norm.scale)
        elif target is not None:
            torch.mul(d, norm.scale, out=target[rows])
    return UnitGradients(weight, bias, sum_d, sum_dx)


def correct(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    workspace: Workspace,
) -> Tensor:
    """``out = grad - a - (x - mean) * b``: batch norm's two batch terms, for a finished map."""
    for rows, centered, _ in workspace.slabs(x):
        torch.sub(x[rows], mean, out=centered)
        torch.sub(grad[rows], a, out=out[rows])
        out[rows].addcmul_(centered, b, value=-1)
    return out


def _normalised_slabs(
    x: Tensor, norm: Norm, workspace: Workspace
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for rows, centered, rectified in workspace.slabs(x):
        torch.sub(x[rows], norm.mean, out=centered)
        torch.addcmul(norm.bias, centered, norm.scale, out=rectified).relu_()
        yield rows, centered, rectified


def _convolve(a: Tensor, conv: Conv) -> Tensor:
    dims = a.dim() - 2
    bias = None if conv.bias is None else conv.bias.to(a.dtype)
    return torch.convolution(
        a,
        conv.weight.to(a.dtype),
        bias,
        [1] * dims,
        conv.padding,
        conv.dilation,
        False,
        [0] * dims,
        conv.groups,
    )


def _tail_backward(
    grad: Tensor, a: Tensor, tail: Tail, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``tail(a)`` with respect to ``a``, the weight and the bias, as far as needed."""
    if tail.pool is None:
        return _convolution_backward(grad, a, tail.conv, needs)
    with torch.enable_grad():
        leaf = a.detach().requires_grad_()
        pooled = tail.pool(leaf)
    dpooled, weight, bias = _convolution_backward(grad, pooled.detach(), tail.conv, needs)
    if dpooled is None:
        return None, weight, bias
    return torch.autograd.grad(pooled, leaf, dpooled)[0], weight, bias


def _convolution_backward(
    grad: Tensor, a: Tensor, conv: Conv | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if conv is None:
        return (grad if needs[0] else None), None, None
    dims = a.dim() - 2
    return aten.convolution_backward(
        grad,
        a,
        conv.weight.to(a.dtype),
        [len(conv.weight)],
        [1] * dims,
        conv.padding,
        conv.dilation,
        False,
        [0] * dims,
        conv.groups,
        needs,
    )


def _channel_sums(d: Tensor, centered: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ d * centered`` and ``Σ d`` per channel, in one pass."""
    zeros = centered.new_zeros(d.shape[1])
    _, sum_dx, sum_d = aten.native_batch_norm_backward(
        d.to(centered.dtype),
        centered,
        None,
        None,
        None,
        zeros,
        torch.ones_like(zeros),
        True,
        0.0,
        [False, True, True],
    )
    return sum_dx, sum_d


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total + part
