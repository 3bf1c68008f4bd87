"""Dense connections of people's own: read a list of features, and keep none of what is between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from efficient_densenet.modules import calls as stage
from efficient_densenet.modules import reading as lowering
from efficient_densenet.modules.calls import Exit
from efficient_densenet.modules.parts import CONV, NORM


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
    if _is_known(features, norm, activation, conv):
        return _by_the_blocks_functions(features, Exit(norm, None, conv))
    return _checkpointed(features, norm, activation, conv)


def _is_known(features: Sequence[Tensor], norm: Any, activation: Any, conv: Any) -> bool:
    """Whether the functions of the dense blocks can do it."""
    rectifies = activation in (F.relu, torch.relu) or (
        type(activation) is nn.ReLU and not lowering.is_patched(activation)
    )
    channels = sum(x.shape[1] for x in features)
    whole = features[0].new_empty(()).expand(len(features[0]), channels, *features[0].shape[2:])
    return (
        rectifies
        and norm is not None
        and NORM.unsupported(norm) is None
        and CONV.unsupported(conv) is None
        and lowering.has_plain_padding(conv)
        and not torch.compiler.is_compiling()
        and lowering.unsupported_call(whole) is None
        and norm.num_features == channels
        and lowering.unsupported_statistics(whole, [norm]) is None
    )


def _by_the_blocks_functions(features: Sequence[Tensor], exit: Exit) -> Tensor:
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
        return stage.run_layers([], x, "norm", exit)


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
