"""In which types a call computes and stores, autocast included."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_densenet.kernels.interface import Pool


@dataclass(frozen=True)
class Types:
    """Convolutions compute in ``compute``; features are stored in ``features``."""

    compute: torch.dtype
    features: torch.dtype

    @property
    def statistics(self) -> torch.dtype:
        """Type of means, variances and of all that is summed over a batch."""
        # Not by ``promote_types``: a call into PyTorch, and there are many.
        return torch.float64 if self.features == torch.float64 else torch.float32


def is_autocast(x: Tensor) -> bool:
    """Whether autocast chooses the types of a call on ``x`` at this moment."""
    device = x.device.type
    return (
        torch.amp.is_autocast_available(device)  # not on meta
        and torch.is_autocast_enabled(device)
        and x.dtype != torch.float64
    )


def types_of(x: Tensor) -> Types:
    """The types of a call on ``x`` at this moment."""
    compute = torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype
    return Types(compute, torch.promote_types(x.dtype, compute))


def pools_to_float32(x: Tensor, pool: Pool | None) -> bool:
    """Whether autocast leaves the result of this pooling in float32: on a CPU in three dimensions.

    Source: the list of operators of CPU autocast in PyTorch's ``autocast_mode.cpp``.
    """
    return pool is not None and len(pool.kernel) == 3 and x.device.type == "cpu" and is_autocast(x)


Autocast = tuple[tuple[str, bool, torch.dtype], ...]
"""Of some types of devices, whether autocast is on, and its type."""


def autocast_now(device: torch.device) -> Autocast:
    """What autocast does at this moment, to operations on ``device`` or on the CPU."""
    kinds = dict.fromkeys(("cpu", device.type))
    return tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in kinds
        if torch.amp.is_autocast_available(kind)
    )


def as_autocast(state: Autocast) -> ExitStack:
    """A context in which autocast does what it did then.

    Nothing is cached: what is cached outside of a graph would be found by those who need one.
    """
    stack = ExitStack()
    for kind, enabled, dtype in state:
        stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
    return stack


def outside_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which operations compute in the types that they are given."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
