"""How a kind of device counts memory."""

from __future__ import annotations

from typing import NamedTuple

import torch

from efficient_densenet.memory.scratch import Scratch, cpu_scratch
from efficient_densenet.memory.sizes import parse_size


class Device(NamedTuple):
    """How memory is counted on a kind of device.

    Attributes:
        granularity: bytes that its allocator rounds every size up to.
        scratch: what operators allocate inside themselves, where that is known.
        reserve: bytes of a budget that are left to what an estimate cannot see.
        reserve_reason: what the reserve is for.
    """

    granularity: int
    scratch: Scratch | None
    reserve: int
    reserve_reason: str


DEVICES = {
    "cpu": Device(1, cpu_scratch, 0, "what oneDNN allocates is part of the peak"),
    "cuda": Device(
        512,
        None,
        256 << 20,
        "assumed: 64 MiB for cuBLAS, the rest for cuDNN's workspaces and fragmentation",
    ),
}

OTHER = Device(1, None, 0, "nothing is known of it")
"""Any other device: live tensors are counted as they are."""


def present_device() -> str:
    """Which of :data:`DEVICES` this machine has."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: torch.device | str | None) -> str:
    """Which of :data:`DEVICES` is meant; this machine's unless given.

    Raises:
        ValueError: if it is none of them.
    """
    if device is None:
        return present_device()
    kind = str(device).partition(":")[0]
    if kind not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {str(device)!r}")
    return kind


def available_bytes(budget: int | str | None) -> int:
    """The bytes of a budget; of none, what the present GPU has free.

    Raises:
        ValueError: if it is no size, or there is no GPU; the message goes on after a name.
    """
    if budget is not None:
        return parse_size(budget)
    if not torch.cuda.is_available():
        raise ValueError("must be given, such as 8GiB: there is no GPU whose free memory to ask")
    return torch.cuda.mem_get_info()[0]


def room_within(budget: int | str | None, kind: str) -> int:
    """The bytes of a budget that a step may use on a kind of device: all but the reserve.

    Raises:
        ValueError: as :func:`available_bytes`; the message names the argument ``budget``.
    """
    try:
        return available_bytes(budget) - DEVICES[kind].reserve
    except ValueError as error:
        raise ValueError(f"budget {error}") from error
