"""Your own dense connection: reads a list of features, and keeps nothing in between."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_densenet.functional.connection import connect, connect_opaque
from efficient_densenet.functional.synchronise import joined_count
from efficient_densenet.kernels.interface import RELU
from efficient_densenet.modules.calls import (
    BlockCall,
    check_input,
    check_opaque,
    on_plain_tensors,
    undone_if_unfit,
)
from efficient_densenet.modules.opaque import read_part
from efficient_densenet.modules.reading import (
    Declined,
    Unit,
    Unsupported,
    read_activation,
    read_conv,
    read_norm,
    unit_of,
)
from efficient_densenet.modules.running_statistics import Seen, update_running_statistics

Part = Callable[[Tensor], Tensor]


def recompute_connection(
    features: Sequence[Tensor],
    norm: nn.Module | None,
    activation: Callable[[Tensor], Tensor] | None,
    conv: nn.Module,
) -> Tensor:
    """``conv(activation(norm(torch.cat(features, 1))))``, of which only ``features`` are kept.

    ``features`` are maps ``(N, channels_i, *spatial)``, which the network keeps anyway; the result
    is the convolution's. The concatenation and the normalised map are computed again in the
    backward pass. Running statistics are updated once. Equals, with its gradients, ::

        x = torch.cat(features, 1)
        return conv(activation(norm(x)))

    How: a batch norm of PyTorch's, ReLU, LeakyReLU, ELU, SiLU or GELU, and a convolution of
    PyTorch's, all without hooks, run by the functions of the dense blocks: batch statistics are
    kept, not computed again. Anything else is run again by autograd, on copies of its buffers, in
    the same modes, under the same autocast and with the same random numbers as in the forward pass.

    What cannot be recomputed runs as written above. A warning says why, such as a synchronised norm
    beside an activation that is not known. While being compiled, exported or traced, it always runs
    so, without a warning.

    Args:
        features: at least one map; all have the same batch and size.
        norm: module that is applied to the concatenation; ``None`` for none.
        activation: a module or a function; ``None`` for none.
        conv: module that reads the result; usually a convolution.

    Raises:
        ValueError: if ``features`` is empty.
    """
    if not features:
        raise ValueError(f"features must be at least one map, got {features!r}")
    features = list(features)
    parts = [part for part in (norm, activation, conv) if part is not None]
    try:
        check_input(features[0])
        try:
            unit = _read_unit(norm, activation, conv)
            call = _call_of(features, unit)
        except Unsupported:
            return _run_any(features, parts)
        return on_plain_tensors(lambda *maps: _run_unit(maps, unit, call), *features)
    except Declined:
        pass
    except Unsupported as reason:
        if not torch.compiler.is_compiling():
            warnings.warn(f"recompute_connection is naive, since {reason}", stacklevel=2)
    x = torch.cat(features, 1)
    for part in parts:
        x = part(x)
    return x


def _read_unit(norm: Any, activation: Any, conv: Any) -> Unit:
    """Norm, activation and convolution as the functions of the dense blocks run them."""
    if norm is None:
        raise Unsupported("the connection", "has no norm")
    function = RELU
    if activation not in (F.relu, torch.relu):
        function = read_activation(activation, "the activation")
    return unit_of(read_norm(norm, "the norm"), function, read_conv(conv, "the convolution"))


def _call_of(features: Sequence[Tensor], unit: Unit) -> BlockCall:
    """A block without layers, of which the unit is the exit, on a stand-in for the features."""
    if torch.compiler.is_compiling():
        raise Unsupported("the connection", "is being compiled")
    first, channels = features[0], sum(x.shape[1] for x in features)
    if any(x.dtype != first.dtype for x in features):
        raise Unsupported("the features", "are of several types")
    whole = first.new_empty(()).expand(len(first), channels, *first.shape[2:])
    return BlockCall.of(whole, (), None, "norm", "auto").with_exit(unit)


def _run_unit(maps: Sequence[Tensor], unit: Unit, call: BlockCall) -> Tensor:
    out, statistics = connect(maps, call.spec, unit.tensors)
    count = joined_count(call.x.numel() // call.x.shape[1], call.group, maps[0].device)
    update_running_statistics([Seen(unit.norm, statistics)], count)
    return out


def _run_any(features: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    modules = [part if isinstance(part, nn.Module) else _Function(part) for part in parts]
    chain = nn.Sequential(*modules)
    part = read_part(chain, "the connection", tuple(x.shape[1] for x in features), chain)
    check_opaque(features[0], part)
    with undone_if_unfit(features[0], [part]):
        return on_plain_tensors(
            lambda *maps: connect_opaque(maps, part.spec, part.tensors), *features
        )


class _Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Part) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
