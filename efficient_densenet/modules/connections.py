"""Dense connections of people's own: read a list of features, and keep none of what is between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from efficient_densenet.kernels.interface import RELU
from efficient_densenet.modules.calls import BlockCall, check_input
from efficient_densenet.modules.reading import (
    Unit,
    Unsupported,
    read_activation,
    read_conv,
    read_norm,
    unit_of,
)


def recompute_connection(
    features: Sequence[Tensor],
    norm: nn.Module | None,
    activation: Callable[[Tensor], Tensor] | None,
    conv: nn.Module,
) -> Tensor:
    """``conv(activation(norm(torch.cat(features, 1))))``, of which only ``features`` are kept.

    ``features`` are maps ``(N, channels_i, *spatial)`` that their makers keep anyway; the result is
    the convolution's. Concatenation, normalised and rectified map are computed again in the
    backward pass. Running statistics are updated once. Equals, with its gradients, ::

        x = torch.cat(features, 1)
        return conv(activation(norm(x)))

    How: with ``nn.BatchNorm`` (or ``nn.SyncBatchNorm``), ``nn.ReLU`` (or ``F.relu``,
    ``torch.relu``) and a plain ``nn.Conv``, without hooks, by the functions of the dense blocks:
    nothing larger than the concatenation and its gradient exists at a time, and batch statistics
    are kept, not computed again. With any other norm (group, instance, none), activation or
    convolution by checkpointing this part: the result is the same, the peak that of plain autograd
    for this part. A ``SyncBatchNorm`` that is not followed by a ReLU is not recomputed at all,
    since its processes would have to meet again in the backward pass.

    Args:
        features: at least one map; all of one batch and size.
        norm: applied to the concatenation; ``None`` for none.
        activation: a module or function; ``None`` for none.
        conv: what reads the result.

    Raises:
        ValueError: if ``features`` is empty.
    """
    if not features:
        raise ValueError(f"features must be at least one map, got {features!r}")
    features = list(features)
    try:
        unit = _read(features, norm, activation, conv)
    except Unsupported:
        return _checkpointed(features, norm, activation, conv)
    return _by_the_functions_of_blocks(features, unit)


def _read(features: Sequence[Tensor], norm: Any, activation: Any, conv: Any) -> Unit:
    """What the functions of the dense blocks would run."""
    if torch.compiler.is_compiling():
        raise Unsupported("the connection", "is being compiled")
    if norm is None:
        raise Unsupported("the connection", "has no norm")
    function = RELU
    if activation not in (F.relu, torch.relu):
        function = read_activation(activation, "the activation")
    channels = sum(x.shape[1] for x in features)
    whole = features[0].new_empty(()).expand(len(features[0]), channels, *features[0].shape[2:])
    check_input(whole)
    unit = unit_of(read_norm(norm, "the norm"), function, read_conv(conv, "the convolution"))
    BlockCall.of(whole, (), None, "norm", "auto").read_by(unit)
    return unit


def _by_the_functions_of_blocks(features: Sequence[Tensor], unit: Unit) -> Tensor:
    """The exit of a block without layers, of which not even the input is saved."""
    x = torch.cat(list(features), 1)
    # Not the tensor itself, which would live as long as the functions below.
    address, shape, versions = x.data_ptr(), x.shape, [map._version for map in features]

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == address and saved.shape == shape else saved

    def unpack(saved: Tensor | None) -> Tensor:
        if saved is not None:
            return saved
        if [map._version for map in features] != versions:
            raise RuntimeError(
                "a feature of a dense connection has been modified by an inplace operation "
                "before the backward pass"
            )
        return torch.cat([map.detach() for map in features], 1)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return BlockCall.of(x, (), unit, "norm", "auto").run()


def _checkpointed(features: Sequence[Tensor], norm: Any, activation: Any, conv: Any) -> Tensor:
    first = True

    def run(*features: Tensor) -> Tensor:
        nonlocal first
        x = torch.cat(features, 1)
        if norm is not None:
            x = norm(x) if first else _normalised_again(norm, x)
        first = False
        return conv(x if activation is None else activation(x))

    if isinstance(norm, nn.SyncBatchNorm) or not torch.is_grad_enabled():
        return run(*features)
    return checkpoint(run, *features, use_reentrant=False)


def _normalised_again(norm: nn.Module, x: Tensor) -> Tensor:
    """What ``norm`` makes of ``x``; copies of its buffers learn from it, not the buffers."""
    return functional_call(norm, {name: b.clone() for name, b in norm.named_buffers()}, (x,))
