"""What operators allocate and free inside themselves on a CPU, where no one else sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from efficient_densenet.kernels.layout import outer_format
from efficient_densenet.memory.convolutions import is_by_onednn, is_pointwise, result_format
from efficient_densenet.memory.shapes import Arguments, Result, tensors_of

Scratch = Callable[[OpOverload, Arguments, Result], int]
"""Bytes that an operator allocates and frees inside itself, by operator, arguments and result."""

_CONVOLUTION = torch.ops.aten.convolution.default
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
_BATCH_NORM_BACKWARD = torch.ops.aten.native_batch_norm_backward.default
_AVERAGE_BACKWARD = torch.ops.aten.avg_pool2d_backward.default
_AVERAGES_OF_VOLUMES = (
    torch.ops.aten.avg_pool3d.default,
    torch.ops.aten.avg_pool3d_backward.default,
)
_ONE_CHANNEL = 1 << 17
_ONEDNN_BLOCK = 16  # channels; 8 where the CPU has no AVX-512


def cpu_scratch(func: OpOverload, args: Arguments, result: Result) -> int:
    """About the most that an operator allocates and frees internally on a CPU, in bytes.

    That is :func:`convolution_scratch`, :func:`copy_scratch` or :func:`cast_scratch`, where one of
    them applies.
    """
    if func is _CONVOLUTION or func is _CONVOLUTION_BACKWARD:
        return convolution_scratch(func, args, result)
    return copy_scratch(func, args) or cast_scratch(func, args, result)


def copy_scratch(func: OpOverload, args: Arguments) -> int:
    """What an operator on a map allocates and frees that works on a copy of it, in bytes.

    The gradient of a batch norm's input is allocated twice if the arriving one lies as the input
    does. Averages of volumes, and their gradients, are those of contiguous maps. The gradient
    of an average is made in the format of the one that arrives.

    Source: measured with torch 2.14.
    """
    if func is _BATCH_NORM_BACKWARD:
        grad, x, *_, wanted = args
        dense = all(t.is_contiguous(memory_format=outer_format(x)) for t in (grad, x))
        return x.nbytes if wanted[0] and dense else 0
    if func in _AVERAGES_OF_VOLUMES:
        return 0 if args[0].is_contiguous() else args[0].nbytes
    if func is _AVERAGE_BACKWARD:
        return 0 if outer_format(args[0]) == outer_format(args[1]) else args[1].nbytes
    return 0


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
    format: torch.memory_format

    @classmethod
    def of(cls, func: OpOverload, args: Arguments, result: Result) -> Convolution:
        backward, needs_x = func is _CONVOLUTION_BACKWARD, False
        if backward:
            result, args, needs_x = args[0], args[1:-1], args[-1][0]
        x, weight, _, stride, padding, *_, groups = args
        format = result_format(x, weight, None, stride, groups)
        return cls(x, result, weight, stride, padding, groups, backward, needs_x, format)

    @property
    def kernel(self) -> torch.Size:
        return self.weight.shape[2:]

    @property
    def is_pointwise(self) -> bool:
        return is_pointwise(self.weight, self.stride)

    @property
    def last(self) -> bool:
        """Whether its input has its channels last."""
        return self.x.stride(1) == 1

    @property
    def leaves_last(self) -> bool:
        """Whether its result has."""
        return self.format != torch.contiguous_format

    @property
    def turned(self) -> int:
        """Values of maps that it reads and that are copied to have their channels last."""
        read = (self.x, self.y) if self.backward else (self.x,)
        apart = (m for m in read if m.shape[1] > 1 and m.stride(1) != 1)
        return sum(m.numel() for m in apart) if self.leaves_last else 0

    @property
    def columns(self) -> int:
        """Values that all positions of the result read of one sample, each its own copy."""
        return self.weight[0].numel() * (self.y.numel() // (len(self.y) * self.y.shape[1]))


def convolution_scratch(func: OpOverload, args: Arguments, result: Result) -> int:
    """About the most that a convolution allocates and frees on a CPU, in bytes.

    It is :func:`onednn_scratch` where oneDNN computes it, otherwise :func:`torch_scratch`.
    """
    it = Convolution.of(func, args, result)
    by_onednn = is_by_onednn(it.x, it.weight, it.stride, it.groups)
    return it.x.itemsize * (onednn_scratch(it) if by_onednn else torch_scratch(it))


def torch_scratch(it: Convolution) -> int:
    """The same of PyTorch's own convolutions, in values: a product of columns, of all samples.

    For a 1x1 convolution the map itself is the columns, whose gradient is a copy in three
    dimensions. Channels-last maps are copied in three dimensions, the gradient that arrives too;
    otherwise the weight is.

    Source: measured with torch 2.14.
    """
    volume = len(it.kernel) == 3
    if it.is_pointwise and not any(it.padding):
        if not volume or not (it.backward or it.last):
            return it.turned
        return it.x.numel() + (it.y.numel() if it.backward and it.last else 0)
    copied = (it.x if volume else it.weight).numel() if it.last else 0
    return len(it.x) * it.columns + copied


def onednn_scratch(it: Convolution) -> int:
    """The same of oneDNN, in values.

    A convolution of contiguous maps copies weight, input and output to and from blocks of channels,
    the last one padded; the weight twice unless it is 1x1. One that reads up to 3 channels, as an
    image has, and needs no gradient of them copies either the output or the weight. One that leaves
    its channels last makes copies of the weight, 2 for 1x1 and 3 for others, and of maps that do
    not have them last; of an image of one channel each thread holds columns, 2^17 values at most.
    In 16 bits the weight's gradient is summed in 32 bits, which is one copy more, but for
    channels-last ones of 1x1 or of few channels: there each thread transposes some channels of a
    sample, 128 of the input and 256 or 32 of the output. Where a volume is not as deep as the
    kernel without its padding, each thread that computes the weight's gradient has 4 of them, and
    the columns of a plane.

    Source: measured with torch 2.14 on AVX-512.
    """
    pointwise = all(size == 1 for size in it.kernel)
    size, threads, last = it.weight.numel(), torch.get_num_threads(), it.leaves_last
    if it.x.shape[1] <= 3 and it.x.itemsize == 4 and not (last or it.needs_x):
        return max(_blocked(it.y), size)
    values = (1 + last + (not pointwise)) * size
    if not last:
        values += _blocked(it.x) + _blocked(it.y)
    elif it.x.shape[1] == 1 and not it.backward:
        values += threads * _ONE_CHANNEL
    values += it.turned
    if it.backward and it.x.itemsize < 4:
        few = it.x.shape[1] < _ONEDNN_BLOCK
        of_y = _of_sample(it.y, 256 if pointwise else 32)
        transposes = last and (pointwise or few)
        values += threads * (_of_sample(it.x, 128) + of_y) if transposes else size
    elif it.backward and _is_shallow(it):
        planes = 4 * size + it.columns // it.y.shape[2]
        values = max(values, threads * planes + last * size)
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
