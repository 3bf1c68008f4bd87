"""Convolutions and poolings by PyTorch's own operators, without autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from efficient_densenet.kernels.interface import Conv, Pool
from efficient_densenet.kernels.layout import in_dtype

aten = torch.ops.aten
AVERAGES = {4: aten.avg_pool2d, 5: aten.avg_pool3d}
AVERAGES_BACKWARD = {4: aten.avg_pool2d_backward, 5: aten.avg_pool3d_backward}
MAXIMA = {4: aten.max_pool2d_with_indices, 5: aten.max_pool3d_with_indices}
MAXIMA_BACKWARD = {
    4: aten.max_pool2d_with_indices_backward,
    5: aten.max_pool3d_with_indices_backward,
}


def convolve(x: Tensor, conv: Conv) -> Tensor:
    """The convolution of ``x``, in its dtype."""
    stride, padding, dilation, groups = conv.geometry
    bias = None if conv.bias is None else in_dtype(conv.bias, x.dtype)
    weight, no_output_padding = in_dtype(conv.weight, x.dtype), [0] * len(stride)
    return torch.convolution(
        x, weight, bias, stride, padding, dilation, False, no_output_padding, groups
    )


def convolve_backward(
    grad: Tensor, x: Tensor, conv: Conv, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`convolve` with respect to ``x``, weight and bias, as far as needed."""
    stride, padding, dilation, groups = conv.geometry
    weight, no_output_padding = in_dtype(conv.weight, x.dtype), [0] * len(stride)
    bias_sizes = [len(weight)]
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        bias_sizes,
        stride,
        padding,
        dilation,
        False,
        no_output_padding,
        groups,
        needs,
    )


def pooled(x: Tensor, pool: Pool) -> Tensor:
    """``pool`` of a map ``(N, channels, *spatial)``: a map ``(N, channels, *smaller)``."""
    if pool.kind == "all":
        return x.mean(tuple(range(2, x.dim())), keepdim=True)
    if x.dim() == 3:
        return pooled(x.unsqueeze(2), of_rows(pool)).squeeze(2)
    if _must_widen(x):
        return pooled(x.float(), pool).to(x.dtype)
    if pool.kind == "average":
        return AVERAGES[x.dim()](x, *_average(pool))
    return MAXIMA[x.dim()](x, *_maximum(pool))[0]


def pooled_backward(grad: Tensor, x: Tensor, pool: Pool) -> Tensor:
    """The gradient of :func:`pooled` with respect to ``x``, dense."""
    if pool.kind == "all":
        return torch.empty_like(x).copy_(grad / math.prod(x.shape[2:]))
    if x.dim() == 3:
        grad, x = grad.unsqueeze(2), x.unsqueeze(2)
        return pooled_backward(grad, x, of_rows(pool)).squeeze(2)
    if _must_widen(x):
        return pooled_backward(grad.float(), x.float(), pool).to(x.dtype)
    if pool.kind == "average":
        return AVERAGES_BACKWARD[x.dim()](grad, x, *_average(pool))
    _, indices = MAXIMA[x.dim()](x, *_maximum(pool))
    return MAXIMA_BACKWARD[x.dim()](grad, x, *_maximum(pool), indices)


def _must_widen(x: Tensor) -> bool:
    """Whether PyTorch has no pooling for maps of this type, which are then widened."""
    return x.dim() == 5 and x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def _average(pool: Pool) -> tuple[object, ...]:
    windows = (pool.kernel, pool.stride, pool.padding)
    return (*windows, pool.ceil_mode, pool.count_padding, pool.divisor)


def _maximum(pool: Pool) -> tuple[object, ...]:
    return pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil_mode


def of_rows(pool: Pool) -> Pool:
    """The same pooling for maps with a spatial dimension of size one put first."""
    return pool._replace(
        kernel=(1, *pool.kernel),
        stride=(1, *pool.stride),
        padding=(0, *pool.padding),
        dilation=(1, *pool.dilation),
    )
