"""Norm, rectifier and a pooling of windows, forward and back: the rectified map never exists."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.kernels.aten import of_rows
from efficient_densenet.kernels.interface import Tail, Unit
from efficient_densenet.kernels.triton import launch
from efficient_densenet.kernels.triton.launch import elementwise, matrix, shared
from efficient_densenet.kernels.triton.tile import (
    known_multiple,
    load_tile,
    norm_vectors,
    own_tile,
    rectified,
    store_through_rectifier,
    store_tile,
)
from efficient_densenet.kernels.triton.vectors import Terms, TileSums
from efficient_densenet.kernels.workspace import Workspace

# Places in a window are kept in eight bits.
LARGEST_WINDOW = 127


@triton.jit
def pool(
    x,
    norm,
    out,
    choice,
    M,
    N,
    height,
    width,
    out_height,
    out_width,
    MAXIMUM: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    DOWN: tl.constexpr,
    ALONG: tl.constexpr,
    ABOVE: tl.constexpr,
    BEFORE: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``out`` is the mean or maximum of windows of ``relu((x - mean) * scale + bias)``.

    Windows are ``HIGH`` by ``WIDE``, the next one ``DOWN`` or ``ALONG``, the first one ``ABOVE``
    and ``BEFORE`` the map. Of a maximum ``choice`` is the place in the window: the first of equals,
    the last NaN, as in PyTorch.
    """
    N = known_multiple(N, x.multiple)
    _, m, n = own_tile(N, BLOCK_M, BLOCK_N)
    window, sample = m % (out_height * out_width), m // (out_height * out_width)
    top, left = window // out_width * DOWN - ABOVE, window % out_width * ALONG - BEFORE
    mean, scale, bias = norm_vectors(norm, n, n < N)
    found = tl.full((BLOCK_M, BLOCK_N), float("-inf") if MAXIMUM else 0.0, tl.float32)
    chosen = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for i in tl.static_range(HIGH):
        for j in tl.static_range(WIDE):
            row, column = top + i, left + j
            here = (m < M) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            inside = here[:, None] & (n < N)[None, :]
            position = (sample * height + row) * width + column
            tile = load_tile(x, position, n, inside, height * width, FLAT, INDEX)
            tile = rectified(tile, mean, scale, bias, out.data.dtype.element_ty).to(tl.float32)
            if MAXIMUM:
                better = inside & ((tile > found) | (tile != tile))
                found = tl.where(better, tile, found)
                chosen = tl.where(better, i * WIDE + j, chosen)
            else:
                found += tl.where(inside, tile, 0.0)
    if not MAXIMUM:
        found /= HIGH * WIDE
    inside = (m < M)[:, None] & (n < N)[None, :]
    store_tile(out, found, m, n, inside, out_height * out_width, FLAT, INDEX)
    if MAXIMUM:
        store_tile(choice, chosen, m, n, inside, out_height * out_width, FLAT, INDEX)


@triton.jit
def pool_backward(
    grad,
    choice,
    x,
    target,
    norm,
    pair,
    terms,
    M,
    N,
    height,
    width,
    out_height,
    out_width,
    MAXIMUM: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    DOWN: tl.constexpr,
    ALONG: tl.constexpr,
    ABOVE: tl.constexpr,
    BEFORE: tl.constexpr,
    TARGET: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``target += scale * d`` where ``x`` was rectified to more than zero; sums, or batch terms.

    ``d`` is what the windows that hold a position give it of ``grad``, the gradient of their means
    or maxima. What becomes of sums and terms is in ``store_through_rectifier``.
    """
    N = known_multiple(N, x.multiple)
    tile, m, n = own_tile(N, BLOCK_M, BLOCK_N)
    position, sample = m % (height * width), m // (height * width)
    top, left = position // width + ABOVE, position % width + BEFORE
    d = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for a in tl.static_range((HIGH + DOWN - 1) // DOWN):
        for b in tl.static_range((WIDE + ALONG - 1) // ALONG):
            row, column = top // DOWN - a, left // ALONG - b
            i, j = top - row * DOWN, left - column * ALONG
            here = (row >= 0) & (row < out_height) & (column >= 0) & (column < out_width)
            inside = ((m < M) & here & (i < HIGH) & (j < WIDE))[:, None] & (n < N)[None, :]
            window = (sample * out_height + row) * out_width + column
            part = load_tile(grad, window, n, inside, out_height * out_width, FLAT, INDEX)
            if MAXIMUM:
                chosen = load_tile(choice, window, n, inside, out_height * out_width, FLAT, INDEX)
                part = tl.where(chosen == (i * WIDE + j)[:, None], part, 0.0)
            d += part.to(tl.float32)
    if not MAXIMUM:
        d /= HIGH * WIDE
    store_through_rectifier(
        d,
        x,
        target,
        norm,
        pair,
        terms,
        tile,
        m,
        n,
        M,
        N,
        height * width,
        grad.data.dtype.element_ty,
        TARGET,
        ACCUMULATE,
        FLAT,
        INDEX,
        BLOCK_M,
    )


def pools_windows(x: Tensor, tail: Tail) -> bool:
    """Whether these kernels know the pooling of a tail: of windows, the mean of full ones alone."""
    pooling = tail.pool
    if pooling is None or pooling.kind == "all" or x.dim() > 4 or pooling.ceil_mode:
        return False
    if pooling.kind == "average" and (any(pooling.padding) or pooling.divisor is not None):
        return False
    return set(pooling.dilation) <= {1} and math.prod(pooling.kernel) <= LARGEST_WINDOW


class _Windows(NamedTuple):
    """Rows and columns of a map and of its pooled one, and what kernels must know at their build.

    A map with one spatial dimension has one row.
    """

    size: tuple[int, int]
    pooled: tuple[int, int]
    constants: dict[str, int]

    @classmethod
    def of(cls, x: Tensor, tail: Tail) -> _Windows:
        pooling = tail.pool
        assert pooling is not None
        pooling = of_rows(pooling) if x.dim() == 3 else pooling
        size = (x.shape[2] if x.dim() == 4 else 1, x.shape[-1])
        pooled = [
            (n + 2 * padding - kernel) // stride + 1
            for n, kernel, stride, padding in zip(
                size, pooling.kernel, pooling.stride, pooling.padding, strict=True
            )
        ]
        names = ("HIGH", "WIDE", "DOWN", "ALONG", "ABOVE", "BEFORE")
        values = (*pooling.kernel, *pooling.stride, *pooling.padding)
        constants = dict(zip(names, values, strict=True))
        constants["MAXIMUM"] = pooling.kind == "maximum"
        return cls(size, (pooled[0], pooled[1]), constants)


def launch_pool(x: Tensor, unit: Unit, workspace: Workspace) -> tuple[Tensor, Tensor | None]:
    """The pooled map, and where in its window each maximum lay: for means, nothing."""
    windows = _Windows.of(x, unit.tail)
    shape = (len(x), unit.channels, *windows.pooled[4 - x.dim() :])
    y = torch.empty(
        shape, dtype=unit.tail.dtype, device=x.device, memory_format=workspace.memory_format
    )
    choice = torch.empty_like(y, dtype=torch.int8) if windows.constants["MAXIMUM"] else None
    source, out = matrix(x, slice(0, unit.channels)), matrix(y)
    chosen = out if choice is None else matrix(choice)
    grid, tile = elementwise(out)
    launch.run(
        pool,
        grid,
        source,
        unit.norm,
        out,
        chosen,
        out.rows,
        out.channels,
        *windows.size,
        *windows.pooled,
        **windows.constants,
        **shared(source, out, chosen),
        **tile,
    )
    return y, choice


def launch_pool_backward(
    grad: Tensor,
    choice: Tensor | None,
    x: Tensor,
    unit: Unit,
    target: Tensor | None,
    accumulate: bool,
    sums: TileSums | Terms,
) -> None:
    """Writes or adds the gradient of what was pooled, if there is a target; the sums by tile.

    Given the batch terms instead of a place for sums, it is the whole gradient.
    """
    windows, channels = _Windows.of(x, unit.tail), slice(0, unit.channels)
    arriving, source = matrix(grad), matrix(x, channels)
    chosen = arriving if choice is None else matrix(choice)
    into = source if target is None else matrix(target, channels)
    grid, tile = elementwise(source)
    pair, terms = (sums.pair, None) if isinstance(sums, TileSums) else (None, sums)
    launch.run(
        pool_backward,
        grid,
        arriving,
        chosen,
        source,
        into,
        unit.norm,
        pair,
        terms,
        source.rows,
        source.channels,
        *windows.size,
        *windows.pooled,
        TARGET=target is not None,
        ACCUMULATE=accumulate,
        **windows.constants,
        **shared(arriving, chosen, source, into),
        **tile,
    )
