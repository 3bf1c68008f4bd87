"""What goes over a map once: copying with statistics, norm and rectifier and back, correcting."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.kernels.interface import Norm, Statistics
from efficient_densenet.kernels.triton import launch
from efficient_densenet.kernels.triton.launch import matrix, pair_of, plane, shared
from efficient_densenet.kernels.triton.tile import (
    norm_vectors,
    rectified,
    row_offsets,
    store_moments,
    store_through_rectifier,
    tile_of,
)
from efficient_densenet.kernels.triton.vectors import launch_fold


@triton.jit
def _place(channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The row of tiles that a program has, its rows, and its columns."""
    across = tl.cdiv(channels, COLUMNS)
    row = tl.program_id(0) // across
    rows = row * ROWS + tl.arange(0, ROWS)
    return row, rows, (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def append(
    y,
    into,
    pair,
    values,
    positions,
    channels,
    y_sample,
    y_channel,
    y_position,
    into_sample,
    into_channel,
    into_position,
    COPY: tl.constexpr,
    STATISTICS: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``into = y`` if ``COPY``; the statistics of the values as ``into`` holds them."""
    row, rows, columns = _place(channels, ROWS, COLUMNS)
    inside_rows, inside = rows < values, columns < channels
    mask = inside_rows[:, None] & inside[None, :]
    offsets = row_offsets(rows, positions, y_sample, y_position, FLAT, INDEX)
    tile = tl.load(y + tile_of(offsets, columns, y_channel, INDEX), mask=mask, other=0.0)
    if COPY:
        tile = tile.to(into.dtype.element_ty)
        offsets = row_offsets(rows, positions, into_sample, into_position, FLAT, INDEX)
        tl.store(into + tile_of(offsets, columns, into_channel, INDEX), tile, mask=mask)
    if STATISTICS:
        count, tiles = tl.minimum(values - row * ROWS, ROWS), tl.cdiv(values, ROWS)
        seen = tile.to(tl.float32)
        store_moments(pair, row, tiles, seen, inside_rows, count, columns, channels, inside)


@triton.jit
def rectify(
    x,
    out,
    mean,
    scale,
    bias,
    values,
    positions,
    channels,
    x_sample,
    x_channel,
    x_position,
    out_sample,
    out_channel,
    out_position,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``out = relu((x - mean) * scale + bias)``."""
    _, rows, columns = _place(channels, ROWS, COLUMNS)
    inside = columns < channels
    mask = (rows < values)[:, None] & inside[None, :]
    offsets = row_offsets(rows, positions, x_sample, x_position, FLAT, INDEX)
    tile = tl.load(x + tile_of(offsets, columns, x_channel, INDEX), mask=mask, other=0.0)
    m, s, b = norm_vectors(mean, scale, bias, columns, inside)
    tile = rectified(tile, m, s, b, out.dtype.element_ty)
    offsets = row_offsets(rows, positions, out_sample, out_position, FLAT, INDEX)
    tl.store(out + tile_of(offsets, columns, out_channel, INDEX), tile, mask=mask)


@triton.jit
def rectify_backward(
    d,
    x,
    target,
    mean,
    scale,
    bias,
    pair,
    values,
    positions,
    channels,
    d_sample,
    d_channel,
    d_position,
    x_sample,
    x_channel,
    x_position,
    target_sample,
    target_channel,
    target_position,
    SUMS: tl.constexpr,
    TARGET: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``target += scale * d`` where ``x`` was rectified to more than zero.

    ``d`` is the gradient of the rectified map. Leaves sums as ``store_through_rectifier`` does.
    """
    row, rows, columns = _place(channels, ROWS, COLUMNS)
    mask = (rows < values)[:, None] & (columns < channels)[None, :]
    offsets = row_offsets(rows, positions, d_sample, d_position, FLAT, INDEX)
    tile = tl.load(d + tile_of(offsets, columns, d_channel, INDEX), mask=mask, other=0.0)
    store_through_rectifier(
        tile.to(tl.float32),
        x,
        target,
        mean,
        scale,
        bias,
        scale,
        pair,
        row,
        tl.cdiv(values, ROWS),
        rows,
        columns,
        values,
        channels,
        positions,
        x_sample,
        x_channel,
        x_position,
        target_sample,
        target_channel,
        target_position,
        d.dtype.element_ty,
        SUMS,
        TARGET,
        ACCUMULATE,
        FLAT,
        INDEX,
    )


@triton.jit
def correct(
    grad,
    x,
    out,
    mean,
    a,
    b,
    values,
    positions,
    channels,
    grad_sample,
    grad_channel,
    grad_position,
    x_sample,
    x_channel,
    x_position,
    out_sample,
    out_channel,
    out_position,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``out = grad - a - (x - mean) * b``."""
    _, rows, columns = _place(channels, ROWS, COLUMNS)
    inside = columns < channels
    mask = (rows < values)[:, None] & inside[None, :]
    offsets = row_offsets(rows, positions, grad_sample, grad_position, FLAT, INDEX)
    g = tl.load(grad + tile_of(offsets, columns, grad_channel, INDEX), mask=mask, other=0.0)
    offsets = row_offsets(rows, positions, x_sample, x_position, FLAT, INDEX)
    tile = tl.load(x + tile_of(offsets, columns, x_channel, INDEX), mask=mask, other=0.0)
    m, first, second = norm_vectors(mean, a, b, columns, inside)
    g = g.to(tl.float32) - first[None, :]
    g -= (tile.to(tl.float32) - m[None, :]) * second[None, :]
    offsets = row_offsets(rows, positions, out_sample, out_position, FLAT, INDEX)
    place = out + tile_of(offsets, columns, out_channel, INDEX)
    tl.store(place, g.to(out.dtype.element_ty), mask=mask)


def launch_append(y: Tensor, into: Tensor | None, statistics: Statistics | None) -> None:
    """The operation ``append``."""
    source = matrix(y)
    place = source if into is None else matrix(into)
    grid, tile = plane(source)
    pair = pair_of(source, tile["ROWS"]) if statistics else y
    launch.run(
        append,
        grid,
        source.map,
        place.map,
        pair,
        source.values,
        source.positions,
        source.channels,
        *source.strides,
        *place.strides,
        COPY=into is not None,
        STATISTICS=statistics is not None,
        **shared(source, place),
        **tile,
    )
    if statistics is not None:
        launch_fold(pair, source.values, tile["ROWS"], statistics)


def launch_rectify(norm: Norm, x: Tensor, out: Tensor) -> Tensor:
    """The norm and the rectifier of a map, into ``out``."""
    source, place = matrix(x), matrix(out)
    grid, tile = plane(source)
    launch.run(
        rectify,
        grid,
        source.map,
        place.map,
        norm.mean,
        norm.scale,
        norm.bias,
        source.values,
        source.positions,
        source.channels,
        *source.strides,
        *place.strides,
        **shared(source, place),
        **tile,
    )
    return out


def launch_rectify_backward(
    d: Tensor, x: Tensor, norm: Norm, target: Tensor | None, accumulate: bool
) -> Tensor:
    """Writes or adds the gradient through them, if there is a target; the sums by tile."""
    arriving, source = matrix(d), matrix(x)
    place = source if target is None else matrix(target)
    grid, tile = plane(source)
    pair = pair_of(source, tile["ROWS"])
    launch.run(
        rectify_backward,
        grid,
        arriving.map,
        source.map,
        place.map,
        norm.mean,
        norm.scale,
        norm.bias,
        pair,
        source.values,
        source.positions,
        source.channels,
        *arriving.strides,
        *source.strides,
        *place.strides,
        SUMS=True,
        TARGET=target is not None,
        ACCUMULATE=accumulate,
        **shared(arriving, source, place),
        **tile,
    )
    return pair


def launch_correct(
    grad: Tensor, x: Tensor, mean: Tensor, a: Tensor, b: Tensor, out: Tensor
) -> Tensor:
    """The operation ``correct``."""
    g, m, place = matrix(grad), matrix(x), matrix(out)
    grid, tile = plane(m)
    launch.run(
        correct,
        grid,
        g.map,
        m.map,
        place.map,
        mean,
        a,
        b,
        m.values,
        m.positions,
        m.channels,
        *g.strides,
        *m.strides,
        *place.strides,
        **shared(g, m, place),
        **tile,
    )
    return out
