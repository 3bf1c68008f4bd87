"""What operators allocate and free inside themselves on a CPU, where no one else sees it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce

import torch
from torch import Tensor
from torch._ops import OpOverload

from efficient_densenet.memory.shapes import Arguments, Result, tensors_of

Scratch = Callable[[OpOverload, Arguments, Result], int]
"""Bytes that an operator allocates and frees inside itself, by operator, arguments and result."""

_CONVOLUTION = torch.ops.aten.convolution.default
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
_ONEDNN_BLOCK = 16  # channels; 8 where the CPU has no AVX-512


def cpu_scratch(func: OpOverload, args: Arguments, result: Result) -> int:
    """About the most that an operator allocates and frees internally on a CPU, in bytes.

    That is :func:`onednn_scratch` or :func:`cast_scratch`, where one of them applies.
    """
    if func is _CONVOLUTION or func is _CONVOLUTION_BACKWARD:
        return onednn_scratch(func, args, result)
    return cast_scratch(func, args, result)


def cast_scratch(func: OpOverload, args: Arguments, result: Result) -> int:
    """What an element-wise operator on tensors of several types allocates and frees, in bytes.

    It computes in the type that all of them promote to. Each operand of another type is copied into
    that, and so is a result that is written into a tensor of another type. A tensor that is changed
    in place is both.

    Source: measured with torch 2.14, and ``compute_types`` in PyTorch's
    ``aten/src/ATen/TensorIterator.cpp``. A GPU casts while it computes.
    """
    if not _is_elementwise(func) or not isinstance(result, Tensor):
        return 0
    operands = [tensor for tensor in tensors_of(args) if tensor.dim()]
    types = {tensor.dtype for tensor in operands}
    if len({*types, result.dtype}) < 2 or not types:
        return 0
    common = reduce(torch.promote_types, types)
    others = [tensor for tensor in operands if tensor.dtype != common]
    if result.dtype != common and result.dtype != torch.bool:
        others.append(result)
    return sum(tensor.numel() for tensor in others) * common.itemsize


@cache
def _is_elementwise(func: OpOverload) -> bool:
    casts = torch.Tag.pointwise in func.tags
    return casts and func.overloadpacket not in (torch.ops.aten._to_copy, torch.ops.aten.copy_)


def onednn_scratch(func: OpOverload, args: Arguments, result: Result) -> int:
    """About the most that oneDNN allocates and frees inside an operator, in bytes.

    A convolution of contiguous maps copies weight, input and output to and from blocks of channels,
    the last one padded; the weight twice unless it is 1x1. One of channels-last maps makes copies
    of the weight only: 2 for 1x1, 3 for others. In 16 bits the weight's gradient is summed in 32
    bits, which is one copy more, but for channels-last 1x1: there each thread transposes some
    channels of a sample, 128 of the input and 256 of the output. With a single thread PyTorch
    itself computes 1x1 convolutions in 32 bits of less than 16 samples, and copies nothing. For
    other operators it is 0.

    Source: measured with torch 2.14 on AVX-512; the last rule is ``ConvParams::use_mkldnn`` in
    PyTorch's ``aten/src/ATen/native/Convolution.cpp``.
    """
    if func is _CONVOLUTION:
        x, y, weight, stride = args[0], result, args[1], args[3]
    elif func is _CONVOLUTION_BACKWARD:
        y, x, weight, _, stride = args[:5]
    else:
        return 0
    pointwise = all(size == 1 for size in weight.shape[2:])
    last = x.stride(1) == 1
    sums = x.itemsize < 4 and func is _CONVOLUTION_BACKWARD
    threads = torch.get_num_threads()
    if pointwise and set(stride) == {1} and x.itemsize >= 4 and threads == 1 and len(x) < 16:
        return 0
    values = (1 + last + (not pointwise)) * weight.numel()
    if not last:
        values += _blocked(x) + _blocked(y)
    if sums and last and pointwise:
        values += threads * (_of_sample(x, 128) + _of_sample(y, 256))
    elif sums:
        values += weight.numel()
    return values * x.itemsize


def _blocked(maps: Tensor) -> int:
    """Values of ``maps`` with whole blocks of channels."""
    channels = maps.shape[1]
    return maps.numel() // channels * -(-channels // _ONEDNN_BLOCK) * _ONEDNN_BLOCK


def _of_sample(maps: Tensor, most: int) -> int:
    """Values of one sample in at most so many channels."""
    return min(maps.shape[1], most) * (maps.numel() // (len(maps) * maps.shape[1]))
