"""Shape-only copies of models and tensors: same shapes, types and strides, no values."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from efficient_densenet.memory.replicas import replace_wrappers
from efficient_densenet.memory.sharding import replace_sharded


def copy_hollow(model: nn.Module, device: torch.device) -> nn.Module:
    """Deep copy of ``model`` whose tensors are uninitialised, on ``device``.

    Of a model in ``DistributedDataParallel`` or after ``fully_shard`` one that needs no other
    process; of a compiled one what was compiled, since a compiler may run nothing without values.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = hollow_parameter(parameter, device)
    plain = (value for module in model.modules() for value in vars(module).values())
    for value in (*model.buffers(), *plain):
        if isinstance(value, Tensor):
            memo.setdefault(id(value), empty_like(value, device))
    replace_wrappers(model, memo)
    replace_sharded(model, memo)
    for module in reversed(list(model.modules())):
        if "_orig_mod" in module._modules:
            memo[id(module)] = copy.deepcopy(module._orig_mod, memo)
    return copy.deepcopy(model, memo)


def hollow_parameter(parameter: nn.Parameter, device: torch.device | str) -> nn.Parameter:
    """An uninitialised parameter like ``parameter``, on ``device``."""
    return nn.Parameter(empty_like(parameter, device), requires_grad=parameter.requires_grad)


def empty_like(tensor: Tensor, device: torch.device | str) -> Tensor:
    """An uninitialised tensor on ``device`` with the shape and strides of ``tensor``."""
    # Not torch.empty_like: inside FakeTensorMode it would refuse a real tensor.
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
