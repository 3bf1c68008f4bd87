"""Units on maps that lie as few maps do: off alignment, expanded, of one position or sample."""

from functools import partial

import pytest
import torch

from efficient_densenet.kernels import eager
from efficient_densenet.kernels.triton import operations as triton
from efficient_densenet.kernels.workspace import Workspace
from support.operations import a_unit, assert_as_precise_as_eager, noted, tails, vectors

LEAVES = 4


def off_alignment(x, values):
    """The same map, so many values behind where memory begins."""
    memory = torch.empty(x.numel() + values, dtype=x.dtype)
    return memory[values:].as_strided(x.shape, x.stride()).copy_(x)


def shifted(values):
    return partial(off_alignment, values=values)


def as_it_is(x):
    return x


def one_value(x):
    return x[:1, :1, :1, :1].expand_as(x)


def one_of_each_sample(x):
    return x[:, :1, :1, :1].expand_as(x)


def one_of_each_channel(x):
    return x[:1, :, :1, :1].expand_as(x)


# Of each case the shape of the map, how it lies, and how the arriving gradient lies.
CASES = {
    **{f"off-by-{2 * n}-bytes": ((2, 12, 4, 5), shifted(n), shifted(n)) for n in (1, 2, 3, 4, 6)},
    "gradient-of-one-value": ((2, 12, 4, 5), as_it_is, one_value),
    "gradient-of-samples": ((3, 12, 4, 5), as_it_is, one_of_each_sample),
    "gradient-of-channels": ((2, 12, 4, 5), as_it_is, one_of_each_channel),
    "one-position": ((5, 12, 1, 1), as_it_is, as_it_is),
    "one-sample": ((1, 12, 4, 5), as_it_is, as_it_is),
    "16-of-all": ((16, 16, 4, 4), as_it_is, as_it_is),
    "17-of-all": ((1, 17, 17, 1), as_it_is, as_it_is),
    "64-and-one-row": ((5, 33, 13, 1), as_it_is, as_it_is),
}


@pytest.mark.parametrize(("shape", "lies", "arrives"), CASES.values(), ids=CASES)
def test_units_are_as_precise_as_eager(shape, lies, arrives):
    samples, channels, *spatial = shape
    norm_vectors = vectors(4, channels)
    x = lies(torch.randn(shape).bfloat16().to(memory_format=torch.channels_last))
    total = torch.randn(shape).to(memory_format=torch.channels_last)
    cases = tails((samples, channels, LEAVES, tuple(spatial)), torch.bfloat16)

    def compute(ops, x, total, grad, tail, *norm_vectors):
        target = lies(total.clone())
        unit = a_unit(ops, norm_vectors, tail)
        workspace = Workspace(x, channels, norm_vectors[0].dtype, torch.channels_last)
        y, statistics = ops.forward_unit(x, unit, workspace, need_statistics=True)
        weight, _, sums, _ = ops.backward_unit(
            grad,
            x,
            unit,
            workspace,
            need_weight=True,
            need_bias=False,
            need_sums=True,
            target=target,
            accumulate=True,
        )
        gradients = ops.collect(sums, unit, 0.1, None, False)
        return [y, *statistics, target, weight.to(norm_vectors[0].dtype), *gradients]

    for name in ("1x1", "3x3"):
        tail, unit = cases[name], a_unit(eager, norm_vectors, cases[name])
        workspace = Workspace(x, channels, torch.float32, torch.channels_last)
        y, _ = eager.forward_unit(x, unit, workspace, need_statistics=False)
        grad = arrives(torch.randn_like(y))
        with noted(name):
            inputs = (x, total, grad, tail, *norm_vectors)
            assert_as_precise_as_eager(triton, compute, torch.bfloat16, *inputs)
