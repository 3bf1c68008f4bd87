"""Allocations and frees of a step by the allocator, from the events of ``torch.profiler``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from efficient_densenet.memory.events import Event

Node = Any
"""An event of the profiler's tree, which has no type in Python."""

_MARK = "efficient_densenet: "


def quiet_profiler() -> None:
    """Keep ``torch.profiler`` from telling stderr of every start and stop, and of absent GPUs.

    To be called before a process first profiles. Only Kineto, its library, reads the variable, and
    what it prints as errors has a lower level than starts and stops.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def phase(name: str) -> record_function:
    """Context manager that marks a phase of the step for :func:`record`."""
    return record_function(_MARK + name)


class AllocatorRecord:
    """Allocations and frees on one device while ``run`` runs, in order of time.

    Memory that was allocated before is not in it, nor is its release.

    Args:
        run: does the work, marking its phases with :func:`phase`.
        device: whose allocator to follow.
    """

    def __init__(self, run: Callable[[], None], device: torch.device) -> None:
        quiet_profiler()
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities, profile_memory=True) as profiler:
            run()
        self._numbers: dict[int, int] = {}  # address -> number of the allocation that lives there
        self.events = list(self._read(_flat(_tree(profiler)), device))

    def storages_of(self, tensors: Iterable[Tensor]) -> set[int]:
        """Numbers of the allocations, alive at the end, that hold ``tensors``."""
        addresses = (tensor.untyped_storage().data_ptr() for tensor in tensors)
        return {self._numbers[address] for address in addresses if address in self._numbers}

    def _read(self, nodes: list[tuple[Node, str]], device: torch.device) -> Iterator[Event]:
        now, born = "forward", 0
        for node, operator in nodes:
            if node.name.startswith(_MARK):
                now = node.name.removeprefix(_MARK)
            if not _is_allocation(node, device):
                continue
            address, size = node.extra_fields.ptr, node.extra_fields.alloc_size
            if size > 0:
                self._numbers[address] = born
                yield Event(now, operator, born, size)
                born += 1
            elif address in self._numbers:
                yield Event(now, operator, self._numbers.pop(address), size)


def _tree(profiler: profile) -> list[Node]:
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    return profiler.profiler.kineto_results.experimental_event_tree()


def _flat(roots: list[Node]) -> list[tuple[Node, str]]:
    """Every node with the outermost ``aten`` operator above it, sorted by time.

    By time, not by nesting: a CUDA backward pass runs on a thread, hence a tree, of its own.
    """
    found = []
    stack = [(root, "") for root in roots]
    while stack:
        node, operator = stack.pop()
        if not operator.startswith("aten::") and "[memory]" not in node.name:
            operator = node.name
        found.append((node, operator))
        stack.extend((child, operator) for child in node.children)
    return sorted(found, key=lambda pair: pair[0].start_time_ns)


def _is_allocation(node: Node, device: torch.device) -> bool:
    return hasattr(node.extra_fields, "alloc_size") and node.extra_fields.device.type == device.type
