"""The gradients of ``product``: of its weight, and through norm and rectifier of its input."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.kernels.interface import Unit
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
    load_tile,
    norm_vectors,
    origin,
    rectified,
    row_offsets,
    store_through_rectifier,
    tile_of,
)
from efficient_densenet.kernels.triton.tiles import Tile, tiles_for
from efficient_densenet.kernels.triton.vectors import Norm, TileSums
from efficient_densenet.kernels.workspace import Workspace

# To choose from; the first runs where none may be measured.
WEIGHT_TILES = (
    Tile(m=64, n=128, k=64, warps=8, stages=3),
    Tile(m=64, n=64, k=64, warps=4, stages=3),
)
EXACT_WEIGHT = Tile(m=16, n=64, k=64, warps=8, stages=2)
INPUT_TILES = (
    Tile(m=64, n=64, k=64, warps=8, stages=2),
    Tile(m=128, n=64, k=32, warps=8, stages=2),
    Tile(m=128, n=64, k=64, warps=8, stages=2),
)
EXACT_INPUT = Tile(m=64, n=16, k=64, warps=8, stages=2)


@triton.jit
def weight_gradient(
    grad,
    x,
    norm,
    parts,
    M,
    N,
    K,
    share,
    positions,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``parts[p, n, k] = Σ_m grad[m, n] * relu((x[m, k] - mean[k]) * scale[k] + bias[k])``.

    Part ``p`` sums over ``share`` rows of the maps, a multiple of ``BLOCK_M``.
    """
    N, K = known_multiple(N, grad.multiple), known_multiple(K, x.multiple)
    part = tl.program_id(1)
    across = tl.cdiv(K, BLOCK_K)
    n = (tl.program_id(0) // across) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (tl.program_id(0) % across) * BLOCK_K + tl.arange(0, BLOCK_K)
    mean, scale, bias = norm_vectors(norm, k, k < K)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        grad_rows = row_offsets(grad, m, positions, FLAT, INDEX)
        columns = n.to(INDEX)[:, None] * grad.channel
        place = origin(grad) + grad_rows[None, :] + columns
        g = tl.load(place, mask=(n < N)[:, None] & (m < M)[None, :], other=0.0)
        g = as_factor(g, DTYPE, PRECISION)
        inside = (m < M)[:, None] & (k < K)[None, :]
        x_tile = load_tile(x, m, k, inside, positions, FLAT, INDEX)
        a = as_factor(rectified(x_tile, mean, scale, bias, DTYPE), DTYPE, PRECISION)
        total = tl.dot(g, a, total, input_precision=PRECISION)
    place = parts + part * N * K + n[:, None] * K + k[None, :]
    tl.store(place, total, mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def input_gradient(
    grad,
    weight,
    x,
    target,
    norm,
    pair,
    M,
    N,
    K,
    positions,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``d[m, k] = Σ_n grad[m, n] * weight[n, k]`` where ``x`` was rectified to more than zero.

    Then ``target += scale * d``, and the sums, as in ``store_through_rectifier``.
    """
    N, K = known_multiple(N, grad.multiple), known_multiple(K, x.multiple)
    across = tl.cdiv(K, BLOCK_K)
    row = tl.program_id(0) // across
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (tl.program_id(0) % across) * BLOCK_K + tl.arange(0, BLOCK_K)
    grad_rows = row_offsets(grad, m, positions, FLAT, INDEX)
    d = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (m < M)[:, None] & (n < N)[None, :]
        g = tl.load(tile_of(grad, grad_rows, n, INDEX), mask=inside, other=0.0)
        g = as_factor(g, DTYPE, PRECISION)
        inside = (n < N)[:, None] & (k < K)[None, :]
        w = tl.load(weight + n[:, None] * K + k[None, :], mask=inside, other=0.0)
        w = as_factor(w, DTYPE, PRECISION)
        d = tl.dot(g, w, d, input_precision=PRECISION)
    store_through_rectifier(
        d,
        x,
        target,
        norm,
        pair,
        None,
        row,
        m,
        k,
        M,
        K,
        positions,
        DTYPE,
        TARGET,
        ACCUMULATE,
        FLAT,
        INDEX,
        BLOCK_M,
    )


def launch_weight_gradient(grad: Tensor, x: Tensor, unit: Unit) -> Tensor:
    """The weight's gradient, in its shape and in the type of the norm."""
    norm, _, tail, reads, _ = unit
    source, arriving = matrix(x, slice(0, reads)), matrix(grad)
    leaves = arriving.channels
    constants = product_constants(tail.dtype) | shared(source, arriving)
    multiprocessors = launch.multiprocessors(x.device)
    ones = (1,) * (x.dim() - 2)

    def attempt(tile: Tile) -> Tensor:
        # The sum is divided among about eight warps per multiprocessor, half of what fits: with
        # more, each program would write as many sums for less that it reads, and of small maps
        # those would be most of its bytes.
        programs = multiprocessors * 8 // tile.warps
        tiles = quotient(leaves, tile.n) * quotient(reads, tile.k)
        steps = quotient(source.rows, tile.m)
        share = quotient(steps, min(steps, max(1, round(programs / tiles)))) * tile.m
        parts = norm.mean.new_empty((quotient(source.rows, share), leaves, reads, *ones))
        launch.run(
            weight_gradient,
            (tiles, len(parts)),
            arriving,
            source,
            norm,
            parts,
            source.rows,
            leaves,
            reads,
            share,
            source.positions,
            **constants,
            **tile.options,
        )
        return parts

    tiles = tiles_for(tail.dtype, WEIGHT_TILES, EXACT_WEIGHT)
    parts = attempt(tiling.fastest(tiles, source, ("weight", leaves, tail.dtype), attempt))
    return parts[0] if len(parts) == 1 else parts.sum(0)


def launch_input_gradient(
    grad: Tensor,
    x: Tensor,
    unit: Unit,
    workspace: Workspace,
    target: Tensor | None,
    accumulate: bool,
) -> TileSums:
    """Writes or adds the input's gradient, if there is a target; the sums by tile."""
    norm, _, tail, reads, _ = unit
    weight, _ = factors(tail)
    leaves = len(weight)
    source, arriving = matrix(x, slice(0, reads)), matrix(grad)
    place = source if target is None else matrix(target, slice(0, reads))
    constants = product_constants(tail.dtype) | shared(source, arriving, place)

    def attempt(tile: Tile, norm: Norm = norm) -> TileSums:
        tiles = quotient(source.rows, tile.m)
        pair = workspace.vectors(tiles * 2 * reads)
        launch.run(
            input_gradient,
            (tiles * quotient(reads, tile.k),),
            arriving,
            weight,
            source,
            place,
            norm,
            pair,
            source.rows,
            leaves,
            reads,
            source.positions,
            TARGET=target is not None,
            ACCUMULATE=accumulate,
            **constants,
            **tile.options,
        )
        return TileSums(pair, tiles)

    def rehearse(tile: Tile) -> None:
        attempt(tile, norm._replace(weight=torch.zeros_like(norm.mean)))  # adds zeros

    key = ("input", leaves, tail.dtype, target is None, accumulate)
    tiles = tiles_for(tail.dtype, INPUT_TILES, EXACT_INPUT)
    return attempt(tiling.fastest(tiles, source, key, rehearse))
