"""What a forward pass keeps for its backward pass, counted in storages."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}


def kept_bytes(block: nn.Module, x: Tensor) -> int:
    """Bytes of the output and of all that is saved for backward, but parameters and the input."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = block(x)
    kept = storages([*saved, out])
    for own in storages([*block.parameters(), *block.buffers(), x]):
        kept.pop(own, None)
    return sum(s.nbytes() for s in kept.values())


class StorageLog(TorchDispatchMode):
    """Remembers every storage that an operator returned, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def live(self) -> list[int]:
        """The sizes of those that are still alive, in bytes."""
        return [size for ref, size in self.seen.values() if not ref.expired()]


def live_bytes(block: nn.Module, x: Tensor) -> int:
    """Bytes of everything that a forward pass makes and that its output keeps alive."""
    before = storages([*block.parameters(), *block.buffers(), x])
    with StorageLog() as log:
        out = block(x)
    assert out.requires_grad
    for storage in before.values():
        log.seen.pop(storage._cdata, None)
    return sum(log.live())
