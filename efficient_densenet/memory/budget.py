"""A limit on the bytes that live at once: by the CUDA allocator, or metered where there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from efficient_densenet.memory.meter import LiveMeter
from efficient_densenet.memory.scratch import Scratch, cpu_scratch
from efficient_densenet.memory.sizes import format_size

MOST_TOLD = 5


class BudgetExceeded(torch.OutOfMemoryError):
    """More bytes would be alive than the budget allows.

    The message names the operator that asked, its bytes, and which operators allocated the rest.
    """


class MeteredBudget(LiveMeter):
    """Context manager in which live bytes may not exceed a limit, on any device.

    The operator that would exceed it runs, and its result is dropped: the process never holds more
    than the limit and one operator's result. Once the exception has been handled, what the failed
    code held is freed, so that the process can continue with a smaller batch.

    Args:
        limit: bytes, those of ``resident`` included.
        resident: tensors that exist before, such as parameters, and count too.
        scratch: bytes that an operator allocates internally; by default those of a CPU.

    Raises:
        BudgetExceeded: inside the context, from the operator that would exceed the limit.
    """

    def __init__(
        self, limit: int, resident: Iterable[Tensor] = (), scratch: Scratch | None = cpu_scratch
    ) -> None:
        super().__init__(scratch=scratch)
        self.limit = limit
        self.resident = self.live = self.peak = 0
        self._held: set[int] = set()
        self._makers: dict[int, tuple[str, int]] = {}
        self.hold(resident)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count ``tensors``, which existed before the meter, from now on."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage._cdata not in self._held:
                self._held.add(storage._cdata)
                self.resident += storage.nbytes()
                self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _log(self, storage: int, size: int) -> None:
        # No events are kept, as there is no end to a training run.
        maker, before = self._makers.pop(storage, (self._operator, 0))
        if before + size:
            self._makers[storage] = maker, before + size
        self.live += size
        if size > 0 and self.live > self.limit:
            raise BudgetExceeded(self._describe(size))
        self.peak = max(self.peak, self.live)

    def _describe(self, size: int) -> str:
        made: Counter[str] = Counter()
        for maker, count in self._makers.values():
            made[maker] += count
        makers = ", ".join(f"{format_size(n)} by {name}" for name, n in made.most_common(MOST_TOLD))
        return (
            f"{self._operator} needs {format_size(size)}, and {format_size(self.live)} would be "
            f"live in a budget of {format_size(self.limit)}; {format_size(self.resident)} are "
            f"resident, most of the rest was allocated by: {makers}"
        )


@contextmanager
def enforce(
    limit: int, device: torch.device, resident: Iterable[Tensor] = ()
) -> Iterator[MeteredBudget | None]:
    """Context manager that limits the memory of ``device`` to ``limit`` bytes.

    On CUDA the caching allocator refuses to exceed it
    (``torch.cuda.set_per_process_memory_fraction``). It counts all that this process has reserved
    on the device; at the end the whole device is allowed again. Elsewhere live tensors are counted
    at every operator, which takes time. The operator that exceeds the limit runs, and its result is
    dropped.

    When the error has been handled, nothing that was allocated inside is alive, and work can
    continue with a smaller batch.

    Args:
        limit: bytes.
        device: where memory is limited.
        resident: tensors that exist before, such as parameters, and count too. Ignored on CUDA.

    Raises:
        torch.OutOfMemoryError: inside the context, where the limit would be exceeded; on devices
            other than CUDA a :class:`BudgetExceeded`.
    """
    try:
        if device.type == "cuda":
            with _share_of(device, limit):
                yield None
        else:
            with MeteredBudget(limit, resident) as budget:
                yield budget
    except torch.OutOfMemoryError:
        forget_backward()
        raise


def forget_backward() -> None:
    """Free what a failed backward pass still holds.

    On a CPU autograd's engine keeps the rest of such a pass, and with it the graph, until the next
    pass: so this runs one, on a single number.
    """
    with torch.enable_grad():
        torch.zeros((), requires_grad=True).backward()


@contextmanager
def _share_of(device: torch.device, limit: int) -> Iterator[None]:
    share = limit / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
