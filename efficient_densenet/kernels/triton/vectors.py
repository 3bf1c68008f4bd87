"""Vectors of one value per channel: a norm as kernels take it, and sums of tiles folded."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.kernels.interface import Statistics, Unit
from efficient_densenet.kernels.triton import launch
from efficient_densenet.kernels.triton.launch import Matrix, constant, quotient
from efficient_densenet.kernels.triton.tile import inverse_deviation, norm_vectors

# Tiles and channels that a program folds at once: few channels, so that there are many programs.
FOLD = {"BLOCK_M": 256, "BLOCK_N": 8}


@triton.jit
def fold_moments(
    pair,
    statistics,
    first,
    M,
    N,
    tiles,
    height,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Mean and biased variance from those of tiles of ``height`` rows, by Chan's formula.

    Into the statistics from channel ``first`` on.

    ``mean = Σ n_t m_t / n``, ``var = Σ (q_t + n_t (m_t - mean)²) / n`` with the tiles' means
    ``m_t`` and sums of squared distances ``q_t``: ``pair`` is ``(tiles, 2, N)``.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, tiles, BLOCK_M):
        t = start + tl.arange(0, BLOCK_M)
        count = tl.minimum(M - t * height, height).to(tl.float32)
        inside = (t < tiles)[:, None] & (n < N)[None, :]
        means = tl.load(pair + t[:, None] * 2 * N + n[None, :], mask=inside, other=0.0)
        sums += count[:, None] * means
    center = tl.sum(sums, 0) / M
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, tiles, BLOCK_M):
        t = start + tl.arange(0, BLOCK_M)
        count = tl.minimum(M - t * height, height).to(tl.float32)
        inside = (t < tiles)[:, None] & (n < N)[None, :]
        place = pair + t[:, None] * 2 * N + n[None, :]
        distance = tl.load(place, mask=inside, other=0.0) - center[None, :]
        squares = tl.load(place + N, mask=inside, other=0.0)
        sums += tl.where(inside, squares + count[:, None] * distance * distance, 0.0)
    tl.store(statistics.mean + first + n, center, mask=n < N)
    tl.store(statistics.var + first + n, tl.sum(sums, 0) / M, mask=n < N)


@triton.jit
def collect(
    pair,
    norm,
    beta_gradient,
    gamma_gradient,
    totals,
    N,
    tiles,
    share,
    TOTALS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``dβ = Σ d`` and ``dγ = invstd * Σ d * (x - mean)``, from the sums of all tiles.

    ``pair`` is ``(tiles, 2, N)``. Writes ``share * scale * dβ`` and ``share * scale * invstd * dγ``
    into the totals, or adds them.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum_d = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    sum_dx = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, tiles, BLOCK_M):
        t = start + tl.arange(0, BLOCK_M)
        inside = (t < tiles)[:, None] & (n < N)[None, :]
        place = pair + t[:, None] * 2 * N + n[None, :]
        sum_d += tl.load(place, mask=inside, other=0.0)
        sum_dx += tl.load(place + N, mask=inside, other=0.0)
    r = inverse_deviation(norm, n, n < N)
    dbeta = tl.sum(sum_d, 0)
    dgamma = r * tl.sum(sum_dx, 0)
    tl.store(beta_gradient + n, dbeta, mask=n < N)
    tl.store(gamma_gradient + n, dgamma, mask=n < N)
    if TOTALS:
        _, scale, _ = norm_vectors(norm, n, n < N)
        a, b = share * scale * dbeta, share * scale * r * dgamma
        if ACCUMULATE:
            a += tl.load(totals[0] + n, mask=n < N, other=0.0)
            b += tl.load(totals[1] + n, mask=n < N, other=0.0)
        tl.store(totals[0] + n, a, mask=n < N)
        tl.store(totals[1] + n, b, mask=n < N)


class Norm(NamedTuple):
    """A batch norm as its readers take it: they make its scale themselves.

    ``mean`` and ``var`` may be of more channels than the norm; γ and β are absent or not; ``eps``
    is a constant of the build. Were it an argument, Triton would not normalise where the tensor
    cores of sm_80 read.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: tl.constexpr


Terms = tuple[Tensor, Tensor]
"""Batch norm's two batch terms of a map, vectors ``a`` and ``b`` of the operation ``correct``."""


class TileSums(NamedTuple):
    """``Σ d`` and ``Σ d * (x - mean)`` of ``tiles`` tiles, in the first of ``pair``."""

    pair: Tensor
    tiles: int


def make_norm(
    statistics: Statistics,
    channels: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Norm:
    """The operation ``make_norm``: nothing is launched."""
    return Norm(*statistics, weight, bias, constant(eps))


def launch_fold(pair: Tensor, first: int, source: Matrix, height: int, into: Statistics) -> None:
    """Statistics of a map from those of tiles of ``height`` rows, from channel ``first`` on."""
    tiles = quotient(source.rows, height)
    grid = (quotient(source.channels, FOLD["BLOCK_N"]),)
    sizes = (source.rows, source.channels, tiles, height)
    launch.run(fold_moments, grid, pair, into, first, *sizes, **FOLD)


def launch_collect(
    sums: TileSums,
    unit: Unit,
    share: float,
    totals: tuple[Tensor, Tensor] | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    """The operation ``collect``."""
    norm, channels = unit.norm, unit.channels
    # Not two views of one tensor: they leave the block, and operators may not return such.
    dbeta, dgamma = (norm.mean.new_empty(channels) for _ in range(2))
    launch.run(
        collect,
        (quotient(channels, FOLD["BLOCK_N"]),),
        sums.pair,
        norm,
        dbeta,
        dgamma,
        totals or (dbeta, dgamma),
        channels,
        sums.tiles,
        share,
        TOTALS=totals is not None,
        ACCUMULATE=accumulate,
        **FOLD,
    )
    return dbeta, dgamma
