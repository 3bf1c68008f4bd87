"""The operations in Triton kernels, for CUDA; equations and shapes are in ``interface.py``.

1x1 convolutions are products that normalise and rectify their input on the way in. Other
convolutions and poolings are PyTorch's, on a slab that a kernel has rectified. Sums are left by
tile, in float32, and folded by one more kernel in a fixed order: nothing is added atomically.
"""

from __future__ import annotations

import os
from functools import partial

import torch
import triton
from torch import Tensor

from efficient_densenet.kernels.interface import Statistics, Tail, Unit, UnitGradients
from efficient_densenet.kernels.layout import CHANNELS_LAST, first_channels, in_dtype, rows_of
from efficient_densenet.kernels.slabs import backward_of_slabs, tail_of_slabs
from efficient_densenet.kernels.triton import vectors
from efficient_densenet.kernels.triton.elementwise import (
    launch_append,
    launch_correct,
    launch_drop,
    launch_rectify,
    launch_rectify_backward,
    tile_rows,
)
from efficient_densenet.kernels.triton.gradients import (
    launch_input_gradient,
    launch_weight_gradient,
)
from efficient_densenet.kernels.triton.product import launch_product
from efficient_densenet.kernels.triton.vectors import (
    TileSums,
    launch_collect,
)
from efficient_densenet.kernels.triton.vectors import (
    make_norm as make_norm,
)
from efficient_densenet.kernels.workspace import Workspace

if not isinstance(vectors.collect, triton.JITFunction):
    from efficient_densenet.kernels.triton import interpreted

    interpreted.repair()

GRADIENTS = "EFFICIENT_DENSENET_GRADIENTS"
"""The environment variable that says in which type gradients of features are summed."""

append, drop = launch_append, launch_drop
collect, correct = launch_collect, launch_correct


def inner_format(x: Tensor) -> torch.memory_format:
    """Channels last, whatever ``x`` is: a row of a tile is then as long as it has channels."""
    return CHANNELS_LAST.get(x.dim(), torch.contiguous_format)


def corrects_each_reader() -> bool:
    return False


def scratch_dtype(features: torch.dtype, statistics: torch.dtype) -> torch.dtype:
    return features


def summed_dtype(features: torch.dtype, statistics: torch.dtype) -> torch.dtype:
    """That of the features: docs/derivation.md, section 6, has how exact that is."""
    named = os.environ.get(GRADIENTS, "features")
    if named not in ("features", "float32"):
        raise ValueError(f"{GRADIENTS} must be 'features' or 'float32', got {named!r}")
    return features if named == "features" else statistics


def corrected_dtype(compute: torch.dtype, statistics: torch.dtype) -> torch.dtype:
    return compute


def make_tail(tail: Tail) -> Tail:
    """Products convert their weight where they read it."""
    if tail.conv is None or is_product(tail):
        return tail
    return tail._replace(conv=tail.conv._replace(weight=in_dtype(tail.conv.weight, tail.dtype)))


def batch_statistics(x: Tensor, dtype: torch.dtype) -> Statistics:
    statistics = Statistics(*(x.new_empty(x.shape[1], dtype=dtype) for _ in range(2)))
    append(x, None, 0, statistics)
    return statistics


def forward_unit(
    x: Tensor, unit: Unit, workspace: Workspace, *, need_statistics: bool
) -> tuple[Tensor, Statistics | None]:
    if is_product(unit.tail):
        return launch_product(x, unit, workspace, need_statistics)
    x = first_channels(x, unit.channels)
    tail, activate = unit.tail, partial(launch_rectify, unit.norm)
    y = tail_of_slabs(x, tail, workspace, activate, stored=tail.dtype)
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
    norm, _, tail, channels, _ = unit
    needs_input = need_sums or target is not None
    if is_product(tail):
        weight = launch_weight_gradient(grad, x, unit) if need_weight else None
        bias = grad.sum((0, *range(2, grad.dim())), dtype=norm.mean.dtype) if need_bias else None
        sums = None
        if needs_input:
            sums = launch_input_gradient(grad, x, unit, workspace, target, accumulate)
        return UnitGradients(weight, bias, sums if need_sums else None)
    x = first_channels(x, channels)
    target = None if target is None else first_channels(target, channels)
    tiles = [tile_rows(rows_of(x, rows)) for rows in workspace.slabs(x, tail.dtype)]
    pair, written = workspace.vectors(sum(tiles) * 2 * channels), 0

    def receive(rows: slice, a: Tensor, d: Tensor) -> None:
        nonlocal written
        into = None if target is None else rows_of(target, rows)
        launch_rectify_backward(d, rows_of(x, rows), norm, into, accumulate, pair, written)
        written += tile_rows(d)

    weight, bias = backward_of_slabs(
        grad,
        x,
        tail,
        workspace,
        partial(launch_rectify, norm),
        (needs_input, need_weight, need_bias),
        receive,
        stored=tail.dtype,
    )
    return UnitGradients(weight, bias, TileSums(pair, sum(tiles)) if need_sums else None)


def is_product(tail: Tail) -> bool:
    """Whether a tail is a convolution of single positions and nothing else: a matrix product."""
    if tail.pool is not None or tail.conv is None:
        return False
    stride, padding, _, groups = tail.conv.geometry
    ones, zeros = set(stride) == {1}, set(padding) == {0}
    return ones and zeros and groups == 1 and set(tail.conv.weight.shape[2:]) == {1}
