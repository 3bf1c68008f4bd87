"""TF32: what tensor cores drop of float32 is rounded before."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from efficient_densenet.kernels import eager
from efficient_densenet.kernels.triton import launch
from efficient_densenet.kernels.triton import operations as triton
from efficient_densenet.kernels.workspace import Workspace
from support.operations import SHAPES, a_map, a_unit, tails, vectors

SHAPE = SHAPES["many-channels"]
DROPPED = 13


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch, device):
    """Those of a GPU, or the interpreter's made to drop what they drop."""
    monkeypatch.setattr(launch, "rounds_to_tf32", lambda: True)
    if device == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def truncated(handle):
        bits = np.ascontiguousarray(handle.data).view(np.uint32)
        kept = bits >> DROPPED << DROPPED
        return TensorHandle(kept.view(np.float32), handle.dtype.scalar)

    def of_truncated(builder, a, b, *rest):
        if a.data.dtype == np.float32:
            a, b = truncated(a), truncated(b)
        return dot(builder, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", of_truncated)


def to_tf32(values):
    """Rounded to the nearest, ties away from zero."""
    bits = values.float().view(torch.int32)
    return ((bits + (1 << DROPPED - 1)) >> DROPPED << DROPPED).view(torch.float32)


def test_factors_of_product_are_rounded():
    """The product is that of rounded factors; of dropped digits the error would be larger."""
    x = a_map(SHAPE, SHAPE[1], torch.float32, last=True)
    norm_vectors, tail = vectors(4, SHAPE[1]), tails(SHAPE, torch.float32)["1x1-without-bias"]
    workspace = Workspace(x, SHAPE[1], torch.float32, torch.channels_last)
    unit = a_unit(triton, norm_vectors, tail)
    found, _ = triton.forward_unit(x, unit, workspace, need_statistics=False)
    activated = a_unit(eager, norm_vectors, tail._replace(conv=None))
    a, _ = eager.forward_unit(x, activated, workspace, need_statistics=False)
    weight = tail.conv.weight.flatten(1)
    exact = torch.einsum("nkhw,lk->nlhw", a.double(), weight.double())
    rounded = torch.einsum("nkhw,lk->nlhw", to_tf32(a).double(), to_tf32(weight).double())
    error = (rounded - exact).norm()
    assert (found.double() - rounded).norm() < 0.1 * error
    assert (found.double() - exact).norm() < 1.05 * error


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3.4028234e38])
def test_special_values_stay_what_they_are(value):
    """NaN with every bit set too, which one more would make a zero."""
    x = a_map(SHAPE, SHAPE[1], torch.float32, last=True)
    x[0, 0, 0, 0] = value
    if value != value:
        x.view(torch.int32)[0, 0, 0, 0] = 0x7FFFFFFF
    plain = [torch.zeros(SHAPE[1]), torch.ones(SHAPE[1]), None, None]
    tail = tails(SHAPE, torch.float32)["1x1-without-bias"]
    workspace = Workspace(x, SHAPE[1], torch.float32, torch.channels_last)
    found, expected = (
        ops.forward_unit(x, a_unit(ops, plain, tail, eps=0.0), workspace, need_statistics=False)[0]
        for ops in (triton, eager)
    )
    assert_close(found[0, :, 0, 0].isfinite(), expected[0, :, 0, 0].isfinite() & (value < 3e38))
