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
    """Live bytes at the peak of a step, by what they are.

    ``parameters``, ``buffers``, ``inputs`` (targets included) and ``optimizer`` (its state) live
    before the step and after it. ``gradients`` are those of parameters and inputs; ``activations``
    were still alive when the forward pass ended; ``transient`` is all else. ``buckets`` are those
    in which ``DistributedDataParallel`` exchanges gradients; they live all the time, too.
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
        """Bytes above those that live before the step."""
        return self.gradients + self.activations + self.transient

    @property
    def total(self) -> int:
        """All bytes: the step's, and those that live before it."""
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
