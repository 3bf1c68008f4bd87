"""Activations of the eager operations, against PyTorch's own and autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from efficient_densenet.kernels import eager, workspace
from efficient_densenet.kernels.activations import (
    FUNCTIONS,
    activate_,
    activate_backward_,
    derivative_reads_input,
)
from efficient_densenet.kernels.interface import (
    Activation,
    Conv,
    Geometry,
    Pool,
    Tail,
    Unit,
    per_channel,
)
from efficient_densenet.kernels.workspace import Workspace
from support.activations import ACTIVATIONS

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
POINTWISE = Geometry((1, 1), (0, 0), (1, 1), 1)
PADDED = Geometry((1, 1), (1, 1), (1, 1), 1)
HALVES = Pool("average", (2, 2), (2, 2), (0, 0), (1, 1))
LARGEST = HALVES._replace(kind="maximum")
SPECIAL = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -1e-40, 30.0, -30.0)
LAYOUTS = {"planes": torch.contiguous_format, "channels_last": torch.channels_last}


def test_every_activation_is_tested():
    assert {activation.name for activation, _ in ACTIVATIONS.values()} == set(FUNCTIONS)


def test_unknown_name_is_quoted():
    with pytest.raises(ValueError, match=r"activation must be one of .*, got 'swish'"):
        activate_(torch.ones(1), Activation("swish"))


@every_activation
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_derivatives_are_those_of_pytorch(activation, dtype, layout):
    """Bit for bit, at NaN, infinities, zeros and denormal numbers too."""
    activation, function = ACTIVATIONS[activation]
    x = 3 * torch.randn(4, 5, 7, 6, dtype=dtype)
    x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=dtype)
    x = x.to(memory_format=layout)
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


def tails(leaves, reads):
    one, three = torch.randn(leaves, reads, 1, 1), torch.randn(leaves, reads, 3, 3)
    bias = torch.randn(leaves).double()
    pointwise, padded = Conv(one.double(), bias, POINTWISE), Conv(three.double(), None, PADDED)
    return {
        "1x1": Tail(None, pointwise, torch.float64),
        "3x3": Tail(None, padded, torch.float64),
        "average-1x1": Tail(HALVES, pointwise, torch.float64),
        "maximum": Tail(LARGEST, None, torch.float64),
        "mean": Tail(Pool("all"), None, torch.float64),
    }


def by_autograd(x, mean, scale, bias, function, tail):
    y = function((x - mean) * scale + bias)
    if tail.pool == HALVES:
        y = F.avg_pool2d(y, 2)
    elif tail.pool == LARGEST:
        y = F.max_pool2d(y, 2)
    elif tail.pool:
        y = y.mean((2, 3), keepdim=True)
    if tail.conv:
        y = F.conv2d(y, tail.conv.weight, tail.conv.bias, padding=tail.conv.geometry.padding)
    return y


@every_activation
@pytest.mark.parametrize("samples", [1, 2, 6], ids=lambda n: f"slabs-of-{n}")
@pytest.mark.parametrize("tail", tails(1, 1))
def test_unit_and_its_gradients_are_those_of_autograd(activation, samples, tail, monkeypatch):
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", samples * 8 * 3 * 6 * 6)
    activation, function = ACTIVATIONS[activation]
    tail = tails(2, 3)[tail]
    x = torch.randn(6, 5, 6, 6).double().to(memory_format=torch.channels_last)[:, :3]
    mean, var, gamma, beta = torch.randn(4, 3).double()
    norm = eager.make_norm(per_channel(mean, 4), per_channel(var.abs(), 4), gamma, beta, 1e-3)
    scratch = Workspace(x, 3, torch.float64, torch.channels_last)
    unit = Unit(norm, activation, tail)

    leaf, weight = x.clone().requires_grad_(), None
    if tail.conv:
        weight = tail.conv.weight.clone().requires_grad_()
        tail = tail._replace(conv=tail.conv._replace(weight=weight))
    bias = norm.bias.clone().requires_grad_()
    scale = norm.scale.clone().requires_grad_()
    expected = by_autograd(leaf, norm.mean, scale, bias, function, tail)
    grad = torch.randn_like(expected)
    leaves = [leaf, bias, scale] + [weight] * (weight is not None)
    dx, dbias, dscale, *dweight = torch.autograd.grad(expected, leaves, grad)

    y, _ = eager.forward_unit(x, unit, scratch, need_statistics=False)
    target = torch.full_like(x, 2.0)
    found = eager.backward_unit(
        grad,
        x,
        unit,
        scratch,
        need_weight=weight is not None,
        need_bias=False,
        need_sums=True,
        target=target,
        accumulate=True,
    )
    pairs = [(y, expected), (target - 2.0, dx), (found.sums.d, dbias), (found.sums.dx, dscale)]
    for ours, theirs in pairs + [(found.conv_weight, d) for d in dweight]:
        assert_close(ours, theirs.detach(), rtol=1e-10, atol=1e-10)
