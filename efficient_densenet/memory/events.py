"""The live bytes of one training step: allocations and frees of storages, and their peak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Event:
    """A storage was allocated, grew (``size`` > 0 bytes) or was freed (``size`` < 0).

    ``storage`` is a number, unique in one step; ``phase`` is ``"forward"``, ``"backward"`` or
    ``"optimizer"``; ``operator`` is the one that ran, or ran last.
    """

    phase: str
    operator: str
    storage: int
    size: int


@dataclass(frozen=True)
class Peak:
    """Bytes that are alive at the peak of a step, by kind.

    Parameters, buffers, inputs, optimizer state and buckets exist before the step and after it.

    Attributes:
        parameters: bytes of the parameters.
        buffers: bytes of the buffers.
        inputs: bytes of inputs and target.
        optimizer: bytes of the optimizer's state.
        gradients: bytes of the gradients of parameters and inputs.
        activations: bytes that the forward pass left, and that are still alive at the peak.
        transient: all other bytes that the step has allocated.
        operator: the operator that ran at the peak.
        phase: ``"forward"``, ``"backward"`` or ``"optimizer"``.
        buckets: bytes of the buckets in which ``DistributedDataParallel`` exchanges gradients.
    """

    parameters: int
    buffers: int
    inputs: int
    optimizer: int
    gradients: int
    activations: int
    transient: int
    operator: str
    phase: str
    buckets: int = 0

    @property
    def step(self) -> int:
        """Bytes that the step has allocated: gradients, activations and transient ones."""
        return self.gradients + self.activations + self.transient

    @property
    def total(self) -> int:
        """All bytes, including those that exist before the step: what a device must hold."""
        before = self.parameters + self.buffers + self.inputs + self.optimizer + self.buckets
        return before + self.step


def live_bytes(events: Sequence[Event]) -> list[int]:
    """Live bytes after each event, above those that lived before the step."""
    return list(accumulate(event.size for event in events))


def live_after_forward(events: Sequence[Event]) -> Counter[int]:
    """Bytes by storage at the end of the forward pass."""
    forward = sum(event.phase == "forward" for event in events)
    return _alive(events[:forward])


def find_peak(events: Sequence[Event], gradients: Collection[int], static: dict[str, int]) -> Peak:
    """The peak of ``events``, split.

    Args:
        events: of one step, in order.
        gradients: numbers of the storages that are gradients.
        static: bytes of ``parameters``, ``buffers``, ``inputs``, ``optimizer`` and, if there are
            any, ``buckets``.
    """
    running = live_bytes(events)
    top = max(range(len(running)), key=running.__getitem__)
    alive = _alive(events[: top + 1])
    kept = live_after_forward(events)
    gradient_bytes = sum(size for storage, size in alive.items() if storage in gradients)
    activation_bytes = sum(
        size for storage, size in alive.items() if storage in kept and storage not in gradients
    )
    return Peak(
        **static,
        gradients=gradient_bytes,
        activations=activation_bytes,
        transient=running[top] - gradient_bytes - activation_bytes,
        operator=events[top].operator,
        phase=events[top].phase,
    )


def _alive(events: Sequence[Event]) -> Counter[int]:
    sizes: Counter[int] = Counter()
    for event in events:
        sizes[event.storage] += event.size
    return +sizes
