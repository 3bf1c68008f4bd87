"""NaN, infinities, zeros and denormal numbers, against the eager operations.

The first channel is not normalised, so that what the activation sees is exactly what was put in.
"""

import pytest
import torch
from torch.testing import assert_close

from efficient_densenet.kernels import eager
from efficient_densenet.kernels.interface import RELU, Norm, Statistics, Unit
from efficient_densenet.kernels.triton import operations as triton
from efficient_densenet.kernels.workspace import Workspace
from support.operations import LAYOUTS, SHAPES, a_map, doubled, layout, noted, tails, vectors

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


def a_norm():
    mean, invstd, scale, bias = vectors(4, CHANNELS, 2)
    mean[0], scale[0], bias[0] = 0.0, 1.0, 0.0
    return Norm(mean, invstd.abs() + 1.0, scale, bias)


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
    x, n = special_map(values, dtype, last), a_norm()

    def compute(ops, x, norm, tail):
        workspace = Workspace(x, CHANNELS, norm.mean.dtype, layout(2, last))
        y, statistics = ops.forward_unit(x, Unit(norm, RELU, tail), workspace, need_statistics=True)
        return [y, *statistics]

    for name, tail in tails(SHAPE, dtype).items():
        with noted(name):
            assert_alike(compute, dtype, name.startswith("1x1"), x, n, tail)


@every_value
@every_type
@either_layout
@pytest.mark.parametrize("where", ["map", "gradient"])
def test_unit_backward(where, values, dtype, last):
    ordinary = a_map(SHAPE, CHANNELS, dtype, last)
    x, n = special_map(values, dtype, last) if where == "map" else ordinary, a_norm()

    def compute(ops, grad, x, norm, tail):
        workspace = Workspace(x, CHANNELS, norm.mean.dtype, layout(2, last))
        target = torch.ones_like(x, dtype=norm.mean.dtype)
        weight, bias, sums = ops.backward_unit(
            grad,
            x,
            Unit(norm, RELU, tail),
            workspace,
            need_weight=tail.conv is not None,
            need_bias=tail.conv is not None and tail.conv.bias is not None,
            need_sums=True,
            target=target,
            accumulate=True,
        )
        found = [target, *ops.collect(sums, norm, 1.0, None)]
        return found + [t for t in (weight, bias) if t is not None]

    for name, tail in tails(SHAPE, dtype).items():
        workspace = Workspace(x, CHANNELS, torch.float32, layout(2, last))
        y, _ = eager.forward_unit(ordinary, Unit(n, RELU, tail), workspace, need_statistics=False)
        grad = torch.randn_like(y)
        if where == "gradient":
            for sample, value in enumerate(values):
                grad[sample, 0, 0, 0] = value
        with noted(name):
            assert_alike(compute, dtype, name.startswith("1x1"), grad, x, n, tail)


@every_value
@every_type
@either_layout
def test_appended_map_and_corrected_gradient(values, dtype, last):
    x = special_map(values, dtype, last)
    grad = a_map(SHAPE, CHANNELS, torch.float32, last)
    mean, a, b = vectors(3, CHANNELS, 2)

    def compute(ops, grad, x, mean, a, b):
        place = torch.empty_like(x)
        statistics = Statistics(torch.empty_like(mean), torch.empty_like(mean))
        ops.append(x, place, statistics)
        return [place, *statistics, ops.correct(grad, x, mean, a, b, torch.empty_like(grad))]

    assert_alike(compute, dtype, True, grad, x, mean, a, b)


@pytest.mark.parametrize("tail", ["1x1", "3x3"])
def test_only_what_is_at_most_zero_is_stopped(tail):
    """NaN is not, nor is the smallest number; both zeros are. In all kernels that rectify."""
    values = torch.tensor([torch.nan, 1e-40, 0.0, -0.0, -1e-40, torch.inf])
    x = values.view(1, 1, 1, -1).expand(1, CHANNELS, 1, -1).contiguous()
    one = torch.ones(CHANNELS, 1, 1)
    unit = Unit(Norm(0 * one, one, one, 0 * one), RELU, tails(SHAPE, torch.float32)[tail])
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
