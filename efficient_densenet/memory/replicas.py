"""A model in ``DistributedDataParallel``, as one process runs it, with or without the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map


class Replica(nn.Module):
    """One process's part of a wrapped model: what is wrapped, alone.

    Attributes:
        module: what is wrapped, under the name that it has in the wrapper.
        exchanged: the parameters whose gradients go through the wrapper's buckets.
        views: whether gradients are views of the buckets.
        copies: whether the output is copied.
    """

    def __init__(
        self, module: nn.Module, exchanged: list[nn.Parameter], views: bool, copies: bool
    ) -> None:
        super().__init__()
        self.module = module
        self.exchanged, self.views, self.copies = exchanged, views, copies

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.module(*args, **kwargs)
        return tree_map(_copied, output) if self.copies else output

    def move_gradients(self) -> None:
        """From now on a gradient is moved into a bucket when it is there, if they are views."""
        for parameter in self.exchanged if self.views else ():
            parameter.register_post_accumulate_grad_hook(_moving_into(torch.empty_like(parameter)))


def why_wrapper_unknown(model: nn.Module) -> str | None:
    """What the memory of a wrapper in ``model`` depends on and is not known, as a noun."""
    for wrapper in _wrappers(model):
        if getattr(wrapper, "_comm_hooks", ()):
            return "a communication hook, or mixed_precision"
        if getattr(wrapper, "_delay_all_reduce_params", ()):
            return "delay_all_reduce_named_params"
        if getattr(wrapper, "batched_grad_copy", False):
            return "batched_grad_copy"
    return None


def replace_wrappers(model: nn.Module, memo: dict[int, object]) -> None:
    """Let ``copy.deepcopy(model, memo)`` have a :class:`Replica` in the place of each wrapper."""
    for wrapper in _wrappers(model):
        exchanged = copy.deepcopy(_exchanged(wrapper), memo)
        copies = wrapper.find_unused_parameters and not wrapper.static_graph
        module = copy.deepcopy(wrapper.module, memo)
        replica = Replica(module, exchanged, wrapper.gradient_as_bucket_view, copies)
        replica.training = wrapper.training
        memo[id(wrapper)] = replica


def steps_to_settle(model: nn.Module) -> int:
    """Steps after which buckets stay: after some, wrappers allocate them anew in another order."""
    wrappers = list(_wrappers(model))
    return max((3 if wrapper.static_graph else 2 for wrapper in wrappers), default=1)


def allot_buckets(model: nn.Module) -> Tensor:
    """A tensor without values as large as the buckets of all wrappers in ``model``.

    A real wrapper's own cannot be had. A :class:`Replica` begins to move gradients into its own.
    """
    size = 0
    for module in model.modules():
        if isinstance(module, (Replica, DistributedDataParallel)):
            size += sum(p.numel() * p.itemsize for p in _exchanged(module))
        if isinstance(module, Replica):
            module.move_gradients()
    return torch.empty(size, dtype=torch.uint8, device="meta")


def _wrappers(model: nn.Module) -> Iterator[DistributedDataParallel]:
    return (module for module in model.modules() if isinstance(module, DistributedDataParallel))


def _exchanged(module: Replica | DistributedDataParallel) -> list[nn.Parameter]:
    if isinstance(module, Replica):
        return module.exchanged
    named = module.module.named_parameters()
    ignored = module.parameters_to_ignore
    return [p for name, p in named if p.requires_grad and name not in ignored]


def _moving_into(view: Tensor) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        parameter.grad = view

    return move


def _copied(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) and value.requires_grad else value
