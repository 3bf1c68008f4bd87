"""What goes over a map once: copying with statistics, norm and rectifier and back, correcting."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.kernels.interface import Statistics
from efficient_densenet.kernels.triton import launch
from efficient_densenet.kernels.triton.launch import elementwise, matrix, quotient, shared
from efficient_densenet.kernels.triton.tile import (
    known_multiple,
    load_tile,
    norm_vectors,
    own_tile,
    rectified,
    store_moments,
    store_through_rectifier,
    store_tile,
)
from efficient_densenet.kernels.triton.vectors import Norm, Terms, TileSums, launch_fold


@triton.jit
def append(
    y,
    into,
    pair,
    M,
    N,
    positions,
    COPY: tl.constexpr,
    STATISTICS: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``into = y`` if ``COPY``; the statistics of the values as ``into`` holds them."""
    N = known_multiple(N, y.multiple)
    row, m, n = own_tile(N, BLOCK_M, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tile = load_tile(y, m, n, inside, positions, FLAT, INDEX)
    if COPY:
        tile = tile.to(into.data.dtype.element_ty)
        store_tile(into, tile, m, n, inside, positions, FLAT, INDEX)
    if STATISTICS:
        store_moments(pair, row, tile.to(tl.float32), m, M, n, N, BLOCK_M)


@triton.jit
def rectify(
    x,
    norm,
    out,
    M,
    N,
    positions,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``out = relu((x - mean) * scale + bias)``."""
    N = known_multiple(N, x.multiple)
    _, m, n = own_tile(N, BLOCK_M, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tile = load_tile(x, m, n, inside, positions, FLAT, INDEX)
    mean, scale, bias = norm_vectors(norm, n, n < N)
    tile = rectified(tile, mean, scale, bias, out.data.dtype.element_ty)
    store_tile(out, tile, m, n, inside, positions, FLAT, INDEX)


@triton.jit
def rectify_backward(
    d,
    x,
    target,
    norm,
    pair,
    terms,
    first,
    M,
    N,
    positions,
    TARGET: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``target += scale * d`` where ``x`` was rectified to more than zero; sums, or batch terms.

    ``d`` is the gradient of the rectified map. What becomes of sums and terms is in
    ``store_through_rectifier``; sums are in the rows of ``pair`` from ``first`` on.
    """
    N = known_multiple(N, x.multiple)
    row, m, n = own_tile(N, BLOCK_M, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tile = load_tile(d, m, n, inside, positions, FLAT, INDEX)
    store_through_rectifier(
        tile.to(tl.float32),
        x,
        target,
        norm,
        pair,
        terms,
        first + row,
        m,
        n,
        M,
        N,
        positions,
        d.data.dtype.element_ty,
        TARGET,
        ACCUMULATE,
        FLAT,
        INDEX,
        BLOCK_M,
    )


@triton.jit
def drop(
    y,
    seed,
    M,
    N,
    positions,
    rate,
    factor,
    WHOLE_MAPS: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``y *= factor`` where a random number of the seed and the place is at least ``rate``, or 0.

    With ``WHOLE_MAPS`` the place is that of the map.
    """
    N = known_multiple(N, y.multiple)
    _, m, n = own_tile(N, BLOCK_M, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    drawn_for = m // positions if WHOLE_MAPS else m
    number = drawn_for.to(INDEX)[:, None] * N + n.to(INDEX)[None, :]
    mask = tl.where(tl.rand(tl.load(seed), number) >= rate, factor, 0.0)
    tile = load_tile(y, m, n, inside, positions, FLAT, INDEX).to(tl.float32)
    store_tile(y, tile * mask, m, n, inside, positions, FLAT, INDEX)


@triton.jit
def correct(
    grad,
    x,
    out,
    mean,
    a,
    b,
    first,
    M,
    N,
    positions,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``out = grad - a - (x - mean) * b``; the vectors' channels begin at ``first``."""
    N, first = known_multiple(N, grad.multiple), known_multiple(first, grad.multiple)
    _, m, n = own_tile(N, BLOCK_M, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    center = tl.load(mean + first + n, mask=n < N, other=0.0)[None, :]
    constant = tl.load(a + first + n, mask=n < N, other=0.0)[None, :]
    slope = tl.load(b + first + n, mask=n < N, other=0.0)[None, :]
    g = load_tile(grad, m, n, inside, positions, FLAT, INDEX).to(tl.float32) - constant
    g -= (load_tile(x, m, n, inside, positions, FLAT, INDEX).to(tl.float32) - center) * slope
    store_tile(out, g, m, n, inside, positions, FLAT, INDEX)


def launch_append(
    y: Tensor, into: Tensor | None, start: int, statistics: Statistics | None
) -> None:
    """The operation ``append``."""
    source = matrix(y)
    place = source if into is None else matrix(into, slice(start, start + source.channels))
    grid, tile = elementwise(source)
    pair = y
    if statistics is not None:
        tiles = quotient(source.rows, tile["BLOCK_M"])
        pair = torch.empty(tiles * 2 * source.channels, dtype=torch.float32, device=y.device)
    launch.run(
        append,
        grid,
        source,
        place,
        pair,
        source.rows,
        source.channels,
        source.positions,
        COPY=into is not None,
        STATISTICS=statistics is not None,
        **shared(source, place),
        **tile,
    )
    if statistics is not None:
        launch_fold(pair, start, source, tile["BLOCK_M"], statistics)


def launch_drop(
    y: Tensor, seed: Tensor, rate: float, whole_maps: bool, memory_format: torch.memory_format
) -> None:
    """The operation ``drop``."""
    place = matrix(y)
    grid, tile = elementwise(place)
    launch.run(
        drop,
        grid,
        place,
        seed,
        place.rows,
        place.channels,
        place.positions,
        rate,
        1 / (1 - rate) if rate < 1 else 0.0,
        WHOLE_MAPS=whole_maps,
        **shared(place),
        **tile,
    )


def launch_rectify(norm: Norm, x: Tensor, out: Tensor) -> Tensor:
    """The norm and the rectifier of a map, into ``out``."""
    source, place = matrix(x), matrix(out)
    grid, tile = elementwise(source)
    sizes = (source.rows, source.channels, source.positions)
    launch.run(rectify, grid, source, norm, place, *sizes, **shared(source, place), **tile)
    return out


def tile_rows(x: Tensor) -> int:
    """Into how many rows of tiles an element-wise kernel divides a map."""
    source = matrix(x)
    return quotient(source.rows, elementwise(source)[1]["BLOCK_M"])


def launch_rectify_backward(
    d: Tensor,
    x: Tensor,
    norm: Norm,
    target: Tensor | None,
    accumulate: bool,
    sums: TileSums | Terms,
    first: int = 0,
) -> None:
    """Writes or adds the gradient through them, if there is a target; the sums from tile ``first``.

    Given the batch terms instead of a place for sums, it is the whole gradient.
    """
    pair, terms = (sums.pair, None) if isinstance(sums, TileSums) else (None, sums)
    arriving, source = matrix(d), matrix(x)
    place = source if target is None else matrix(target)
    grid, tile = elementwise(source)
    launch.run(
        rectify_backward,
        grid,
        arriving,
        source,
        place,
        norm,
        pair,
        terms,
        first,
        source.rows,
        source.channels,
        source.positions,
        TARGET=target is not None,
        ACCUMULATE=accumulate,
        **shared(arriving, source, place),
        **tile,
    )


def launch_correct(
    grad: Tensor,
    x: Tensor,
    channels: slice,
    mean: Tensor,
    a: Tensor,
    b: Tensor,
    out: Tensor,
) -> Tensor:
    """The operation ``correct``."""
    g, source, place = matrix(grad, channels), matrix(x, channels), matrix(out)
    grid, tile = elementwise(source)
    sizes = (channels.start, source.rows, source.channels, source.positions)
    constants = shared(g, source, place)
    launch.run(correct, grid, g, source, place, mean, a, b, *sizes, **constants, **tile)
    return out
