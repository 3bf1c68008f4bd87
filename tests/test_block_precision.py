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
    """Every tensor's error is at most 1.5 times the naive block's plus the dtype's epsilon."""
    assert list(actual) == list(naive) == list(truth)
    for name, exact in truth.items():
        assert actual[name].dtype == naive[name].dtype, name
        if not exact.dtype.is_floating_point:
            assert torch.equal(actual[name], exact), name
            continue
        ours, theirs = relative_error(actual[name], exact), relative_error(naive[name], exact)
        allowed = 1.5 * theirs + torch.finfo(dtype).eps
        assert ours <= allowed, (
            f"{name}: error {ours:.3g}, naive {theirs:.3g}, allowed {allowed:.3g}"
        )


def assert_training_as_precise(efficient, reference, x, dtype):
    """Compares the errors of outputs, gradients and state dicts after one training step."""
    x = x.clone().requires_grad_()
    upstream = torch.randn(3, 14, *x.shape[2:]).to(dtype)
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
    x = image(dims=dims, dtype=dtype)
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
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_large_mean_is_as_precise_as_the_naive_block(recompute, bn_size, layout, offset):
    efficient, reference = block_pair(bn_size=bn_size, recompute=recompute, dtype=torch.float32)
    x = (image(dtype=torch.float32) + offset).to(memory_format=layout)
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
