"""The 1x1 convolution of a map that is normalised and rectified on the way in."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.kernels.interface import Statistics, Unit
from efficient_densenet.kernels.layout import empty_map
from efficient_densenet.kernels.triton import launch
from efficient_densenet.kernels.triton import tiles as tiling
from efficient_densenet.kernels.triton.launch import (
    factors,
    matrix,
    product_constants,
    quotient,
    shared,
)
from efficient_densenet.kernels.triton.tile import (
    as_factor,
    known_multiple,
    norm_vectors,
    rectified,
    row_offsets,
    store_moments,
    store_tile,
    tile_of,
)
from efficient_densenet.kernels.triton.tiles import Tile, tiles_for
from efficient_densenet.kernels.triton.vectors import launch_fold
from efficient_densenet.kernels.workspace import Workspace

# To choose from; the first runs where none may be measured.
TILES = (
    Tile(m=64, n=128, k=32, warps=8, stages=3),
    Tile(m=128, n=128, k=32, warps=8, stages=3),
    Tile(m=64, n=64, k=32, warps=8, stages=3),
)
EXACT = Tile(m=64, n=64, k=16, warps=8, stages=3)


@triton.jit
def product(
    x,
    norm,
    weight,
    conv_bias,
    y,
    pair,
    activated,
    reader,
    M,
    N,
    K,
    positions,
    BIAS: tl.constexpr,
    STATISTICS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``y[m, n] = Σ_k relu((x[m, k] - mean[k]) * scale[k] + bias[k]) * weight[n, k]``.

    Plus ``conv_bias[n]`` if ``BIAS``. ``weight`` is dense ``(N, K)``. With ``STATISTICS``, ``pair``
    gets those of ``y`` by ``store_moments``, a row for each row of tiles. With the norm of a
    ``reader``, ``activated`` gets ``y`` normalised and rectified by it.
    """
    N, K = known_multiple(N, y.multiple), known_multiple(K, x.multiple)
    across = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // across
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = row_offsets(x, m, positions, FLAT, INDEX)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (m < M)[:, None] & (k < K)[None, :]
        x_tile = tl.load(tile_of(x, x_rows, k, INDEX), mask=inside, other=0.0)
        mean, scale, bias = norm_vectors(norm, k, k < K)
        inside = (k < K)[:, None] & (n < N)[None, :]
        w = tl.load(weight + k[:, None] + n[None, :] * K, mask=inside, other=0.0)
        w = as_factor(w, DTYPE, PRECISION)
        a = as_factor(rectified(x_tile, mean, scale, bias, DTYPE), DTYPE, PRECISION)
        total = tl.dot(a, w, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(conv_bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    stored = total.to(y.data.dtype.element_ty)
    inside = (m < M)[:, None] & (n < N)[None, :]
    store_tile(y, stored, m, n, inside, positions, FLAT, INDEX)
    if reader is not None:
        mean, scale, bias = norm_vectors(reader, n, n < N)
        a = rectified(stored, mean, scale, bias, activated.data.dtype.element_ty)
        store_tile(activated, a, m, n, inside, positions, FLAT, INDEX)
    if STATISTICS:
        store_moments(pair, row, stored.to(tl.float32), m, M, n, N, BLOCK_M)


def launch_product(
    x: Tensor,
    unit: Unit,
    workspace: Workspace,
    need_statistics: bool,
    reader: Unit | None = None,
) -> tuple[Tensor, Statistics | None]:
    """The product, and its statistics if needed; leaves it activated for a ``reader`` of slabs."""
    norm, _, tail, reads, _ = unit
    weight, conv_bias = factors(tail)
    leaves = len(weight)
    y = empty_map(x, leaves, workspace.memory_format, tail.dtype)
    activated = then = None
    if reader is not None and workspace.holds(y, reader.tail.dtype):
        activated, then = workspace.scratch(y, reader.tail.dtype), reader.norm
        workspace.leave(activated, y, then)
    source, place = matrix(x, slice(0, reads)), matrix(y)
    beside = place if activated is None else matrix(activated)
    constants = product_constants(tail.dtype) | shared(source, place, beside)

    def attempt(tile: Tile) -> Tensor:
        pair = y
        if need_statistics:
            pair = workspace.vectors(quotient(source.rows, tile.m) * 2 * leaves)
        launch.run(
            product,
            (quotient(source.rows, tile.m) * quotient(leaves, tile.n),),
            source,
            norm,
            weight,
            weight if conv_bias is None else conv_bias,
            place,
            pair,
            beside,
            then,
            source.rows,
            leaves,
            reads,
            source.positions,
            BIAS=conv_bias is not None,
            STATISTICS=need_statistics,
            **constants,
            **tile.options,
        )
        return pair

    key = ("product", leaves, tail.dtype)  # the same tile makes the same bits again
    tile = tiling.fastest(tiles_for(tail.dtype, TILES, EXACT), source, key, attempt)
    pair = attempt(tile)
    if not need_statistics:
        return y, None
    statistics = Statistics(*(norm.mean.new_empty(leaves) for _ in range(2)))
    launch_fold(pair, 0, place, tile.m, statistics)
    return y, statistics
