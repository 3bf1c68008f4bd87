"""The gradients of ``product``: of its weight, and through norm and rectifier of its input."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.kernels.interface import Norm, Tail
from efficient_densenet.kernels.triton import launch
from efficient_densenet.kernels.triton.launch import (
    Tile,
    factors,
    matrix,
    pair_of,
    product_constants,
    product_tiles,
    quotient,
    shared,
)
from efficient_densenet.kernels.triton.tile import (
    norm_vectors,
    rectified,
    row_offsets,
    store_through_rectifier,
    tile_of,
)

# Rows, columns, depth, warps and stages to choose from; the first runs where none may be measured.
WEIGHT_TILES = (
    Tile(128, 64, 64, 8, 3),
    Tile(64, 64, 64, 4, 3),
)
INPUT_TILES = (
    Tile(64, 64, 64, 8, 2),
    Tile(128, 32, 64, 8, 2),
    Tile(128, 64, 64, 8, 2),
)
# Programs of a weight's gradient that a multiprocessor runs at a time: each takes up to 120
# registers in 256 threads, and 73 KiB.
RESIDENT = 2


@triton.jit
def weight_gradient(
    grad,
    x,
    mean,
    scale,
    bias,
    parts,
    values,
    positions,
    inner,
    outer,
    share,
    grad_sample,
    grad_channel,
    grad_position,
    x_sample,
    x_channel,
    x_position,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``parts[p, j, k] = Σ_m grad[m, j] * relu((x[m, k] - mean[k]) * scale[k] + bias[k])``.

    Part ``p`` sums over ``share`` rows of the maps, a multiple of ``DEPTH``.
    """
    part = tl.program_id(1)
    across = tl.cdiv(inner, COLUMNS)
    j = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    k = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    inside_j, inside_k = j < outer, k < inner
    m, s, b = norm_vectors(mean, scale, bias, k, inside_k)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, values), DEPTH):
        rows = start + tl.arange(0, DEPTH)
        inside_rows = rows < values
        grad_rows = row_offsets(rows, positions, grad_sample, grad_position, FLAT, INDEX)
        g = tl.load(
            grad + grad_rows[None, :] + j.to(INDEX)[:, None] * grad_channel,
            mask=inside_j[:, None] & inside_rows[None, :],
            other=0.0,
        ).to(DTYPE)
        x_rows = row_offsets(rows, positions, x_sample, x_position, FLAT, INDEX)
        x_tile = tl.load(
            x + tile_of(x_rows, k, x_channel, INDEX),
            mask=inside_rows[:, None] & inside_k[None, :],
            other=0.0,
        )
        total = tl.dot(g, rectified(x_tile, m, s, b, DTYPE), total, input_precision=PRECISION)
    place = parts + part * outer * inner + j[:, None] * inner + k[None, :]
    tl.store(place, total, mask=inside_j[:, None] & inside_k[None, :])


@triton.jit
def input_gradient(
    grad,
    weight,
    x,
    target,
    mean,
    scale,
    bias,
    gain,
    pair,
    values,
    positions,
    inner,
    outer,
    grad_sample,
    grad_channel,
    grad_position,
    x_sample,
    x_channel,
    x_position,
    target_sample,
    target_channel,
    target_position,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
    TARGET: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``d[m, k] = Σ_j grad[m, j] * weight[j, k]`` where ``x`` was rectified to more than zero.

    Then ``target += gain * d``, and the sums, as in ``store_through_rectifier``.
    """
    across = tl.cdiv(inner, COLUMNS)
    row = tl.program_id(0) // across
    rows = row * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    inside_rows, inside = rows < values, columns < inner
    grad_rows = row_offsets(rows, positions, grad_sample, grad_position, FLAT, INDEX)
    d = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, outer, DEPTH):
        j = start + tl.arange(0, DEPTH)
        inside_j = j < outer
        g = tl.load(
            grad + tile_of(grad_rows, j, grad_channel, INDEX),
            mask=inside_rows[:, None] & inside_j[None, :],
            other=0.0,
        ).to(DTYPE)
        w = tl.load(
            weight + j[:, None] * inner + columns[None, :],
            mask=inside_j[:, None] & inside[None, :],
            other=0.0,
        )
        d = tl.dot(g, w, d, input_precision=PRECISION)
    store_through_rectifier(
        d,
        x,
        target,
        mean,
        scale,
        bias,
        gain,
        pair,
        row,
        tl.cdiv(values, ROWS),
        rows,
        columns,
        values,
        inner,
        positions,
        x_sample,
        x_channel,
        x_position,
        target_sample,
        target_channel,
        target_position,
        DTYPE,
        SUMS,
        TARGET,
        ACCUMULATE,
        FLAT,
        INDEX,
    )


def launch_weight_gradient(grad: Tensor, x: Tensor, norm: Norm, tail: Tail) -> Tensor:
    """The weight's gradient, in its shape and in the type of the norm."""
    source, arriving = matrix(x), matrix(grad)
    inner, outer, values = x.shape[1], grad.shape[1], source.values
    constants = product_constants(tail.dtype) | shared(source, arriving)
    together = RESIDENT * launch.multiprocessors(x.device)

    def attempt(tile: Tile) -> Tensor:
        # The sum is divided among as many programs as run at a time: one more would run alone.
        tiles = quotient(outer, tile.rows) * quotient(inner, tile.columns)
        steps = quotient(values, tile.depth)
        share = quotient(steps, min(steps, max(1, together // tiles))) * tile.depth
        parts = norm.mean.new_empty((quotient(values, share), outer, inner))
        launch.run(
            weight_gradient,
            (tiles, len(parts)),
            arriving.map,
            source.map,
            norm.mean,
            norm.scale,
            norm.bias,
            parts,
            values,
            source.positions,
            inner,
            outer,
            share,
            *arriving.strides,
            *source.strides,
            **constants,
            **tile.options,
        )
        return parts

    parts = attempt(
        launch.fastest(
            product_tiles(WEIGHT_TILES, tail.dtype), source, ("weight", outer, tail.dtype), attempt
        )
    )
    total = parts[0] if len(parts) == 1 else parts.sum(0)
    return total.view(outer, inner, *norm.mean.shape[1:])


def launch_input_gradient(
    grad: Tensor, x: Tensor, norm: Norm, tail: Tail, target: Tensor | None, accumulate: bool
) -> Tensor:
    """Writes or adds the input's gradient, if there is a target; the sums by tile."""
    weight, _ = factors(tail)
    outer, inner = weight.shape
    source, arriving = matrix(x), matrix(grad)
    place = source if target is None else matrix(target)
    values = source.values
    constants = product_constants(tail.dtype) | shared(source, arriving, place)

    def attempt(tile: Tile, gain: Tensor) -> Tensor:
        pair = pair_of(source, tile.rows)
        launch.run(
            input_gradient,
            (quotient(values, tile.rows) * quotient(inner, tile.columns),),
            arriving.map,
            weight,
            source.map,
            place.map,
            norm.mean,
            norm.scale,
            norm.bias,
            gain,
            pair,
            values,
            source.positions,
            inner,
            outer,
            *arriving.strides,
            *source.strides,
            *place.strides,
            SUMS=True,
            TARGET=target is not None,
            ACCUMULATE=accumulate,
            **constants,
            **tile.options,
        )
        return pair

    def rehearse(tile: Tile) -> None:
        attempt(tile, torch.zeros_like(norm.scale))  # adds zeros to the target

    key = ("input", outer, tail.dtype, target is None, accumulate)
    return attempt(
        launch.fastest(product_tiles(INPUT_TILES, tail.dtype), source, key, rehearse), norm.scale
    )
