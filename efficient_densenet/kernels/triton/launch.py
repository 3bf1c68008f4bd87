"""Launches: maps as matrices, what a kernel must know of them, and the launch itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from efficient_densenet.kernels.interface import Tail
from efficient_densenet.kernels.layout import is_hollow

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


# Values in the tile of an element-wise kernel, its widest row of channels, and its warps: a thread
# has 16 values, two accesses of 16 bytes in bfloat16, and so few registers that many fit a device.
TILE_VALUES, TILE_COLUMNS, TILE_WARPS = 4096, 64, 8
# Multiprocessors to assume where there is no device: those of an H100.
MULTIPROCESSORS = 132
# Of an argument Triton sees by itself only whether it is a multiple of this one.
SEEN_MULTIPLE = 16
# What a 32-bit offset reaches.
FAR = 2**31


class Matrix(NamedTuple):
    """Channels of a map as kernels take them: its memory, where it begins there, its strides.

    They see a matrix with a row for each position of each sample and a column for each channel.
    Rows begin at multiples of ``multiple`` values, and have a multiple of them: 2, 4 or 8 where
    Triton would not see it by itself, and otherwise 1.
    """

    data: Tensor
    offset: int
    sample: int
    channel: int
    position: int
    samples: int
    channels: int
    positions: int
    multiple: tl.constexpr

    @property
    def rows(self) -> int:
        """Values per channel."""
        return self.samples * self.positions


def matrix(x: Tensor, channels: slice | None = None) -> Matrix:
    """Channels of a map as a matrix; its memory itself, unless no strides fit its positions.

    No call into PyTorch makes a view: there would be many.
    """
    first, last = (0, x.shape[1]) if channels is None else (channels.start, channels.stop)
    where = _where(x.shape, x.stride(), first, last)
    if where is None:
        x = x.flatten(2)
        where = _where(x.shape, x.stride(), first, last)
        assert where is not None
    return Matrix(x, *where)


@lru_cache(maxsize=1 << 14)
def _where(
    shape: tuple[int, ...], strides: tuple[int, ...], first: int, last: int
) -> tuple[Any, ...] | None:
    """The rest of a ``Matrix``; ``None`` if no strides fit the positions.

    A step asks some thousand times for a few hundred answers.
    """
    samples, _, *spatial = shape
    sample, channel, *steps = strides
    step = position_stride(spatial, steps)
    if step is None:
        return None
    multiple = math.gcd(SEEN_MULTIPLE, first, last, sample, step)
    if channel != 1 or multiple == SEEN_MULTIPLE:
        multiple = 1
    sizes = (samples, last - first, math.prod(spatial))
    return first * channel, sample, channel, step, *sizes, constant(multiple)


@lru_cache(maxsize=1 << 10)
def constant(value: float) -> tl.constexpr:
    """A constant of a build within a tuple: the same object, which Triton finds again faster."""
    return tl.constexpr(value)


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
    flat = all(m.samples == 1 or m.sample == m.positions * m.position for m in matrices)
    far = any(_extent(m) >= FAR for m in matrices)
    return {"FLAT": flat, "INDEX": tl.int64 if far else tl.int32}


def _extent(m: Matrix) -> int:
    return (
        (m.samples - 1) * m.sample + (m.channels - 1) * m.channel + (m.positions - 1) * m.position
    )


def product_constants(dtype: torch.dtype) -> dict[str, Any]:
    """Types of a matrix product that computes in ``dtype``: that of the tensor cores, if any."""
    rounds = dtype == torch.float32 and rounds_to_tf32()
    return {"DTYPE": DTYPES[dtype], "PRECISION": "tf32" if rounds else "ieee"}


def factors(tail: Tail) -> tuple[Tensor, Tensor | None]:
    """The weight of a product, dense, and its bias; kernels read them in the product's type."""
    assert tail.conv is not None
    weight = tail.conv.weight
    (leaves, reads), (across, along) = weight.shape[:2], weight.stride()[:2]
    dense = leaves == 1 or across == reads, reads == 1 or along == 1
    return (weight if all(dense) else weight.contiguous()), tail.conv.bias


def rounds_to_tf32() -> bool:
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
    """Launch ``kernel`` on the device of its maps or vectors; all launches go through here.

    Maps without values launch nothing.
    """
    first = args[0][0] if isinstance(args[0], tuple) else args[0]
    if is_hollow(first):
        return
    with _on_device_of(first):
        kernel[grid](*args, num_warps=warps, num_stages=stages, **constants)


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """``torch.cuda.device_of``, which takes longer where there is nothing to change."""
    index = x.get_device()
    is_current = index < 0 or index == torch.cuda.current_device()
    return nullcontext() if is_current else torch.cuda.device(index)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs at a time, if each fills one of its multiprocessors."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


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
