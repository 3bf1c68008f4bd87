"""Sums over channels of the eager operations, for widths that the kernels like and do not like."""

import pytest
import torch
from torch.testing import assert_close

from efficient_densenet.kernels import eager
from efficient_densenet.kernels.interface import RELU, Tail, Unit, per_channel
from efficient_densenet.kernels.workspace import Workspace

BATCH, MORE = 4, 20
widths = pytest.mark.parametrize("channels", [1, 5, 12, 48, 129, 132, 136, 256, 300])
sizes = pytest.mark.parametrize("size", [(32, 32), (31, 29), (7, 5)])


def maps(channels, size):
    """A dense map, and the same values as the first channels of a wider one."""
    wide = torch.randn(BATCH, channels + MORE, *size).to(memory_format=torch.channels_last)
    prefix = wide[:, :channels]
    return prefix.contiguous(memory_format=torch.channels_last), prefix


@widths
@sizes
def test_statistics_are_those_in_double_precision(channels, size):
    for x in maps(channels, size):
        var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        found = eager.batch_statistics(x, torch.float32)
        assert_close(found.mean.flatten().double(), mean, rtol=0, atol=1e-6)
        assert_close(found.var.flatten().double(), var, rtol=1e-5, atol=0)


@widths
@sizes
def test_gradients_of_norm_are_those_in_double_precision(channels, size):
    for x in maps(channels, size):
        grad = torch.randn_like(x)
        mean, scale, bias = torch.rand(3, channels)
        norm = eager.Norm(mean, torch.full_like(mean, 2.0), scale, bias - mean * scale)
        unit = Unit(norm, RELU, Tail(None, None, x.dtype), channels)
        workspace = Workspace(x, channels, x.dtype, torch.channels_last)
        found = eager.backward_unit(
            grad,
            x,
            unit,
            workspace,
            need_weight=False,
            need_bias=False,
            need_sums=True,
            target=None,
            accumulate=False,
        )
        dbeta, dgamma = eager.collect(found.sums, unit, 1.0, None, False)
        centred = x.double() - per_channel(mean, x.dim()).double()
        scale, bias = (per_channel(vector, x.dim()) for vector in (scale, bias))
        d = grad.double() * (centred * scale + bias > 0)
        for found_sum, terms in ((dbeta, d), (dgamma, 2.0 * d * centred)):
            error = found_sum.flatten().double() - terms.sum((0, 2, 3))
            assert (error.abs() <= 3e-7 * terms.abs().sum((0, 2, 3))).all()
