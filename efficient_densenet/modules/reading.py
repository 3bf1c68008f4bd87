"""Reads ``nn`` modules as specifications and tensors of the recomputing functions, or says why not.

Modules are read at every call: what has been replaced, frozen, hooked or switched to evaluation
since the last one is seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from efficient_densenet.functional.spec import Types, UnitSpec, UnitTensors
from efficient_densenet.functional.synchronise import group_of
from efficient_densenet.kernels.interface import Geometry, Pool, Statistics

NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONV_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
AVG_POOL_TYPES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
MAX_POOL_TYPES = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
POOL_TYPES = (*AVG_POOL_TYPES, *MAX_POOL_TYPES)
LACKS_VALUES = "there is at most one value per channel to take batch statistics of"
MIXED_GROUPS = "some norms take the statistics of other processes than others do"
COMPILED_GROUP = "norms that synchronise are being compiled"


def unsupported_call(x: Tensor) -> str | None:
    """What about a call on ``x``, whatever its modules, the efficient path does not do."""
    if not isinstance(x, Tensor):
        return f"the input is a {type(x).__name__}"
    if x.numel() == 0:
        return "the batch is empty"
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.jit.is_scripting():
        return "the module is being exported or traced"
    if nn_module._has_any_global_hook():
        return "there are global module hooks"
    return None


def is_patched(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def keeps_size(conv: Any) -> bool:
    """Whether a convolution leaves maps as large as they were."""
    reach = tuple(d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return (
        has_plain_padding(conv)
        and all(stride == 1 for stride in conv.stride)
        and tuple(2 * p for p in conv.padding) == reach
    )


def has_plain_padding(conv: Any) -> bool:
    """Whether a convolution pads with zeros, as many as it says."""
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def is_pointwise(conv: Any) -> bool:
    """Whether a convolution looks at one position at a time, and at all of them."""
    return keeps_size(conv) and all(size == 1 for size in conv.kernel_size)


def is_plain_average(pool: Any) -> bool:
    """Whether a pooling takes the mean of whole windows: it then commutes with a pointwise map."""
    return (
        type(pool) in AVG_POOL_TYPES
        and pool.padding in (0, (0,), (0, 0), (0, 0, 0))
        and not pool.ceil_mode
        and getattr(pool, "divisor_override", None) is None
    )


def uses_batch_statistics(norm: Any) -> bool:
    """Whether a batch norm would normalise with the statistics of its batch."""
    return norm.training or norm.running_mean is None


def process_groups(norms: Iterable[Any]) -> list[Any]:
    """The different process groups over which norms take batch statistics (``None``: of one)."""
    groups: list[Any] = []
    for norm in norms:
        if uses_batch_statistics(norm) and group_of(norm) not in groups:
            groups.append(group_of(norm))
    return groups


def unsupported_statistics(x: Tensor, norms: Iterable[Any]) -> str | None:
    """What about the batch statistics that norms want of maps as large as ``x`` cannot be."""
    groups = process_groups(norms)
    if len(groups) > 1:
        return MIXED_GROUPS
    if groups == [None] and x.numel() <= x.shape[1]:
        return LACKS_VALUES
    if any(groups) and torch.compiler.is_compiling():
        return COMPILED_GROUP
    return None


def types_of(x: Tensor) -> Types:
    """Types in which a call on ``x`` computes and stores, autocast included."""
    compute, device = x.dtype, x.device.type
    if (
        torch.amp.is_autocast_available(device)  # not on meta
        and torch.is_autocast_enabled(device)
        and x.dtype != torch.float64
    ):
        compute = torch.get_autocast_dtype(device)
    return Types(compute, torch.promote_types(x.dtype, compute))


def geometry(conv: Any) -> Geometry:
    """How a convolution module moves."""
    return Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)


def pooling(pool: Any) -> Pool:
    """What an average or maximum pooling module does."""
    dims = POOL_TYPES.index(type(pool)) % 3 + 1
    return Pool(
        "average" if type(pool) in AVG_POOL_TYPES else "maximum",
        _per_dimension(pool.kernel_size, dims),
        _per_dimension(pool.stride, dims),
        _per_dimension(pool.padding, dims),
        _per_dimension(getattr(pool, "dilation", 1), dims),
        pool.ceil_mode,
        getattr(pool, "count_include_pad", True),
        getattr(pool, "divisor_override", None),
    )


def _per_dimension(value: Any, dims: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,) * dims


def unit_spec(norm: Any, conv: Any, pool: Pool | None = None) -> UnitSpec:
    """BN, ReLU, ``pool`` if there is one, and ``conv`` if there is one, as a unit."""
    return UnitSpec(norm.eps, uses_batch_statistics(norm), conv and geometry(conv), pool)


def unit_tensors(norm: Any, conv: Any) -> UnitTensors:
    """The tensors of a norm and of a convolution, if there is one."""
    running_mean = running_var = None
    if not uses_batch_statistics(norm):
        # Copies: the buffers may be written between forward and backward (DDP broadcasts them).
        running_mean, running_var = norm.running_mean.clone(), norm.running_var.clone()
    weight, bias = (conv.weight, conv.bias) if conv else (None, None)
    return UnitTensors(norm.weight, norm.bias, running_mean, running_var, weight, bias)


class Seen(NamedTuple):
    """What a norm saw in a forward pass."""

    norm: Any
    statistics: Statistics | None

    def learns(self) -> bool:
        """Whether the norm has running statistics to update."""
        norm = self.norm
        return norm.training and norm.track_running_stats and norm.running_mean is not None

    def own(self) -> Statistics:
        """The statistics of the channels that the norm reads, as vectors."""
        assert self.statistics is not None
        mean, var = self.statistics.first(self.norm.num_features)
        return Statistics(mean.view(-1), var.view(-1))

    def share(self) -> float | Tensor:
        """The share of this batch in the running statistics; no device is waited for."""
        momentum, batches = self.norm.momentum, self.norm.num_batches_tracked
        if momentum is not None:
            return momentum
        return 0.0 if batches is None else batches.to(self.own().mean.dtype).reciprocal()


@torch.no_grad()
def update_running_statistics(seen: Iterable[Seen], values: int | Tensor) -> None:
    """What ``nn.BatchNorm`` does to its buffers in training, for all norms together.

    A channel had ``values`` values. A norm that was used twice learns twice.
    """
    waiting = [s for s in seen if s.learns()]
    unbiasing = values / (values - 1) if waiting else 1.0
    while waiting:
        now = {id(s.norm): s for s in reversed(waiting)}
        waiting = [s for s in waiting if now[id(s.norm)] is not s]
        trackers = [s.norm.num_batches_tracked for s in now.values()]
        trackers = [tracker for tracker in trackers if tracker is not None]
        if trackers:
            torch._foreach_add_(trackers, 1)
        alike: dict[Any, list[Seen]] = {}
        for number, s in now.items():
            momentum = s.norm.momentum
            key = (number if momentum is None else momentum, s.norm.running_mean.dtype)
            alike.setdefault(key, []).append(s)
        for group in alike.values():
            means, variances = zip(*(s.own() for s in group), strict=True)
            share = group[0].share()
            _follow([s.norm.running_mean for s in group], means, share)
            unbiased = torch._foreach_mul(variances, unbiasing)
            _follow([s.norm.running_var for s in group], unbiased, share)


def _follow(running: list[Tensor], new: tuple[Tensor, ...], share: float | Tensor) -> None:
    if running[0].dtype == new[0].dtype and not isinstance(share, Tensor):
        torch._foreach_lerp_(running, new, share)
    else:
        for old, vector in zip(running, new, strict=True):
            old.copy_(torch.lerp(old.to(vector.dtype), vector, share))
