"""Reads ``nn`` modules as specifications and tensors of the recomputing functions, or says why not.

Modules are read at every call: what has been replaced, frozen, hooked or switched to evaluation
since the last one is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from efficient_densenet.kernels.interface import Geometry, Statistics
from efficient_densenet.spec import Types, UnitSpec, UnitTensors

NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONV_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
AVG_POOL_TYPES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
MAX_POOL_TYPES = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
POOL_TYPES = (*AVG_POOL_TYPES, *MAX_POOL_TYPES)
LACKS_VALUES = "there is at most one value per channel to take batch statistics of"
KNOWN_TYPES = (*NORM_TYPES, *CONV_TYPES, *POOL_TYPES, nn.ReLU)


def unsupported_call(x: Tensor) -> str | None:
    """What about a call on ``x``, whatever its modules, the efficient path does not do."""
    if x.numel() == 0:
        return "the batch is empty"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.jit.is_scripting():
        return "the module is being compiled, exported or traced"
    if nn_module._has_any_global_hook():
        return "there are global module hooks"
    return None


def unsupported_children(module: nn.Module) -> str | None:
    """What child the efficient path cannot stand in for, as the end of a sentence about it."""
    for name, child in module.named_children():
        if type(child) not in KNOWN_TYPES:
            return f".{name} is a {type(child).__name__}"
        if is_patched(child):
            return f".{name} has hooks or a forward of its own"
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


def lacks_values(x: Tensor, norms: Iterable[Any]) -> bool:
    """Whether a map has too few values per channel for the batch statistics that norms want."""
    return x.numel() <= x.shape[1] and any(map(uses_batch_statistics, norms))


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


def unit_spec(norm: Any, conv: Any, pool: Callable[[Tensor], Tensor] | None = None) -> UnitSpec:
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


@torch.no_grad()
def update_running_statistics(norm: Any, batch: Statistics | None, count: int) -> None:
    """What ``nn.BatchNorm`` does to its buffers in training, with ``count`` values per channel."""
    if not (norm.training and norm.track_running_stats) or norm.running_mean is None:
        return
    assert batch is not None
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    mean, var = batch.first(norm.num_features)
    unbiased = var * (count / (count - 1))
    for running, new in (
        (norm.running_mean, mean.flatten()),
        (norm.running_var, unbiased.flatten()),
    ):
        if running.dtype == new.dtype:
            running.lerp_(new, momentum)
        else:
            running.copy_(torch.lerp(running.to(new.dtype), new, momentum))
