"""Operators on tensors without values, with the shapes of results cached.

PyTorch takes up to milliseconds to find the shape of a result, and a deep network asks for the same
ones again and again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)

from efficient_densenet.kernels.layout import is_hollow, outer_format
from efficient_densenet.memory.convolutions import result_format

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]
Result = Any
"""What an operator returns: tensors, numbers, or tuples and lists of them."""

_BATCH_NORM = torch.ops.aten.native_batch_norm.default
_BATCH_NORM_BACKWARD = torch.ops.aten.native_batch_norm_backward.default
_CONVOLUTION = torch.ops.aten.convolution.default
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
_ELEMENTWISE = {
    torch.ops.aten.add.Tensor,
    torch.ops.aten.addcmul.default,
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.ones_like.default,
    torch.ops.aten.threshold_backward.default,
    torch.ops.aten.zeros_like.default,
}


_LOSSES_IN_FULL = {
    torch.ops.aten.binary_cross_entropy.default,
    torch.ops.aten.mse_loss.default,
    torch.ops.aten.smooth_l1_loss.default,
    torch.ops.aten.soft_margin_loss.default,
}
"""Losses whose result, a scalar, stays in the storage of the values that were reduced."""


class Operators:
    """Runs operators; for hollow tensors of shapes seen before, makes the result from the cache.

    Shape, strides, type and device are those that the operator returned the first time.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], _Form] = {}

    def run(self, func: OpOverload, args: Arguments, kwargs: Keywords) -> tuple[Result, bool]:
        """What ``func`` returns, and whether all of that is known to be in storage of its own."""
        if not _only_reads(func):
            return func(*args, **kwargs), False
        some = next(tensors_of(args), None)
        if some is not None and not is_hollow(some):
            return func(*args, **kwargs), False
        signature = (func, _signature(args), _signature(kwargs.items()))
        form = self._known.get(signature)
        if form is not None:
            return form.make(), True
        result = _run(func, args, kwargs)
        form = _form(result, args, kwargs)
        if form is not None:
            self._known[signature] = form
        return result, form is not None


def view(func: OpOverload, args: Arguments, kwargs: Keywords) -> Result:
    """What ``func`` returns, an operator that returns nothing but views of its first argument."""
    of = args[0]
    if type(of) is not FakeTensor:
        return func(*args, **kwargs)
    # As the mode does it, which first takes many times as long to know what it has seen before.
    mode, device = of.fake_mode, of.fake_device
    with in_kernel_invocation_manager(mode):
        result = func(*args, **kwargs)
    if isinstance(result, Tensor):
        return FakeTensor(mode, result, device)
    return [FakeTensor(mode, part, device) for part in result]


class _Part(NamedTuple):
    """The form of one tensor: on ``meta``, or a fake one of a ``mode`` that says ``device``."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    mode: FakeTensorMode | None

    def make(self) -> Tensor:
        # Not by the mode, which takes many times as long.
        with torch._C._DisableTorchDispatch():
            made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return made if self.mode is None else FakeTensor(self.mode, made, self.device)


class _Form(NamedTuple):
    """The kind of a result, ``None`` for a tensor, and the form of its tensors."""

    kind: type | None
    parts: list[_Part | None]

    def make(self) -> Result:
        made = [None if part is None else part.make() for part in self.parts]
        return made[0] if self.kind is None else self.kind(made)


def tensors_of(values: Iterable[object]) -> Iterator[Tensor]:
    """All tensors among ``values``, in lists and tuples too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)


@cache
def _only_reads(func: OpOverload) -> bool:
    """Whether an operator writes into no argument and returns none, by its schema."""
    schema = func._schema
    return all(value.alias_info is None for value in (*schema.arguments, *schema.returns))


def _signature(values: Iterable[object]) -> tuple[object, ...]:
    return tuple([_described(value) for value in values])


def _described(value: object) -> object:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return _signature(value)
    return type(value), value  # 1, 1.0 and True are equal, but their results are not


def _form(result: Result, args: Arguments, kwargs: Keywords) -> _Form | None:
    """The form of ``result`` if all its tensors are hollow and fill their own storages."""
    tensors = [result] if isinstance(result, Tensor) else result
    if not isinstance(tensors, (list, tuple)):
        return None
    older = {_storage(tensor) for tensor in tensors_of((args, tuple(kwargs.values())))}
    parts: list[_Part | None] = []
    for tensor in tensors:
        part = None if tensor is None else _part(tensor)
        if tensor is not None and (part is None or _storage(tensor) in older):
            return None
        parts.append(part)
    return _Form(None if isinstance(result, Tensor) else type(result), parts)


def _part(tensor: object) -> _Part | None:
    """The form of a tensor that has no value and fills its storage."""
    mode = None
    if type(tensor) is FakeTensor and tensor.constant is None:
        mode = tensor.fake_mode
    elif type(tensor) is not Tensor or not tensor.is_meta:
        return None
    part = _Part(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, mode)
    filled = part.make().untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
    return part if filled else None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _run(func: OpOverload, args: Arguments, kwargs: Keywords) -> Result:
    """What ``func`` returns; corrected where PyTorch is slow or wrong about it."""
    if func in _ELEMENTWISE:
        like = _common(args, kwargs)
        return func(*args, **kwargs) if like is None else torch.empty_like(like)
    if func is _BATCH_NORM and is_hollow(args[0]) and args[5]:
        return _batch_norm(*args)
    if func is _BATCH_NORM_BACKWARD and is_hollow(args[0]):
        return _batch_norm_gradients(*args)
    result = func(*args, **kwargs)
    if func in _LOSSES_IN_FULL and is_hollow(result) and result.dim() == 0:
        # On meta the storage is a scalar's.
        shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
        return result.new_empty(shape).as_strided((), ())
    if func is _CONVOLUTION and is_hollow(result):
        # On meta it is contiguous.
        return torch.empty_like(result, memory_format=result_format(*args))
    if func is _CONVOLUTION_BACKWARD and is_hollow(args[0]) and result[0] is not None:
        # Nor is the gradient of its input always as on meta.
        dx = torch.empty_like(result[0], memory_format=result_format(*args[1:-1]))
        return dx, *result[1:]
    return result


def _common(args: Arguments, kwargs: Keywords) -> Tensor | None:
    """The first of the operands if all have one form, so that the result has it, too."""
    # Tells what torch takes a tenth of a millisecond to find.
    first, *others = tensors_of(args)
    plain = first.is_floating_point() and first.is_contiguous(memory_format=outer_format(first))
    form = (first.shape, first.stride(), first.dtype)
    same = all((t.shape, t.stride(), t.dtype) == form for t in others)
    numbers = all(
        value is None or isinstance(value, (bool, int, float)) for value in kwargs.values()
    )
    return first if plain and same and numbers else None


def _batch_norm(x: Tensor, weight: Tensor | None, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    # In training. On meta torch takes three milliseconds.
    vector = x.new_empty(x.shape[1]) if weight is None else weight
    return torch.empty_like(x), torch.empty_like(vector), torch.empty_like(vector)


def _batch_norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, *rest: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    # On meta torch takes a millisecond, and makes gradients that its output mask declines.
    vector = x.new_empty(x.shape[1]) if weight is None else weight
    made = (torch.empty_like(x), torch.empty_like(vector), torch.empty_like(vector))
    return tuple(g if wanted else None for g, wanted in zip(made, rest[-1], strict=True))
