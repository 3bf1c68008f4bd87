"""Activations of the eager operations, against PyTorch's own and autograd."""

import pytest
import torch
from torch.testing import assert_close

from efficient_densenet.kernels import eager, workspace
from efficient_densenet.kernels.activations import (
    FUNCTIONS,
    activate_,
    activate_backward_,
    derivative_reads_input,
)
from efficient_densenet.kernels.interface import Activation
from efficient_densenet.kernels.workspace import Workspace
from support.activations import ACTIVATIONS
from support.operations import LAYOUTS, SHAPES, a_map, a_unit, layout, naive_unit, tails, vectors

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
SHAPE = SHAPES["odd"]
SPECIAL = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -1e-40, 30.0, -30.0)


def test_every_activation_is_tested():
    assert {activation.name for activation, _ in ACTIVATIONS.values()} == set(FUNCTIONS)


def test_unknown_name_is_quoted():
    with pytest.raises(ValueError, match=r"activation must be one of .*, got 'swish'"):
        activate_(torch.ones(1), Activation("swish"))


@every_activation
@pytest.mark.parametrize("last", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_derivatives_are_those_of_pytorch(activation, dtype, last):
    """Bit for bit, at NaN, infinities, zeros and denormal numbers too."""
    activation, function = ACTIVATIONS[activation]
    x = 3 * torch.randn(4, 5, 7, 6, dtype=dtype)
    x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=dtype)
    x = x.to(memory_format=layout(2, last))
    grad = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    (expected,) = torch.autograd.grad(y, leaf, grad)

    found = activate_(x.clone(), activation)
    assert_close(found, y.detach(), rtol=0, atol=0, equal_nan=True)

    map = x if derivative_reads_input(activation) else found
    tolerance = torch.finfo(dtype).eps * 2 if activation.name == "elu" else 0.0
    found = activate_backward_(grad.clone(), map, activation)
    assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@every_activation
@pytest.mark.parametrize("samples", [1, 2, 3], ids=lambda n: f"slabs-of-{n}")
@pytest.mark.parametrize("tail", tails(SHAPE, torch.float64))
def test_unit_and_its_gradients_are_those_of_autograd(activation, samples, tail, monkeypatch):
    batch, channels, *_ = SHAPE
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", samples * channels * 8 * 7 * 5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    activation, function = ACTIVATIONS[activation]
    tail = tails(SHAPE, torch.float64)[tail]
    x = a_map(SHAPE, channels, torch.float64, last=True)
    mean, var, gamma, beta = (v.double() for v in vectors(4, channels))
    unit = a_unit(eager, (mean, var, gamma, beta), tail, activation)
    scratch = Workspace(x, channels, torch.float64, torch.channels_last)
    assert len(list(scratch.slabs(x))) == -(-batch // samples)
    convs = [t.requires_grad_() for t in tail.conv[:2] if t is not None] if tail.conv else []
    leaves = [t.clone().requires_grad_() for t in (x, gamma, beta)]
    scale = leaves[1] * unit.norm.invstd
    expected = naive_unit(leaves[0], mean, scale, leaves[2], function, tail)
    grad = torch.randn_like(expected)
    dx, dgamma, dbeta, *dconv = torch.autograd.grad(expected, leaves + convs, grad)

    target = torch.full_like(x, 2.0)
    with torch.no_grad():
        y, _ = eager.forward_unit(x, unit, scratch, need_statistics=False)
        found = eager.backward_unit(
            grad,
            x,
            unit,
            scratch,
            need_weight=len(convs) > 0,
            need_bias=len(convs) > 1,
            need_sums=True,
            target=target,
            accumulate=True,
        )
    ours = [y, target - 2.0, *found.sums]
    ours += [t for t in (found.conv_weight, found.conv_bias) if t is not None]
    for actual, truth in zip(ours, [expected, dx, dbeta, dgamma, *dconv], strict=True):
        assert_close(actual, truth.detach(), rtol=1e-10, atol=1e-10)
