"""The 1x1 convolution of a map that is normalised and rectified on the way in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.kernels.interface import Norm, Statistics, Tail
from efficient_densenet.kernels.layout import empty_map
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
    store_moments,
    tile_of,
)
from efficient_densenet.kernels.triton.vectors import launch_fold

# Rows, columns, depth, warps and stages to choose from; the first runs where none may be measured.
TILES = (
    Tile(64, 128, 32, 8, 3),
    Tile(128, 128, 32, 8, 3),
    Tile(64, 64, 32, 8, 3),
)


@triton.jit
def product(
    x,
    mean,
    scale,
    bias,
    weight,
    conv_bias,
    y,
    pair,
    values,
    positions,
    inner,
    outer,
    x_sample,
    x_channel,
    x_position,
    y_sample,
    y_channel,
    y_position,
    BIAS: tl.constexpr,
    STATISTICS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``y[m, j] = Σ_k relu((x[m, k] - mean[k]) * scale[k] + bias[k]) * weight[j, k]``.

    Plus ``conv_bias[j]`` if ``BIAS``. ``weight`` is dense ``(outer, inner)``. With ``STATISTICS``,
    ``pair`` gets those of ``y`` by ``store_moments``, a row for each row of tiles.
    """
    across = tl.cdiv(outer, COLUMNS)
    row = tl.program_id(0) // across
    rows = row * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    inside_rows, inside = rows < values, columns < outer
    x_rows = row_offsets(rows, positions, x_sample, x_position, FLAT, INDEX)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, inner, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside_k = k < inner
        x_tile = tl.load(
            x + tile_of(x_rows, k, x_channel, INDEX),
            mask=inside_rows[:, None] & inside_k[None, :],
            other=0.0,
        )
        m, s, b = norm_vectors(mean, scale, bias, k, inside_k)
        w = tl.load(
            weight + k[:, None] + columns[None, :] * inner,
            mask=inside_k[:, None] & inside[None, :],
            other=0.0,
        )
        total = tl.dot(rectified(x_tile, m, s, b, DTYPE), w, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(conv_bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    stored = total.to(y.dtype.element_ty)
    y_rows = row_offsets(rows, positions, y_sample, y_position, FLAT, INDEX)
    place = y + tile_of(y_rows, columns, y_channel, INDEX)
    tl.store(place, stored, mask=inside_rows[:, None] & inside[None, :])
    if STATISTICS:
        count = tl.minimum(values - row * ROWS, ROWS)
        tiles = tl.cdiv(values, ROWS)
        seen = stored.to(tl.float32)
        store_moments(pair, row, tiles, seen, inside_rows, count, columns, outer, inside)


def launch_product(
    x: Tensor,
    norm: Norm,
    tail: Tail,
    memory_format: torch.memory_format,
    need_statistics: bool,
) -> tuple[Tensor, Statistics | None]:
    """The product, and if needed its statistics."""
    weight, conv_bias = factors(tail)
    outer, inner = weight.shape
    y = empty_map(x, outer, memory_format, tail.dtype)
    source, place = matrix(x), matrix(y)
    values = source.values
    constants = product_constants(tail.dtype) | shared(source, place)

    def attempt(tile: Tile) -> Tensor:
        pair = pair_of(place, tile.rows) if need_statistics else y
        launch.run(
            product,
            (quotient(values, tile.rows) * quotient(outer, tile.columns),),
            source.map,
            norm.mean,
            norm.scale,
            norm.bias,
            weight,
            weight if conv_bias is None else conv_bias,
            place.map,
            pair,
            values,
            source.positions,
            inner,
            outer,
            *source.strides,
            *place.strides,
            BIAS=conv_bias is not None,
            STATISTICS=need_statistics,
            **constants,
            **tile.options,
        )
        return pair

    tile = launch.fastest(
        product_tiles(TILES, tail.dtype), source, ("product", outer, tail.dtype), attempt
    )
    pair = attempt(tile)
    if not need_statistics:
        return y, None
    statistics = Statistics(*(norm.mean.new_empty((outer, *norm.mean.shape[1:])) for _ in range(2)))
    launch_fold(pair, values, tile.rows, statistics)
    return y, statistics
