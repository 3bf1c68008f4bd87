"""Memory formats and types: which ones a map has, and which the recomputing functions work in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a map are its fastest dimension in memory."""
    return (
        x.dim() in CHANNELS_LAST and x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()
    )


def outer_format(x: Tensor) -> torch.memory_format:
    """The memory format of ``x``: what a caller expects of a result."""
    return CHANNELS_LAST[x.dim()] if is_channels_last(x) else torch.contiguous_format


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """The map ``y`` in the memory format of the map ``x``; all else as it is."""
    are_maps = isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() == y.dim() > 2
    return y.contiguous(memory_format=outer_format(x)) if are_maps else y


def inner_format(x: Tensor) -> torch.memory_format:
    """The memory format to compute in: on CUDA that of ``x``, elsewhere channels last.

    On a CPU convolutions and batch norm's reductions are several times faster with the channels
    last.
    """
    if device_of(x).type == "cuda" or x.dim() not in CHANNELS_LAST:
        return outer_format(x)
    return CHANNELS_LAST[x.dim()]


def first_channels(x: Tensor, channels: int) -> Tensor:
    """So many channels of a map, without a call into PyTorch where they are all."""
    return x if x.shape[1] == channels else x[:, :channels]


def some_channels(x: Tensor, channels: slice) -> Tensor:
    """Some channels of a map, without a call into PyTorch where they are all."""
    whole = channels.start == 0 and channels.stop == x.shape[1]
    return x if whole else x[:, channels]


def rows_of(x: Tensor, rows: slice) -> Tensor:
    """Some samples of a map, or values of a vector, without a call where they are all."""
    return x if rows.start == 0 and rows.stop == x.shape[0] else x[rows]


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, without a call into PyTorch where nothing changes: there are many."""
    return x if x.dtype == dtype else x.to(dtype)


def empty_map(
    like: Tensor,
    channels: int,
    memory_format: torch.memory_format,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """An unwritten map of ``channels`` channels, otherwise as ``like``."""
    shape = (like.shape[0], channels, *like.shape[2:])  # len() would fix a symbolic batch
    return torch.empty(
        shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format
    )


def is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor has a shape but no values, as meta and fake ones."""
    try:
        return tensor.untyped_storage().device.type == "meta"
    except NotImplementedError:  # a wrapper of torch.func around a tensor that has values
        return False


_imagined: ContextVar[torch.device | None] = ContextVar("imagined", default=None)


@contextmanager
def imagined_on(device: torch.device) -> Iterator[None]:
    """Passes on shapes without values go as they would on ``device``; otherwise as on a CPU."""
    token = _imagined.set(device)
    try:
        yield
    finally:
        _imagined.reset(token)


def device_of(x: Tensor) -> torch.device:
    """The device whose way to compute ``x`` takes: its own, or the one that is imagined."""
    if x.device.type in ("meta", "cpu") and is_hollow(x):
        return _imagined.get() or torch.device("cpu")
    return x.device
