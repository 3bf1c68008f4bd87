"""Activations by PyTorch's own operators, in place and without autograd.

A derivative is taken of the activated map where that is enough. Otherwise it is taken of the map
before the activation, which the caller has to compute again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet.kernels.interface import Activation

aten = torch.ops.aten


class _Function(NamedTuple):
    """An activation by PyTorch; all three take the activation's parameters last.

    ``apply(x)`` writes into ``x``; ``backward(grad, map)`` writes ``grad * f'`` into ``grad``;
    ``reads_input()`` says whether ``map`` is what was activated, or else the result.
    """

    apply: Callable[..., Tensor]
    backward: Callable[..., Tensor]
    reads_input: Callable[..., bool]


def _always() -> bool:
    return True


def _never() -> bool:
    return False


def _if_negative(parameter: float) -> bool:
    """A result whose sign is no longer the input's does not tell where the input was negative."""
    return parameter < 0


FUNCTIONS = {
    "identity": _Function(lambda x: x, lambda grad, y: grad, _never),
    "relu": _Function(
        Tensor.relu_,
        lambda grad, y: aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad),
        _never,
    ),
    "leaky_relu": _Function(
        aten.leaky_relu_.default,
        lambda grad, map, slope: aten.leaky_relu_backward.grad_input(
            grad, map, slope, not _if_negative(slope), grad_input=grad
        ),
        _if_negative,
    ),
    "elu": _Function(
        aten.elu_.default,
        lambda grad, map, alpha: aten.elu_backward.grad_input(
            grad, alpha, 1, 1, not _if_negative(alpha), map, grad_input=grad
        ),
        _if_negative,
    ),
    "silu": _Function(
        aten.silu_.default,
        lambda grad, x: aten.silu_backward.grad_input(grad, x, grad_input=grad),
        _always,
    ),
    "gelu": _Function(
        lambda x: aten.gelu_.default(x, approximate="none"),
        lambda grad, x: aten.gelu_backward.grad_input(grad, x, approximate="none", grad_input=grad),
        _always,
    ),
    "gelu_tanh": _Function(
        lambda x: aten.gelu_.default(x, approximate="tanh"),
        lambda grad, x: aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad),
        _always,
    ),
}
"""Every activation by its name."""


def activate_(x: Tensor, activation: Activation) -> Tensor:
    """``activation(x)``, in place."""
    return _find(activation).apply(x, *activation.parameters)


def derivative_reads_input(activation: Activation) -> bool:
    """Whether :func:`activate_backward_` takes the map before the activation, not the result."""
    return _find(activation).reads_input(*activation.parameters)


def activate_backward_(grad: Tensor, map: Tensor, activation: Activation) -> Tensor:
    """``grad * activation'``, in place of ``grad``; see :func:`derivative_reads_input`."""
    return _find(activation).backward(grad, map, *activation.parameters)


def _find(activation: Activation) -> _Function:
    if activation.name not in FUNCTIONS:
        raise ValueError(f"activation must be one of {tuple(FUNCTIONS)}, got {activation.name!r}")
    return FUNCTIONS[activation.name]
