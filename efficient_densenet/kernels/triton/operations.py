"""The operations in Triton kernels, for CUDA; equations and shapes are in ``interface.py``.

1x1 convolutions are products that normalise and rectify their input on the way in. Other
convolutions and poolings are PyTorch's, on a slab that a kernel has rectified. Sums are left by
tile, in float32, and folded by one more kernel in a fixed order: nothing is added atomically.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor

from efficient_densenet.kernels.interface import Statistics, Sums, Tail, Unit, UnitGradients
from efficient_densenet.kernels.slabs import backward_of_slabs, tail_of_slabs
from efficient_densenet.kernels.triton import vectors
from efficient_densenet.kernels.triton.elementwise import (
    launch_append,
    launch_correct,
    launch_drop,
    launch_rectify,
    launch_rectify_backward,
)
from efficient_densenet.kernels.triton.gradients import (
    launch_input_gradient,
    launch_weight_gradient,
)
from efficient_densenet.kernels.triton.product import launch_product
from efficient_densenet.kernels.triton.vectors import launch_collect, launch_make_norm
from efficient_densenet.kernels.workspace import Workspace

if not isinstance(vectors.make_norm, triton.JITFunction):
    from efficient_densenet.kernels.triton import interpreted

    interpreted.repair()

make_norm, append = launch_make_norm, launch_append
collect, correct, drop = launch_collect, launch_correct, launch_drop


def scratch_dtype(features: torch.dtype, statistics: torch.dtype) -> torch.dtype:
    return features


def corrected_dtype(compute: torch.dtype, statistics: torch.dtype) -> torch.dtype:
    return compute


def batch_statistics(x: Tensor, dtype: torch.dtype) -> Statistics:
    shape = (x.shape[1], *(1,) * (x.dim() - 2))
    statistics = Statistics(*(x.new_empty(shape, dtype=dtype) for _ in range(2)))
    append(x, None, statistics)
    return statistics


def forward_unit(
    x: Tensor, unit: Unit, workspace: Workspace, *, need_statistics: bool
) -> tuple[Tensor, Statistics | None]:
    norm, _, tail = unit
    if is_product(tail):
        return launch_product(x, norm, tail, workspace.memory_format, need_statistics)
    y = tail_of_slabs(x, tail, workspace, partial(launch_rectify, norm))
    return y, batch_statistics(y, norm.mean.dtype) if need_statistics else None


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
    norm, _, tail = unit
    needs_input = need_sums or target is not None
    if is_product(tail):
        weight = launch_weight_gradient(grad, x, norm, tail) if need_weight else None
        bias = grad.sum((0, *range(2, grad.dim())), dtype=norm.mean.dtype) if need_bias else None
        sums = None
        if needs_input:
            sums = launch_input_gradient(grad, x, norm, tail, target, accumulate)
        return UnitGradients(weight, bias, sums if need_sums else None)
    pairs: list[Tensor] = []

    def receive(rows: slice, a: Tensor, d: Tensor) -> None:
        into = None if target is None else target[rows]
        pairs.append(launch_rectify_backward(d, x[rows], norm, into, accumulate))

    weight, bias = backward_of_slabs(
        grad,
        x,
        tail,
        workspace,
        partial(launch_rectify, norm),
        (needs_input, need_weight, need_bias),
        receive,
    )
    sums = Sums(*(pairs[0] if len(pairs) == 1 else torch.cat(pairs, 1))) if need_sums else None
    return UnitGradients(weight, bias, sums)


def is_product(tail: Tail) -> bool:
    """Whether a tail is a convolution of single positions and nothing else: a matrix product."""
    if tail.pool is not None or tail.conv is None:
        return False
    stride, padding, _, groups = tail.conv.geometry
    ones, zeros = set(stride) == {1}, set(padding) == {0}
    return ones and zeros and groups == 1 and set(tail.conv.weight.shape[2:]) == {1}
