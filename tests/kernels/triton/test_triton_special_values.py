"""NaN, infinities, zeros and denormal numbers, against the eager operations.

The first channel is not normalised, so that what the activation sees is exactly what was put in.
"""

import pytest
import torch
from torch.testing import assert_close

from efficient_densenet.kernels import eager
from efficient_densenet.kernels.interface import Statistics
from efficient_densenet.kernels.triton import operations as triton
from efficient_densenet.kernels.workspace import Workspace
from support.operations import (
    LAYOUTS,
    SHAPES,
    a_map,
    a_unit,
    doubled,
    finished_gradient,
    layout,
    noted,
    tails,
    vectors,
)

SHAPE = SHAPES["odd"]
CHANNELS = SHAPE[1]
SPECIAL = {
    "nan": [torch.nan],
    "inf": [torch.inf],
    "minus-inf": [-torch.inf],
    "both-infs": [torch.inf, -torch.inf],
    "zeros": [0.0, -0.0],
    "denormals": [1e-40, -1e-40],
}
every_value = pytest.mark.parametrize("values", SPECIAL.values(), ids=SPECIAL)
either_layout = pytest.mark.parametrize("last", LAYOUTS.values(), ids=LAYOUTS)
every_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def special_map(values, dtype, last):
    """A map with these values in its first channel, one in each sample, and in its last."""
    x = a_map(SHAPE, CHANNELS, dtype, last)
    for sample, value in enumerate(values):
        x[sample, 0, 3, 2] = value
        x[-1, -1, 6, sample] = value
    return x


def norm_vectors():
    """Mean, variance, γ and β."""
    mean, var, gamma, beta = vectors(4, CHANNELS)
    mean[0], var[0], gamma[0], beta[0] = 0.0, 1.0, 1.0, 0.0
    return [mean, var.abs() + 0.1, gamma, beta]


def arriving(norm, tail, dtype, last, values):
    """A gradient of what a unit leaves, with these values in it, one in each sample."""
    x = a_map(SHAPE, CHANNELS, dtype, last)
    workspace = Workspace(x, CHANNELS, torch.float32, layout(2, last))
    unit = a_unit(eager, norm, tail, eps=0.0)
    grad = torch.randn_like(eager.forward_unit(x, unit, workspace, need_statistics=False)[0])
    for sample, value in enumerate(values):
        grad[sample, 0, 0, 0] = value
    return grad


def assert_alike(compute, dtype, exact, *inputs):
    """NaN, infinities and all else are where the eager operations have them.

    Those are exact in float64. In other types PyTorch's convolutions on a CPU multiply zeros that
    pad channels or borders with what lies there: then the same convolution is in both results.
    """
    ours = compute(triton, *inputs)
    truth = compute(eager, *(map(doubled, inputs) if exact else inputs))
    tolerance = 32 * torch.finfo(dtype).eps
    for i, (found, expected) in enumerate(zip(ours, truth, strict=True)):
        with noted(f"result {i}"):
            finite = expected[expected.isfinite()]
            scale = finite.abs().max().item() if finite.numel() else 1.0
            bound = tolerance * max(scale, 1.0)
            assert_close(found.double(), expected.double(), rtol=0, atol=bound, equal_nan=True)


@every_value
@every_type
@either_layout
def test_unit_forward(values, dtype, last):
    x, n = special_map(values, dtype, last), norm_vectors()

    def compute(ops, x, tail, *norm):
        workspace = Workspace(x, CHANNELS, norm[0].dtype, layout(2, last))
        unit = a_unit(ops, norm, tail, eps=0.0)
        y, statistics = ops.forward_unit(x, unit, workspace, need_statistics=True)
        return [y, *statistics]

    for name, tail in tails(SHAPE, dtype).items():
        with noted(name):
            assert_alike(compute, dtype, name.startswith("1x1"), x, tail, *n)


@every_value
@every_type
@either_layout
@pytest.mark.parametrize("where", ["map", "gradient"])
def test_unit_backward(where, values, dtype, last):
    x, n = special_map(values if where == "map" else (), dtype, last), norm_vectors()

    def compute(ops, grad, x, tail, *norm):
        workspace = Workspace(x, CHANNELS, norm[0].dtype, layout(2, last))
        unit, target = a_unit(ops, norm, tail, eps=0.0), torch.ones_like(x, dtype=norm[0].dtype)
        weight, bias, sums, _ = ops.backward_unit(
            grad,
            x,
            unit,
            workspace,
            need_weight=tail.conv is not None,
            need_bias=tail.conv is not None and tail.conv.bias is not None,
            need_sums=True,
            target=target,
            accumulate=True,
        )
        gradients = ops.collect(sums, unit, 1.0, None, False)
        found = [target, *(gradient.flatten() for gradient in gradients)]
        return found + [t for t in (weight, bias) if t is not None]

    for name, tail in tails(SHAPE, dtype).items():
        grad = arriving(n, tail, dtype, last, values if where == "gradient" else ())
        with noted(name):
            assert_alike(compute, dtype, name.startswith("1x1"), grad, x, tail, *n)


@every_value
@every_type
@either_layout
def test_appended_map_and_corrected_gradient(values, dtype, last):
    x = special_map(values, dtype, last)
    grad = a_map(SHAPE, CHANNELS, torch.float32, last)
    mean, a, b = vectors(3, CHANNELS)

    def compute(ops, grad, x, mean, a, b):
        place = torch.empty_like(x)
        statistics = Statistics(torch.empty_like(mean), torch.empty_like(mean))
        ops.append(x, place, 0, statistics)
        channels, out = slice(0, CHANNELS), torch.empty_like(grad)
        return [place, *statistics, ops.correct(grad, x, channels, mean, a, b, out)]

    assert_alike(compute, dtype, True, grad, x, mean, a, b)


@every_value
@every_type
@either_layout
@pytest.mark.parametrize("where", ["map", "gradient"])
def test_gradient_that_waits(where, values, dtype, last):
    """Infinite sums are another test's: here the batch terms are finite."""
    x, n = special_map(values if where == "map" else (), dtype, last), norm_vectors()

    def compute(ops, grad, x, tail, a, b, *norm):
        workspace = Workspace(x, CHANNELS, norm[0].dtype, layout(2, last))
        unit = a_unit(ops, norm, tail, eps=0.0)
        return finished_gradient(ops, grad, x, unit, workspace, norm[0], a, b)

    waiting = {name: tail for name, tail in tails(SHAPE, dtype).items() if "1x1" not in name}
    for name, tail in waiting.items():
        grad = arriving(n, tail, dtype, last, values if where == "gradient" else ())
        with noted(name):
            assert_alike(compute, dtype, False, grad, x, tail, *vectors(2, CHANNELS), *n)


@pytest.mark.parametrize("tail", ["1x1", "3x3"])
def test_only_what_is_at_most_zero_is_stopped(tail):
    """NaN is not, nor is the smallest number; both zeros are. In all kernels that rectify."""
    values = torch.tensor([torch.nan, 1e-40, 0.0, -0.0, -1e-40, torch.inf])
    x = values.view(1, 1, 1, -1).expand(1, CHANNELS, 1, -1).contiguous()
    one = torch.ones(CHANNELS)
    plain = (0 * one, one, None, None)
    unit = a_unit(triton, plain, tails(SHAPE, torch.float32)[tail], eps=0.0)
    workspace = Workspace(x, CHANNELS, torch.float32, torch.contiguous_format)
    target = torch.empty_like(x)
    triton.backward_unit(
        torch.ones(1, SHAPE[2], 1, len(values)),
        x,
        unit,
        workspace,
        need_weight=False,
        need_bias=False,
        need_sums=False,
        target=target,
        accumulate=False,
    )
    passed = (target != 0).all((0, 1, 2))
    assert passed.tolist() == [True, True, False, False, False, True]
