"""The operations in Triton kernels, for CUDA; equations and shapes are in ``interface.py``.

1x1 convolutions are products that normalise and rectify their input on the way in. Other
convolutions and poolings are PyTorch's, on a slab that a kernel has rectified. Sums are left by
tile, in float32, and folded by one more kernel in a fixed order: nothing is added atomically.
"""

from __future__ import annotations

import os
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from efficient_densenet.kernels.aten import convolve, convolve_backward
from efficient_densenet.kernels.interface import Statistics, Tail, Unit, UnitGradients, Waiting
from efficient_densenet.kernels.layout import (
    CHANNELS_LAST,
    empty_map,
    first_channels,
    in_dtype,
    rows_of,
)
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
from efficient_densenet.kernels.triton.pooling import (
    launch_pool,
    launch_pool_backward,
    pools_windows,
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
    x: Tensor,
    unit: Unit,
    workspace: Workspace,
    *,
    need_statistics: bool,
    reader: Unit | None = None,
) -> tuple[Tensor, Statistics | None]:
    if is_product(unit.tail):
        if reader and (is_product(reader.tail) or pools_windows(x, reader.tail)):
            reader = None  # which activates what it reads by itself
        return launch_product(x, unit, workspace, need_statistics, reader)
    tail = unit.tail
    if pools_windows(x, tail):
        y, _ = launch_pool(x, unit, workspace)
        y = convolve(y, tail.conv) if tail.conv else y
    else:
        x, activate = first_channels(x, unit.channels), partial(launch_rectify, unit.norm)
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
    want = Wanted(need_weight, need_bias, need_sums, target, accumulate)
    if is_product(unit.tail):
        return _through_product(grad, x, unit, workspace, want)
    grad = in_dtype(grad, unit.tail.dtype)
    if pools_windows(x, unit.tail):
        return _through_windows(grad, x, unit, workspace, want)
    return _through_slabs(grad, x, unit, workspace, want)


def can_wait(x: Tensor, unit: Unit, workspace: Workspace) -> bool:
    """Where the gradient of the activated map exists as a whole, or is collected from windows."""
    if is_product(unit.tail):
        return False
    return pools_windows(x, unit.tail) or workspace.holds(x, unit.tail.dtype)


class Wanted(NamedTuple):
    """Which gradients :func:`backward_unit` is asked for, and where that of ``x`` goes."""

    weight: bool
    bias: bool
    sums: bool
    target: Tensor | None
    accumulate: bool

    @property
    def input(self) -> bool:
        """Whether the gradient of what the tail reads is needed."""
        return self.sums or self.target is not None

    @property
    def tail(self) -> tuple[bool, bool, bool]:
        """The same, and that of a convolution's weight and bias."""
        return self.input, self.weight, self.bias


def _through_product(
    grad: Tensor, x: Tensor, unit: Unit, workspace: Workspace, want: Wanted
) -> UnitGradients:
    weight = launch_weight_gradient(grad, x, unit) if want.weight else None
    axes = (0, *range(2, grad.dim()))
    bias = grad.sum(axes, dtype=unit.norm.mean.dtype) if want.bias else None
    sums = None
    if want.input:
        sums = launch_input_gradient(grad, x, unit, workspace, want.target, want.accumulate)
    return UnitGradients(weight, bias, sums if want.sums else None)


def _through_windows(
    grad: Tensor, x: Tensor, unit: Unit, workspace: Workspace, want: Wanted
) -> UnitGradients:
    y, choice = launch_pool(x, unit, workspace)
    dy: Tensor | None = grad
    weight = bias = None
    if unit.tail.conv:
        dy, weight, bias = convolve_backward(grad, y, unit.tail.conv, want.tail)
    if not want.input or dy is None:
        return UnitGradients(weight, bias, None)
    sums = _room(tile_rows(first_channels(x, unit.channels)), unit, workspace)
    launch_pool_backward(dy, choice, x, unit, want.target, want.accumulate, sums)

    def corrected(rows: slice, a: Tensor, b: Tensor) -> Tensor:
        part, arriving = rows_of(x, rows), rows_of(dy, rows)
        chosen = None if choice is None else rows_of(choice, rows)
        out = empty_map(part, unit.channels, workspace.memory_format, unit.tail.dtype)
        launch_pool_backward(arriving, chosen, part, unit, out, False, (a, b))
        return out

    return _left(want, weight, bias, sums, corrected)


def _through_slabs(
    grad: Tensor, x: Tensor, unit: Unit, workspace: Workspace, want: Wanted
) -> UnitGradients:
    norm, tail, channels = unit.norm, unit.tail, unit.channels
    activated = workspace.take(x, norm)
    x = first_channels(x, channels)
    target = None if want.target is None else first_channels(want.target, channels)
    tiles = sum(tile_rows(rows_of(x, rows)) for rows in workspace.slabs(x, tail.dtype))
    sums, written = _room(tiles, unit, workspace), 0
    whole: Tensor | None = None

    def receive(rows: slice, a: Tensor, d: Tensor) -> None:
        nonlocal written, whole
        into = None if target is None else rows_of(target, rows)
        launch_rectify_backward(d, rows_of(x, rows), norm, into, want.accumulate, sums, written)
        written += tile_rows(d)
        whole = d if len(d) == len(x) else None

    activate = partial(launch_rectify, norm)
    weight, bias = backward_of_slabs(
        grad, x, tail, workspace, activate, want.tail, receive, tail.dtype, activated
    )
    waiting = None
    if whole is not None:
        waiting = partial(_corrected, whole, x, norm, workspace.memory_format)
    return _left(want, weight, bias, sums, waiting)


def _left(
    want: Wanted,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: TileSums,
    waiting: Waiting | None,
) -> UnitGradients:
    """What is wanted of these: the input's gradient waits where it has no target."""
    if not want.sums:
        return UnitGradients(weight, bias, None)
    return UnitGradients(weight, bias, sums, waiting if want.target is None else None)


def _room(tiles: int, unit: Unit, workspace: Workspace) -> TileSums:
    """For the sums of so many tiles."""
    return TileSums(workspace.vectors(tiles * 2 * unit.channels), tiles)


def _corrected(
    d: Tensor,
    x: Tensor,
    norm: vectors.Norm,
    memory_format: torch.memory_format,
    rows: slice,
    a: Tensor,
    b: Tensor,
) -> Tensor:
    """The gradient of samples of ``x``, in the place of that of the activated map if it fits."""
    d, x = rows_of(d, rows), rows_of(x, rows)
    in_place = d.is_contiguous(memory_format=memory_format)
    out = d if in_place else empty_map(d, d.shape[1], memory_format)
    launch_rectify_backward(d, x, norm, out, False, (a, b))
    return out


def is_product(tail: Tail) -> bool:
    """Whether a tail is a convolution of single positions and nothing else: a matrix product."""
    if tail.pool is not None or tail.conv is None:
        return False
    stride, padding, _, groups = tail.conv.geometry
    ones, zeros = set(stride) == {1}, set(padding) == {0}
    return ones and zeros and groups == 1 and set(tail.conv.weight.shape[2:]) == {1}
