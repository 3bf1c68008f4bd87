"""Rounding: the efficient block is as near to the float64 truth as the naive block is."""

import copy

import pytest
import torch
from compare import KINDS, MODES, assert_efficient, block_pair, image, norms, training_results
from torch import nn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
both_kinds = pytest.mark.parametrize("bn_size", KINDS.values(), ids=KINDS)
either_mode = pytest.mark.parametrize("recompute", MODES)


def truth_of(reference, x, upstream):
    exact = copy.deepcopy(reference).double()
    return training_results(exact, x.detach().double().requires_grad_(), upstream.double()), exact


def relative_error(actual, truth):
    return ((actual.double() - truth).norm() / truth.norm()).item()


def assert_as_precise(actual, naive, truth, dtype):
    """The error is at most 1.5 times the naive block's plus the dtype's epsilon.

    It is the root mean square of the tensors' relative errors: a single small tensor's error is a
    draw of the rounding, and the ratio of two draws says little.
    """
    assert list(actual) == list(naive) == list(truth)
    ours, theirs = [], []
    for name, exact in truth.items():
        assert actual[name].dtype == naive[name].dtype, name
        if not exact.dtype.is_floating_point:
            assert torch.equal(actual[name], exact), name
            continue
        ours.append(relative_error(actual[name], exact))
        theirs.append(relative_error(naive[name], exact))
    error, naive_error = (torch.tensor(errors).square().mean().sqrt() for errors in (ours, theirs))
    allowed = 1.5 * naive_error + torch.finfo(dtype).eps
    assert error <= allowed, f"error {error:.3g}, naive {naive_error:.3g}, by tensor: {ours}"


def assert_training_as_precise(efficient, reference, x, dtype):
    """Compares the errors of outputs, gradients and state dicts after one training step."""
    x = x.detach().clone().requires_grad_()
    upstream = torch.randn(len(x), 14, *x.shape[2:]).to(dtype)
    truth, exact = truth_of(reference, x, upstream)
    ours = training_results(efficient, x, upstream)
    naive = training_results(reference, x, upstream)
    assert_as_precise(ours, naive, truth, dtype)
    states = (block.state_dict() for block in (efficient, reference, exact))
    assert_as_precise(*states, dtype)


@either_mode
@both_kinds
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_step_is_as_precise_as_the_naive_block(recompute, bn_size, dims, dtype):
    efficient, reference = block_pair(bn_size=bn_size, dims=dims, recompute=recompute, dtype=dtype)
    x = image(batch=16, dims=dims, dtype=dtype)
    assert_efficient(efficient, x)
    assert_training_as_precise(efficient, reference, x, dtype)


@either_mode
@both_kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eval_mode_is_as_precise_as_the_naive_block(recompute, bn_size, dtype):
    efficient, reference = block_pair(
        bn_size=bn_size, recompute=recompute, dtype=dtype, change=nn.Module.eval
    )
    assert_training_as_precise(efficient, reference, image(dtype=dtype), dtype)


@either_mode
@both_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_norms_among_half_convolutions_are_as_precise(recompute, bn_size, dtype):
    def change(block):
        for norm in norms(block):
            norm.float()

    efficient, reference = block_pair(
        bn_size=bn_size, recompute=recompute, dtype=dtype, change=change
    )
    assert_training_as_precise(efficient, reference, image(dtype=dtype), dtype)


@either_mode
@both_kinds
@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_large_mean_is_as_precise_as_the_naive_block(recompute, bn_size, offset):
    # In the layout in which a CPU computes inside: PyTorch's other kernels sum in double precision.
    efficient, reference = block_pair(bn_size=bn_size, recompute=recompute, dtype=torch.float32)
    x = (image(dtype=torch.float32) + offset).to(memory_format=torch.channels_last)
    assert_training_as_precise(efficient, reference, x, torch.float32)


@either_mode
@both_kinds
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("half_input", [False, True], ids=["float32-input", "half-input"])
def test_autocast_is_as_precise_as_the_naive_block(recompute, bn_size, half_input, autocast):
    efficient, reference = block_pair(bn_size=bn_size, recompute=recompute, dtype=torch.float32)
    x = image(dtype=autocast if half_input else torch.float32).requires_grad_()
    upstream = torch.randn(3, 14, *x.shape[2:])
    truth, exact = truth_of(reference, x, upstream)
    found = []
    for block in (efficient, reference):
        x.grad = None
        with torch.autocast("cpu", dtype=autocast):
            out = block(x)
        out.backward(upstream.to(out.dtype))
        found.append({"output": out, "gradient of the input": x.grad})
        found[-1] |= {f"gradient of {name}": p.grad for name, p in block.named_parameters()}
    assert_as_precise(*found, truth, autocast)
    states = (block.state_dict() for block in (efficient, reference, exact))
    assert_as_precise(*states, autocast)


@either_mode
def test_autocast_is_entered_by_the_forward_alone(recompute):
    """A backward inside another autocast region computes what it computes outside."""
    efficient, _ = block_pair(recompute=recompute, dtype=torch.float32)
    x = image(dtype=torch.float32).requires_grad_()
    (expected,) = torch.autograd.grad(efficient(x).square().sum(), x)
    loss = efficient(x).square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(loss, x)
    assert torch.equal(found, expected)
