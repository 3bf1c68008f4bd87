"""Convolutions by PyTorch's own libraries, without autograd: every implementation has them."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_densenet.kernels.interface import Conv


def convolve(x: Tensor, conv: Conv) -> Tensor:
    """The convolution of ``x``, in its dtype."""
    stride, padding, dilation, groups = conv.geometry
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    weight, no_output_padding = conv.weight.to(x.dtype), [0] * len(stride)
    return torch.convolution(
        x, weight, bias, stride, padding, dilation, False, no_output_padding, groups
    )


def convolve_backward(
    grad: Tensor, x: Tensor, conv: Conv, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`convolve` with respect to ``x``, weight and bias, as far as needed."""
    stride, padding, dilation, groups = conv.geometry
    weight, no_output_padding = conv.weight.to(x.dtype), [0] * len(stride)
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
