"""Work on vectors of one value per channel: a norm made ready, and sums of tiles folded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.kernels.interface import Norm, Statistics, Sums
from efficient_densenet.kernels.triton import launch
from efficient_densenet.kernels.triton.launch import quotient

# Tiles and channels that a program folds at once: few channels, so that there are many programs.
FOLD = {"BLOCK_M": 256, "BLOCK_N": 8}
# Channels of a norm that a program makes ready.
VECTOR = 256


@triton.jit
def make_norm(
    mean,
    var,
    weight,
    bias,
    vectors,
    N,
    eps,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``vectors = (invstd, weight * invstd, bias)`` with ``invstd = (var + eps)^(-1/2)``."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    deviation = tl.sqrt_rn(tl.load(var + n, mask=n < N, other=1.0) + eps)
    invstd = tl.div_rn(1.0, deviation)
    scale, shift = invstd, tl.zeros_like(invstd)
    if WEIGHT:
        scale *= tl.load(weight + n, mask=n < N, other=0.0).to(tl.float32)
    if BIAS:
        shift = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(vectors + n, invstd, mask=n < N)
    tl.store(vectors + N + n, scale, mask=n < N)
    tl.store(vectors + 2 * N + n, shift, mask=n < N)


@triton.jit
def fold_moments(
    pair,
    statistics,
    M,
    N,
    tiles,
    height,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Mean and biased variance from those of tiles of ``height`` rows, by Chan's formula.

    ``mean = Σ n_t m_t / n``, ``var = Σ (q_t + n_t (m_t - mean)²) / n`` with the tiles' means
    ``m_t`` and sums of squared distances ``q_t``: the two halves of ``pair``.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, tiles, BLOCK_M):
        t = start + tl.arange(0, BLOCK_M)
        count = tl.minimum(M - t * height, height).to(tl.float32)
        inside = (t < tiles)[:, None] & (n < N)[None, :]
        means = tl.load(pair + t[:, None] * N + n[None, :], mask=inside, other=0.0)
        sums += count[:, None] * means
    center = tl.sum(sums, 0) / M
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, tiles, BLOCK_M):
        t = start + tl.arange(0, BLOCK_M)
        count = tl.minimum(M - t * height, height).to(tl.float32)
        inside = (t < tiles)[:, None] & (n < N)[None, :]
        place = pair + t[:, None] * N + n[None, :]
        distance = tl.load(place, mask=inside, other=0.0) - center[None, :]
        squares = tl.load(place + tiles * N, mask=inside, other=0.0)
        sums += tl.where(inside, squares + count[:, None] * distance * distance, 0.0)
    tl.store(statistics.mean + n, center, mask=n < N)
    tl.store(statistics.var + n, tl.sum(sums, 0) / M, mask=n < N)


@triton.jit
def collect(
    sums,
    norm,
    beta_gradient,
    gamma_gradient,
    totals,
    N,
    tiles,
    share,
    TOTALS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``dβ = Σ d`` and ``dγ = invstd * Σ d * (x - mean)``, from the ``sums`` of all tiles.

    Adds ``share * scale * dβ`` and ``share * scale * invstd * dγ`` to the totals.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum_d = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    sum_dx = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, tiles, BLOCK_M):
        t = start + tl.arange(0, BLOCK_M)
        inside = (t < tiles)[:, None] & (n < N)[None, :]
        place = t[:, None] * N + n[None, :]
        sum_d += tl.load(sums.d + place, mask=inside, other=0.0)
        sum_dx += tl.load(sums.dx + place, mask=inside, other=0.0)
    r = tl.load(norm.invstd + n, mask=n < N, other=0.0)
    dbeta = tl.sum(sum_d, 0)
    dgamma = r * tl.sum(sum_dx, 0)
    tl.store(beta_gradient + n, dbeta, mask=n < N)
    tl.store(gamma_gradient + n, dgamma, mask=n < N)
    if TOTALS:
        s = share * tl.load(norm.scale + n, mask=n < N, other=0.0)
        old = tl.load(totals[0] + n, mask=n < N, other=0.0)
        tl.store(totals[0] + n, old + s * dbeta, mask=n < N)
        old = tl.load(totals[1] + n, mask=n < N, other=0.0)
        tl.store(totals[1] + n, old + s * r * dgamma, mask=n < N)


def launch_make_norm(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Norm:
    """The operation ``make_norm``."""
    channels = len(mean)
    norm = mean.new_empty((3, *mean.shape))
    launch.run(
        make_norm,
        (quotient(channels, VECTOR),),
        mean,
        var,
        var if weight is None else weight,
        var if bias is None else bias,
        norm,
        channels,
        eps,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        BLOCK_N=VECTOR,
    )
    return Norm(mean, *norm)


def launch_fold(pair: Tensor, rows: int, height: int, statistics: Statistics) -> None:
    """Statistics of ``rows`` values per channel from those of tiles of ``height`` rows."""
    _, tiles, channels = pair.shape
    grid = (quotient(channels, FOLD["BLOCK_N"]),)
    launch.run(fold_moments, grid, pair, statistics, rows, channels, tiles, height, **FOLD)


def launch_collect(
    sums: Sums, norm: Norm, share: float, totals: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The operation ``collect``."""
    tiles, channels = sums.d.shape
    # Not two views of one tensor: they leave the block, and operators may not return such.
    dbeta, dgamma = torch.empty_like(norm.mean), torch.empty_like(norm.mean)
    launch.run(
        collect,
        (quotient(channels, FOLD["BLOCK_N"]),),
        sums,
        norm,
        dbeta,
        dgamma,
        totals or tuple(sums),
        channels,
        tiles,
        share,
        TOTALS=totals is not None,
        **FOLD,
    )
    return dbeta, dgamma
