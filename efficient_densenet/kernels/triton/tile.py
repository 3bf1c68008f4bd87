"""What the kernels share on the device: where a tile lies, its norm and rectifier, its sums.

A map is a :class:`~efficient_densenet.kernels.triton.launch.Matrix` here: a row ``m`` of ``M`` for
each position of each sample, a column for each channel. A tile has ``BLOCK_M`` rows; outside of the
map it reads zeros and writes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def known_multiple(value, OF: tl.constexpr):
    """The value, which is a multiple of this power of two: so written, the compiler sees it."""
    if OF > 1:
        value = value // OF * OF
    return value


@triton.jit
def own_tile(N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The row of tiles that a program has, its rows, and its columns."""
    across = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // across
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, m, (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def row_offsets(x, m, positions, FLAT: tl.constexpr, INDEX: tl.constexpr):
    """Where rows of a matrix begin; ``FLAT``: its samples follow each other like positions."""
    step = known_multiple(x.position, x.multiple)
    if FLAT:
        return m.to(INDEX) * step
    sample, position = m // positions, m % positions
    return sample.to(INDEX) * known_multiple(x.sample, x.multiple) + position.to(INDEX) * step


@triton.jit
def origin(x):
    """A pointer to the first value of a matrix."""
    return x.data + known_multiple(x.offset, x.multiple)


@triton.jit
def tile_of(x, rows, columns, INDEX: tl.constexpr):
    """Pointers to a tile of a matrix, by the offsets of its rows and the numbers of its columns."""
    return origin(x) + rows[:, None] + columns.to(INDEX)[None, :] * x.channel


@triton.jit
def load_tile(x, m, columns, inside, positions, FLAT: tl.constexpr, INDEX: tl.constexpr):
    """A tile of a matrix, zero where it is not ``inside``."""
    rows = row_offsets(x, m, positions, FLAT, INDEX)
    return tl.load(tile_of(x, rows, columns, INDEX), mask=inside, other=0.0)


@triton.jit
def store_tile(x, values, m, columns, inside, positions, FLAT: tl.constexpr, INDEX: tl.constexpr):
    """Writes a tile of a matrix, in its type."""
    rows = row_offsets(x, m, positions, FLAT, INDEX)
    tl.store(tile_of(x, rows, columns, INDEX), values.to(x.data.dtype.element_ty), mask=inside)


@triton.jit
def inverse_deviation(norm, columns, inside):
    """``(var + eps)^(-1/2)`` of columns."""
    return tl.rsqrt(tl.load(norm.var + columns, mask=inside, other=1.0) + norm.eps)


@triton.jit
def norm_vectors(norm, columns, inside):
    """Mean, ``scale = γ * (var + eps)^(-1/2)`` and β of a tile's columns."""
    mean = tl.load(norm.mean + columns, mask=inside, other=0.0)
    scale = inverse_deviation(norm, columns, inside)
    bias = tl.zeros_like(scale)
    if norm.weight is not None:
        scale *= tl.load(norm.weight + columns, mask=inside, other=0.0).to(tl.float32)
    if norm.bias is not None:
        bias = tl.load(norm.bias + columns, mask=inside, other=0.0).to(tl.float32)
    return mean, scale, bias


@triton.jit
def rectified(x, mean, scale, bias, DTYPE: tl.constexpr):
    """``relu((x - mean) * scale + bias)``, computed in float32 and rounded to ``DTYPE``.

    NaN stays NaN: by itself ``tl.maximum`` would return the zero.
    """
    y = (x.to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL).to(DTYPE)


@triton.jit
def as_factor(values, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Values as a product takes them: in its type, and to TF32 rounded.

    By themselves tensor cores drop the last 13 bits of float32. Half a unit is added to what stays,
    as cuDNN's convolutions round; NaN and infinities stay what they are.
    """
    values = values.to(DTYPE)
    if tl.float32 == DTYPE and PRECISION == "tf32":
        bits = (values.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        rounded = bits.to(tl.float32, bitcast=True)
        values = tl.where(values == values, rounded, values)
    return values


@triton.jit
def store_pair(pair, row, columns, width, inside, first, second):
    """Writes two vectors into row ``row`` of ``pair``, which is ``(tiles, 2, width)``."""
    place = pair + row * 2 * width + columns
    tl.store(place, first, mask=inside)
    tl.store(place + width, second, mask=inside)


@triton.jit
def store_moments(pair, row, values, m, M, columns, width, BLOCK_M: tl.constexpr):
    """A tile's mean per column, and the sum of the squared distances from it."""
    inside = (m < M)[:, None]
    mean = tl.sum(tl.where(inside, values, 0.0), 0) / tl.minimum(M - row * BLOCK_M, BLOCK_M)
    distance = tl.where(inside, values - mean[None, :], 0.0)
    squares = tl.sum(distance * distance, 0)
    store_pair(pair, row, columns, width, columns < width, mean, squares)


@triton.jit
def store_through_rectifier(
    d,
    x,
    target,
    norm,
    pair,
    terms,
    row,
    m,
    k,
    M,
    K,
    positions,
    DTYPE: tl.constexpr,
    TARGET: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Masks the gradient ``d`` of a rectified tile, and adds ``scale * d`` to the target.

    ``scale`` is the norm's. ``pair`` gets the sums ``Σ d`` and ``Σ d * (x - mean)`` of each column.
    With batch norm's two ``terms``, vectors ``a`` and ``b``, what the target gets is
    ``scale * d - a - (x - mean) * b``. There may be no sums, terms or target.
    """
    K = known_multiple(K, x.multiple)
    inside = (m < M)[:, None] & (k < K)[None, :]
    x_tile = load_tile(x, m, k, inside, positions, FLAT, INDEX).to(tl.float32)
    mean, scale, bias = norm_vectors(norm, k, k < K)
    stops = rectified(x_tile, mean, scale, bias, DTYPE) <= 0  # not so NaN: it passes, as in PyTorch
    d = tl.where(inside & ~stops, d, 0.0)
    distance = x_tile - mean[None, :]
    g = d * scale[None, :]
    if pair is not None:
        store_pair(pair, row, k, K, k < K, tl.sum(d, 0), tl.sum(d * distance, 0))
    if terms is not None:
        a = tl.load(terms[0] + k, mask=k < K, other=0.0)
        b = tl.load(terms[1] + k, mask=k < K, other=0.0)
        g -= a[None, :] + distance * b[None, :]
    if TARGET:
        if ACCUMULATE:
            g += load_tile(target, m, k, inside, positions, FLAT, INDEX)
        store_tile(target, g, m, k, inside, positions, FLAT, INDEX)
