"""What operators allocate and free inside themselves on a CPU, where no one else sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from efficient_densenet.kernels.layout import outer_format
from efficient_densenet.memory.shapes import Arguments, Result, tensors_of

Scratch = Callable[[OpOverload, Arguments, Result], int]
"""Bytes that an operator allocates and frees inside itself, by operator, arguments and result."""

_CONVOLUTION = torch.ops.aten.convolution.default
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
_BATCH_NORM_BACKWARD = torch.ops.aten.native_batch_norm_backward.default
_ONEDNN_BLOCK = 16  # channels; 8 where the CPU has no AVX-512


def cpu_scratch(func: OpOverload, args: Arguments, result: Result) -> int:
    """About the most that an operator allocates and frees internally on a CPU, in bytes.

    That is :func:`convolution_scratch`, :func:`batch_norm_scratch` or :func:`cast_scratch`, where
    one of them applies.
    """
    if func is _CONVOLUTION or func is _CONVOLUTION_BACKWARD:
        return convolution_scratch(func, args, result)
    if func is _BATCH_NORM_BACKWARD:
        return batch_norm_scratch(args)
    return cast_scratch(func, args, result)


def batch_norm_scratch(args: Arguments) -> int:
    """What batch norm's backward pass allocates and frees, in bytes.

    The input's gradient is allocated twice, where the output's is in the input's memory format.

    Source: measured with torch 2.14.
    """
    gradient, x, *_, wanted = args
    dense = all(t.is_contiguous(memory_format=outer_format(x)) for t in (gradient, x))
    return x.numel() * x.itemsize if wanted[0] and dense else 0


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
    common = reduce(_promoted, types)
    others = [tensor for tensor in operands if tensor.dtype != common]
    if result.dtype != common and result.dtype != torch.bool:
        others.append(result)
    return sum(tensor.numel() for tensor in others) * common.itemsize


@cache
def _is_elementwise(func: OpOverload) -> bool:
    casts = torch.Tag.pointwise in func.tags
    return casts and func.overloadpacket not in (torch.ops.aten._to_copy, torch.ops.aten.copy_)


@cache  # where there are fake tensors, torch asks their mode
def _promoted(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    return torch.promote_types(one, other)


class Convolution(NamedTuple):
    """What an operator convolves: its maps, the weight, and whether it computes gradients."""

    x: Tensor
    y: Tensor
    weight: Tensor
    stride: Sequence[int]
    padding: Sequence[int]
    groups: int
    backward: bool
    needs_x: bool

    @classmethod
    def of(cls, func: OpOverload, args: Arguments, result: Result) -> Convolution:
        if func is _CONVOLUTION_BACKWARD:
            y, x, weight, _, stride, padding, *_, groups, mask = args
            return cls(x, y, weight, stride, padding, groups, True, mask[0])
        x, weight, _, stride, padding, *_, groups = args
        return cls(x, result, weight, stride, padding, groups, False, False)

    @property
    def kernel(self) -> torch.Size:
        return self.weight.shape[2:]

    @property
    def is_pointwise(self) -> bool:
        return set(self.kernel) == set(self.stride) == {1}

    @property
    def last(self) -> bool:
        """Whether maps have their channels last."""
        return self.x.stride(1) == 1

    @property
    def columns(self) -> int:
        """Values that all positions of the result read of one sample, each its own copy."""
        return self.weight[0].numel() * (self.y.numel() // (len(self.y) * self.y.shape[1]))


def convolution_scratch(func: OpOverload, args: Arguments, result: Result) -> int:
    """About the most that a convolution allocates and frees on a CPU, in bytes.

    oneDNN computes it, but not all in 64 bits, and in 32 bits not small ones of a single sample,
    nor with one thread 1x1 convolutions of less than 16.

    Source: ``ConvParams::use_mkldnn`` in PyTorch's ``aten/src/ATen/native/Convolution.cpp``.
    """
    it = Convolution.of(func, args, result)
    narrow = it.groups == 1 and not all(size > 3 for size in it.kernel[-2:])
    single = len(it.x) == 1 and it.x.shape[:4].numel() <= 20480 and narrow
    alone = it.is_pointwise and torch.get_num_threads() == 1 and len(it.x) < 16
    by_torch = it.x.itemsize > 4 or (it.x.itemsize == 4 and (single or alone))
    return it.x.itemsize * (torch_scratch(it) if by_torch else onednn_scratch(it))


def torch_scratch(it: Convolution) -> int:
    """The same of PyTorch's own convolutions, in values: a product of columns, of all samples.

    For a 1x1 convolution the map itself is the columns, whose gradient is a copy in three
    dimensions. Channels-last maps are copied in three dimensions, otherwise the weight is.

    Source: measured with torch 2.14.
    """
    volume = len(it.kernel) == 3
    if it.is_pointwise and not any(it.padding):
        return it.x.numel() if volume and (it.backward or it.last) else 0
    copied = (it.x if volume else it.weight).numel() if it.last else 0
    return len(it.x) * it.columns + copied


def onednn_scratch(it: Convolution) -> int:
    """The same of oneDNN, in values.

    A convolution of contiguous maps copies weight, input and output to and from blocks of channels,
    the last one padded; the weight twice unless it is 1x1. One that reads up to 3 channels, as an
    image has, and needs no gradient of them copies either the output or the weight. One of
    channels-last maps makes copies of the weight only: 2 for 1x1, 3 for others. In 16 bits the
    weight's gradient is summed in 32 bits, which is one copy more, but for channels-last 1x1: there
    each thread transposes some channels of a sample, 128 of the input and 256 of the output. Where
    a volume is not as deep as the kernel without its padding, each thread that computes the
    weight's gradient has 4 of them, and the columns of a plane.

    Source: measured with torch 2.14 on AVX-512.
    """
    pointwise = all(size == 1 for size in it.kernel)
    size, threads = it.weight.numel(), torch.get_num_threads()
    if it.x.shape[1] <= 3 and it.x.itemsize == 4 and not (it.last or it.needs_x):
        return max(_blocked(it.y), size)
    values = (1 + it.last + (not pointwise)) * size
    if not it.last:
        values += _blocked(it.x) + _blocked(it.y)
    if it.backward and it.x.itemsize < 4:
        transposed = threads * (_of_sample(it.x, 128) + _of_sample(it.y, 256))
        values += transposed if it.last and pointwise else size
    elif it.backward and _is_shallow(it):
        planes = 4 * size + it.columns // it.y.shape[2]
        values = max(values, threads * planes + it.last * size)
    return values


def _is_shallow(it: Convolution) -> bool:
    """Whether a kernel of a volume reaches from the padding before it to that behind it."""
    volume = len(it.kernel) == 3 and it.kernel[0] > 1
    return volume and it.x.shape[2] + it.padding[0] <= it.kernel[0]


def _blocked(maps: Tensor) -> int:
    """Values of ``maps`` with whole blocks of channels."""
    channels = maps.shape[1]
    return maps.numel() // channels * -(-channels // _ONEDNN_BLOCK) * _ONEDNN_BLOCK


def _of_sample(maps: Tensor, most: int) -> int:
    """Values of one sample in at most so many channels."""
    return min(maps.shape[1], most) * (maps.numel() // (len(maps) * maps.shape[1]))
