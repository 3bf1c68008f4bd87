"""The live-storage meter: counts the bytes of live tensors on any device, ``meta`` included."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_densenet.kernels.layout import is_hollow
from efficient_densenet.memory.events import Event
from efficient_densenet.memory.scratch import Scratch
from efficient_densenet.memory.shapes import (
    Arguments,
    Keywords,
    Operators,
    Result,
    tensors_of,
    view,
)

_ADD = torch.ops.aten.add.Tensor
_DEVICE = torch.ops.prim.device.default


class LiveMeter(TorchDispatchMode):
    """Context manager that records every storage allocated inside it, until it is freed.

    Counts the bytes of live tensors, each storage once: a lower bound of what an allocator hands
    out, since what an operator allocates and frees internally is invisible here, unless ``scratch``
    says how much that is. The insides of a ``torch.library.custom_op`` and a direct
    ``UntypedStorage.resize_`` are invisible too. Storages from before the meter are not counted.

    :attr:`events` grows as operators run.

    Args:
        granularity: every size is rounded up to a multiple of this many bytes, as allocators do.
        scratch: bytes that an operator allocates and frees internally, e.g.
            :func:`cpu_scratch`.
    """

    def __init__(self, granularity: int = 1, scratch: Scratch | None = None) -> None:
        super().__init__()
        self._phase = "forward"
        self.events: list[Event] = []
        self._granularity, self._scratch = granularity, scratch
        self._operator = ""
        self._born = 0
        self._live: dict[int, _Record] = {}
        self._exclusive = _exclusive_counts()
        self._operators = Operators()

    @contextmanager
    def enter(self, phase: str) -> Iterator[None]:
        """Context manager that marks a phase of the step."""
        self._phase = phase
        yield

    def storages_of(self, tensors: Iterable[Tensor]) -> set[int]:
        """Numbers of the recorded storages of ``tensors``."""
        keys = {_key(tensor) for tensor in tensors}
        return {self._live[key].number for key in keys if key in self._live}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> Result:
        kwargs = kwargs or {}
        if func is _DEVICE:
            return func(*args, **kwargs)  # what fake tensors are asked ten thousand times
        if func is _ADD and not kwargs and self._engine_would_add_in_place(*args):
            return _add_in_place(*args)
        traits = _traits(func)
        self._operator = traits.name
        if traits.views:
            return view(func, args, kwargs)  # no storage is born
        target = traits.target(args, kwargs)
        if target is not None and target.numel() and is_hollow(target):
            self._pass_by(func, args, target)
            return target  # neither here, and there is nothing to compute
        result, own = self._operators.run(func, args, kwargs)
        for tensor in tensors_of((result,)):
            if own:
                self._bear(tensor.untyped_storage())
            else:
                self._see(tensor, args, kwargs)
        self._pass_by(func, args, result)
        return result

    def _engine_would_add_in_place(self, old: Tensor, new: object) -> bool:
        # A dispatch mode makes the autograd engine add gradients out of place which it otherwise
        # adds into the older one. Nobody else holds that one, so the meter may add into it too.
        return (
            not torch.is_grad_enabled()
            and torch._C._current_graph_task_id() != -1
            and isinstance(new, Tensor)
            and old.shape == new.shape
            and old.dtype == new.dtype
            and _is_dense(old)
            and _counts(old) == self._exclusive
        )

    def _see(self, tensor: Tensor, args: Arguments, kwargs: Keywords) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        record = self._live.get(key)
        if record is not None:
            grown = self._rounded(storage) - record.size
            if grown:
                record.size += grown
                self._log(record.number, grown)
        elif all(_key(given) != key for given in _given(args, kwargs)):
            self._bear(storage)  # else it is a view of something older than the meter

    def _bear(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, self._rounded(storage)
        watch = weakref.ref(storage, lambda _: self._bury(key))
        self._live[key] = _Record(self._born, size, watch)
        self._born += 1
        self._log(self._born - 1, size)

    def _rounded(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._granularity) * self._granularity

    def _pass_by(self, func: OpOverload, args: Arguments, result: Result) -> None:
        size = self._scratch(func, args, result) if self._scratch else 0
        if size:
            number, self._born = self._born, self._born + 1
            try:
                self._log(number, size)
            finally:
                self._log(number, -size)

    def _bury(self, key: int) -> None:
        record = self._live.pop(key)
        self._log(record.number, -record.size)

    def _log(self, storage: int, size: int) -> None:
        self.events.append(Event(self._phase, self._operator, storage, size))


class _Record:
    __slots__ = ("number", "size", "watch")

    def __init__(self, number: int, size: int, watch: weakref.ref[torch.UntypedStorage]) -> None:
        self.number, self.size, self.watch = number, size, watch


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _given(args: Arguments, kwargs: Keywords) -> Iterator[Tensor]:
    yield from tensors_of(args)
    yield from tensors_of(kwargs.values())


def _add_in_place(old: Tensor, new: Tensor) -> Tensor:
    return old if is_hollow(old) else old.add_(new)


class _Traits(NamedTuple):
    """What the meter needs to know of an operator.

    ``views``: it always returns views of its arguments and nothing else. ``written``: position or
    keyword of the argument that it writes into and returns, if that is all it does.
    """

    name: str
    views: bool
    written: int | str | None

    def target(self, args: Arguments, kwargs: Keywords) -> Tensor | None:
        """The tensor that the operator writes into and returns."""
        if self.written is None:
            return None
        return kwargs.get(self.written) if isinstance(self.written, str) else args[self.written]


@cache  # once for each operator: there are few, and they are called hundreds of thousands of times
def _traits(func: OpOverload) -> _Traits:
    views = func.is_view and not func._can_decompose()
    return _Traits(str(func), views, _written_argument(func))


def _written_argument(func: OpOverload) -> int | str | None:
    schema = func._schema
    written = [
        argument.name if argument.kwarg_only else position
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    returns_it = len(schema.returns) == 1 and schema.returns[0].alias_info is not None
    if len(written) == 1 and returns_it and torch.Tag.inplace_view not in func.tags:
        return written[0]
    return None


def _is_dense(tensor: Tensor) -> bool:
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.numel() == 1 + sum((size - 1) * stride for size, stride in strides)


def _counts(tensor: Any) -> tuple[int, int, int]:
    return (
        tensor._use_count(),
        sys.getrefcount(tensor),
        torch._C._storage_Use_Count(_key(tensor)),
    )


def _exclusive_counts() -> tuple[int, int, int]:
    """Reference counts of a gradient that only the engine holds, as a dispatch mode sees them.

    Learned from a tiny backward pass, because they differ between versions of torch.
    """
    with torch.enable_grad(), _CountProbe() as probe:
        x = torch.ones(2, requires_grad=True)
        y = x * 2
        torch.autograd.backward(y.exp() + y.exp(), torch.ones(2))
    return probe.counts


class _CountProbe(TorchDispatchMode):
    counts = (0, 0, 0)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> Result:
        if func is _ADD and not torch.is_grad_enabled():
            self.counts = self._seen(args[0])
        return func(*args, **(kwargs or {}))

    def _seen(self, old: Tensor) -> tuple[int, int, int]:
        # As deep in calls as the meter's own look, since each call may hold one more reference.
        return _counts(old)
