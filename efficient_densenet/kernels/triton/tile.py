"""What the kernels share on the device: where a tile lies, its norm and rectifier, its sums.

A map is a matrix here: a row for each position of each sample, a column for each channel. A tile
has ``rows`` and ``columns`` of it; outside of the map it reads zeros and writes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_offsets(
    rows, positions, sample_stride, position_stride, FLAT: tl.constexpr, INDEX: tl.constexpr
):
    """Where rows begin in memory; ``FLAT``: the samples follow each other like positions."""
    if FLAT:
        return rows.to(INDEX) * position_stride
    sample, position = rows // positions, rows % positions
    return sample.to(INDEX) * sample_stride + position.to(INDEX) * position_stride


@triton.jit
def tile_of(row_offset, columns, channel_stride, INDEX: tl.constexpr):
    """Offsets of a tile from those of its rows."""
    return row_offset[:, None] + columns.to(INDEX)[None, :] * channel_stride


@triton.jit
def norm_vectors(mean, scale, bias, columns, inside):
    """Mean, scale and bias of a tile's columns."""
    m = tl.load(mean + columns, mask=inside, other=0.0)
    s = tl.load(scale + columns, mask=inside, other=0.0)
    b = tl.load(bias + columns, mask=inside, other=0.0)
    return m, s, b


@triton.jit
def rectified(x, mean, scale, bias, DTYPE: tl.constexpr):
    """``relu((x - mean) * scale + bias)``, computed in float32 and rounded to ``DTYPE``.

    NaN stays NaN: by itself ``tl.maximum`` would return the zero.
    """
    y = (x.to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL).to(DTYPE)


@triton.jit
def store_pair(pair, row, count, columns, width, inside, first, second):
    """Writes two vectors into row ``row`` of ``pair``, which is ``(2, count, width)``."""
    place = pair + row * width + columns
    tl.store(place, first, mask=inside)
    tl.store(place + count * width, second, mask=inside)


@triton.jit
def store_moments(pair, row, count, values, inside_rows, rows, columns, width, inside):
    """A tile's mean per column, and the sum of the squared distances from it."""
    inside_tile = inside_rows[:, None]
    mean = tl.sum(tl.where(inside_tile, values, 0.0), 0) / rows
    distance = tl.where(inside_tile, values - mean[None, :], 0.0)
    store_pair(pair, row, count, columns, width, inside, mean, tl.sum(distance * distance, 0))


@triton.jit
def store_through_rectifier(
    d,
    x,
    target,
    norm_mean,
    norm_scale,
    norm_bias,
    gain,
    pair,
    row,
    count,
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
    DTYPE: tl.constexpr,
    SUMS: tl.constexpr,
    TARGET: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Masks the gradient ``d`` of a rectified tile; adds ``gain * d`` to the target; leaves sums.

    ``gain`` is the norm's scale. The sums are ``Σ d`` and ``Σ d * (x - mean)``.
    """
    inside_rows, inside = rows < values, columns < channels
    inside_tile = inside_rows[:, None] & inside[None, :]
    offsets = row_offsets(rows, positions, x_sample, x_position, FLAT, INDEX)
    x_tile = tl.load(
        x + tile_of(offsets, columns, x_channel, INDEX), mask=inside_tile, other=0.0
    ).to(tl.float32)
    mean, scale, bias = norm_vectors(norm_mean, norm_scale, norm_bias, columns, inside)
    stops = rectified(x_tile, mean, scale, bias, DTYPE) <= 0  # not so NaN: it passes, as in PyTorch
    d = tl.where(inside_tile & ~stops, d, 0.0)
    if SUMS:
        centered = d * (x_tile - mean[None, :])
        store_pair(pair, row, count, columns, channels, inside, tl.sum(d, 0), tl.sum(centered, 0))
    if TARGET:
        place = target + tile_of(
            row_offsets(rows, positions, target_sample, target_position, FLAT, INDEX),
            columns,
            target_channel,
            INDEX,
        )
        g = d * tl.load(gain + columns, mask=inside, other=0.0)[None, :]
        if ACCUMULATE:
            g += tl.load(place, mask=inside_tile, other=0.0)
        tl.store(place, g, mask=inside_tile)
