"""Every operator of a training step by itself, with copies of what it was given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from efficient_densenet import DenseNet
from efficient_densenet.kernels.layout import CHANNELS_LAST

NETWORKS = {
    "naive": ({"recompute": "none"}, (4, 2, 24, 24)),
    "ours": ({}, (4, 2, 24, 24)),
    "channels last": ({}, (4, 1, 24, 24)),
    "naive volumes": ({"recompute": "none", "dims": 3}, (4, 2, 12, 12, 12)),
    "volumes, channels last": ({"dims": 3}, (4, 1, 12, 12, 12)),
}
"""Options of a network and the shape of its images. One channel lies in any format."""


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A small one of :data:`NETWORKS`, and its images."""
    options, shape = NETWORKS[name]
    layout = CHANNELS_LAST[len(shape)] if "last" in name else torch.contiguous_format
    model = DenseNet(16, (1, 1), 32, 4, in_channels=shape[1], num_classes=3, **options)
    return model.to(memory_format=layout), torch.randn(shape).contiguous(memory_format=layout)


Call = tuple[OpOverload, tuple[Any, ...], dict[str, Any]]


def operators_of(model: nn.Module, x: Tensor) -> Iterator[Call]:
    """What a forward and a backward pass call, once for each kind of arguments."""
    with _Calls() as calls:
        model(x).float().sum().backward()
    yield from calls.found.values()


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[object, Call] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = (func, *map(_kind, tree_leaves((args, kwargs))))
        if kind not in self.found:
            self.found[kind] = (func, tree_map(_copied, args), tree_map(_copied, kwargs))
        return func(*args, **kwargs)


def _kind(value: object) -> object:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return repr(value)


def _copied(value: object) -> object:
    """A tensor that lies in memory as this one."""
    if not isinstance(value, Tensor):
        return value
    if 0 in value.stride():
        return value.clone()
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return copy.copy_(value)
