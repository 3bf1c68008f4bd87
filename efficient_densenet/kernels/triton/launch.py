"""Launches: maps as matrices, the tiles of a kernel, and which of them is the fastest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet.kernels.interface import Tail
from efficient_densenet.kernels.layout import is_hollow

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Tile(NamedTuple):
    """What a program of a product works on at a time, and how it is built.

    ``m`` rows of the maps, ``n`` channels that the convolution leaves, ``k`` that it reads: two of
    them are the tile that the program computes, the third is the step of its loop.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes of it."""
        m, n, k, warps, stages = self
        return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "warps": warps, "stages": stages}


# Values in the tile of an element-wise kernel, its widest row of channels, and its warps: a thread
# has 16 values, two accesses of 16 bytes in bfloat16, and so few registers that many fit a device.
TILE_VALUES, TILE_COLUMNS, TILE_WARPS = 4096, 64, 8
# Multiprocessors to assume where there is no device: those of an H100.
MULTIPROCESSORS = 132
# What a 32-bit offset reaches.
FAR = 2**31


class Matrix(NamedTuple):
    """Channels of a map as kernels take them: its memory, where it begins there, its strides.

    They see a matrix with a row for each position of each sample and a column for each channel.
    """

    data: Tensor
    offset: int
    sample: int
    channel: int
    position: int
    samples: int
    channels: int
    positions: int

    @property
    def rows(self) -> int:
        """Values per channel."""
        return self.samples * self.positions


def matrix(x: Tensor, channels: slice | None = None) -> Matrix:
    """Channels of a map as a matrix; its memory itself, unless no strides fit its positions.

    No call into PyTorch makes a view: there would be many.
    """
    samples, width, *spatial = x.shape
    sample, channel, *strides = x.stride()
    step = position_stride(spatial, strides)
    if step is None:
        x = x.flatten(2)
        sample, channel, step = x.stride()
    first, last = (0, width) if channels is None else (channels.start, channels.stop)
    sizes = (samples, last - first, math.prod(spatial))
    return Matrix(x, first * channel, sample, channel, step, *sizes)


def position_stride(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The step from each position of a map to the next one, if it is always the same."""
    steps = [(n, stride) for n, stride in zip(sizes, strides, strict=True) if n > 1]
    if not steps:
        return 1
    _, step = steps[-1]
    covered = 1
    for size, stride in reversed(steps):
        if stride != step * covered:
            return None
        covered *= size
    return step


def shared(*matrices: Matrix) -> dict[str, Any]:
    """What a kernel must know of where all its maps lie: constants of its build."""
    samples, positions = matrices[0].samples, matrices[0].positions
    flat = samples == 1 or all(m.sample == positions * m.position for m in matrices)
    far = any(_extent(m) >= FAR for m in matrices)
    return {"FLAT": flat, "INDEX": tl.int64 if far else tl.int32}


def _extent(m: Matrix) -> int:
    return (
        (m.samples - 1) * m.sample + (m.channels - 1) * m.channel + (m.positions - 1) * m.position
    )


def product_constants(dtype: torch.dtype) -> dict[str, Any]:
    """Types of a matrix product that computes in ``dtype``: that of the tensor cores, if any."""
    return {"DTYPE": DTYPES[dtype], "PRECISION": "tf32" if _tf32() else "ieee"}


def factors(tail: Tail) -> tuple[Tensor, Tensor | None]:
    """The weight of a product, dense, and its bias; kernels read them in the product's type."""
    assert tail.conv is not None
    weight = tail.conv.weight
    (leaves, reads), (across, along) = weight.shape[:2], weight.stride()[:2]
    dense = leaves == 1 or across == reads, reads == 1 or along == 1
    return (weight if all(dense) else weight.contiguous()), tail.conv.bias


def tiles_for(dtype: torch.dtype, tiles: Sequence[Tile], exact: Tile) -> Sequence[Tile]:
    """The tiles to choose from for a product that computes in ``dtype``.

    ``exact`` is for float32 that may not be rounded to TF32: no tensor core does that, and larger
    tiles would spill.
    """
    return (exact,) if dtype == torch.float32 and not _tf32() else tiles


def _tf32() -> bool:
    """Whether convolutions of float32 may round their factors: PyTorch's own switch."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def run(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    warps: int = 4,
    stages: int = 1,
    **constants: Any,
) -> None:
    """Every launch there is, on the device of its maps or vectors; of those without values none."""
    first = args[0][0] if isinstance(args[0], tuple) else args[0]
    if is_hollow(first):
        return
    with torch.cuda.device_of(first):
        kernel[grid](*args, num_warps=warps, num_stages=stages, **constants)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs at a time, if each fills one of its multiprocessors."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


_fastest: dict[Any, Tile] = {}


def fastest(
    tiles: Sequence[Tile], x: Matrix, key: tuple[Any, ...], launch: Callable[[Tile], object]
) -> Tile:
    """The tile with which ``launch`` takes the least time on maps like ``x``.

    Measured once for each ``key``, layout and size, rounded up to powers of two; ``launch`` must be
    repeatable. Tiles round differently, so where algorithms must be deterministic it is always the
    first; and so it is while a graph is captured.
    """
    if torch.are_deterministic_algorithms_enabled():
        return tiles[0]
    sizes = power_of_two(x.rows), power_of_two(x.channels)
    key = (*key, *sizes, x.data.dtype, x.data.device, x.channel == 1)
    if key not in _fastest:
        if not x.data.is_cuda or torch.cuda.is_current_stream_capturing():
            return tiles[0]
        with torch.cuda.device_of(x.data):
            times = [milliseconds(partial(launch, tile)) for tile in tiles]
        _fastest[key] = tiles[times.index(min(times))]
    return _fastest[key]


def tuned() -> dict[str, dict[str, int]]:
    """The tiles that were measured to be the fastest so far, by what they were measured for."""
    return {", ".join(map(str, key)): tile._asdict() for key, tile in _fastest.items()}


def milliseconds(launch: Callable[[], object], repeats: int = 5) -> float:
    """How long a launch takes, its build and its first run aside; forever if it does not fit.

    Waits for the device.
    """
    try:
        launch()
    except triton.OutOfResources:
        return math.inf
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        launch()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def power_of_two(size: int) -> int:
    """The next one from ``size`` up."""
    return 1 << (size - 1).bit_length()


def quotient(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def elementwise(x: Matrix) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile of an element-wise kernel."""
    columns = min(TILE_COLUMNS, power_of_two(x.channels))
    rows = TILE_VALUES // columns
    grid = (quotient(x.rows, rows) * quotient(x.channels, columns),)
    return grid, {"BLOCK_M": rows, "BLOCK_N": columns, "warps": TILE_WARPS}
