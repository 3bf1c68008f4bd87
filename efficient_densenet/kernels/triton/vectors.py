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
FOLD_ROWS, FOLD_COLUMNS = 256, 8
VECTOR = 256


@triton.jit
def make_norm(
    mean,
    var,
    weight,
    bias,
    vectors,
    channels,
    eps,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``vectors = (invstd, weight * invstd, bias)`` with ``invstd = (var + eps)^(-1/2)``."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < channels
    deviation = tl.sqrt_rn(tl.load(var + columns, mask=inside, other=1.0) + eps)
    invstd = tl.div_rn(1.0, deviation)
    scale, shift = invstd, tl.zeros_like(invstd)
    if WEIGHT:
        scale *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(vectors + columns, invstd, mask=inside)
    tl.store(vectors + channels + columns, scale, mask=inside)
    tl.store(vectors + 2 * channels + columns, shift, mask=inside)


@triton.jit
def fold_moments(
    pair,
    mean,
    var,
    values,
    tiles,
    channels,
    height,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Mean and biased variance from those of tiles of ``height`` rows, by Chan's formula.

    ``mean = Σ n_t m_t / n``, ``var = Σ (q_t + n_t (m_t - mean)²) / n`` with the tiles' means
    ``m_t`` and sums of squared distances ``q_t``: the two halves of ``pair``.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < channels
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, tiles, ROWS):
        t = start + tl.arange(0, ROWS)
        n = tl.minimum(values - t * height, height).to(tl.float32)
        mask = (t < tiles)[:, None] & inside[None, :]
        means = tl.load(pair + t[:, None] * channels + columns[None, :], mask=mask, other=0.0)
        sums += n[:, None] * means
    center = tl.sum(sums, 0) / values
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, tiles, ROWS):
        t = start + tl.arange(0, ROWS)
        n = tl.minimum(values - t * height, height).to(tl.float32)
        mask = (t < tiles)[:, None] & inside[None, :]
        place = pair + t[:, None] * channels + columns[None, :]
        distance = tl.load(place, mask=mask, other=0.0) - center[None, :]
        squares = tl.load(place + tiles * channels, mask=mask, other=0.0)
        sums += tl.where(mask, squares + n[:, None] * distance * distance, 0.0)
    tl.store(mean + columns, center, mask=inside)
    tl.store(var + columns, tl.sum(sums, 0) / values, mask=inside)


@triton.jit
def collect(
    d,
    dx,
    invstd,
    scale,
    beta_gradient,
    gamma_gradient,
    total_d,
    total_dx,
    tiles,
    channels,
    share,
    TOTALS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``dβ = Σ d`` and ``dγ = invstd * Σ d * (x - mean)``.

    The sums over all tiles, of ``d`` and of ``dx``. Adds ``share * scale * dβ`` and
    ``share * scale * invstd * dγ`` to the totals.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < channels
    sums_d = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    sums_dx = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, tiles, ROWS):
        t = start + tl.arange(0, ROWS)
        mask = (t < tiles)[:, None] & inside[None, :]
        place = t[:, None] * channels + columns[None, :]
        sums_d += tl.load(d + place, mask=mask, other=0.0)
        sums_dx += tl.load(dx + place, mask=mask, other=0.0)
    r = tl.load(invstd + columns, mask=inside, other=0.0)
    dbeta = tl.sum(sums_d, 0)
    dgamma = r * tl.sum(sums_dx, 0)
    tl.store(beta_gradient + columns, dbeta, mask=inside)
    tl.store(gamma_gradient + columns, dgamma, mask=inside)
    if TOTALS:
        s = share * tl.load(scale + columns, mask=inside, other=0.0)
        old = tl.load(total_d + columns, mask=inside, other=0.0)
        tl.store(total_d + columns, old + s * dbeta, mask=inside)
        old = tl.load(total_dx + columns, mask=inside, other=0.0)
        tl.store(total_dx + columns, old + s * r * dgamma, mask=inside)


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
        COLUMNS=VECTOR,
    )
    return Norm(mean, *norm)


def launch_fold(pair: Tensor, values: int, height: int, statistics: Statistics) -> None:
    """Statistics of ``values`` per channel from those of tiles of ``height`` rows."""
    _, tiles, channels = pair.shape
    launch.run(
        fold_moments,
        (quotient(channels, FOLD_COLUMNS),),
        pair,
        *statistics,
        values,
        tiles,
        channels,
        height,
        ROWS=FOLD_ROWS,
        COLUMNS=FOLD_COLUMNS,
    )


def launch_collect(
    sums: Sums, norm: Norm, share: float, totals: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The operation ``collect``."""
    tiles, channels = sums.d.shape
    # Not two views of one tensor: they leave the block, and operators may not return such.
    dbeta, dgamma = torch.empty_like(norm.mean), torch.empty_like(norm.mean)
    launch.run(
        collect,
        (quotient(channels, FOLD_COLUMNS),),
        *sums,
        norm.invstd,
        norm.scale,
        dbeta,
        dgamma,
        *(totals or sums),
        tiles,
        channels,
        share,
        TOTALS=totals is not None,
        ROWS=FOLD_ROWS,
        COLUMNS=FOLD_COLUMNS,
    )
    return dbeta, dgamma
