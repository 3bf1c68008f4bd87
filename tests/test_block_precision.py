"""Rounding: the efficient block is as near to the float64 truth as the naive block is."""

import copy
import statistics

import pytest
import torch
from compare import KINDS, MODES, assert_efficient, block_pair, image, norms, training_results
from torch import nn

DRAWS = 9
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
both_kinds = pytest.mark.parametrize("bn_size", KINDS.values(), ids=KINDS)
either_mode = pytest.mark.parametrize("recompute", MODES)


def truth_of(reference, x, upstream):
    exact = copy.deepcopy(reference).double()
    return training_results(exact, x.detach().double().requires_grad_(), upstream.double()), exact


def relative_error(actual, truth):
    difference, size = (actual.double() - truth).norm(), truth.norm()
    return (difference / size).item() if size else difference.item()


def root_mean_square_error(results, truth):
    """Of the tensors' relative errors; what is no floating point must be equal."""
    assert list(results) == list(truth)
    errors = []
    for name, exact in truth.items():
        if exact.dtype.is_floating_point:
            errors.append(relative_error(results[name], exact))
        else:
            assert torch.equal(results[name], exact), name
    return torch.tensor(errors).square().mean().sqrt().item()


def assert_as_precise(draws, dtype):
    """The median error is at most 1.5 times the naive block's plus the dtype's epsilon.

    Of several draws, since a single value that rounding lifts over a rectifier's threshold changes
    a small gradient by percents. A draw is ``(ours, naive, truth)``.
    """
    for ours, naive, _ in draws:
        assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in naive.items()}
    ours, naive = (
        statistics.median(root_mean_square_error(draw[i], draw[2]) for draw in draws)
        for i in (0, 1)
    )
    allowed = 1.5 * naive + torch.finfo(dtype).eps
    assert ours <= allowed, f"error {ours:.3g}, naive {naive:.3g}, allowed {allowed:.3g}"


def assert_training_as_precise(efficient, reference, draw_input, dtype):
    """Compares the errors of outputs, gradients and state dicts after one training step."""
    shape = copy.deepcopy(reference)(draw_input()).shape[1:]
    results, states = [], []
    for _ in range(DRAWS):
        x = draw_input().requires_grad_()
        blocks = copy.deepcopy((efficient, reference))
        upstream = torch.randn(len(x), *shape).to(dtype)
        truth, exact = truth_of(reference, x, upstream)
        results.append((*(training_results(block, x, upstream) for block in blocks), truth))
        states.append([block.state_dict() for block in (*blocks, exact)])
    assert_as_precise(results, dtype)
    assert_as_precise(states, dtype)


@either_mode
@both_kinds
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_step_is_as_precise_as_the_naive_block(recompute, bn_size, dims, dtype):
    efficient, reference = block_pair(bn_size=bn_size, dims=dims, recompute=recompute, dtype=dtype)
    assert_efficient(efficient, image(dims=dims, dtype=dtype))
    assert_training_as_precise(
        efficient, reference, lambda: image(batch=8, dims=dims, dtype=dtype), dtype
    )


@either_mode
@both_kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eval_mode_is_as_precise_as_the_naive_block(recompute, bn_size, dtype):
    efficient, reference = block_pair(
        bn_size=bn_size, recompute=recompute, dtype=dtype, change=nn.Module.eval
    )
    assert_training_as_precise(efficient, reference, lambda: image(dtype=dtype), dtype)


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
    assert_training_as_precise(efficient, reference, lambda: image(dtype=dtype), dtype)


@either_mode
@both_kinds
@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_large_mean_is_as_precise_as_the_naive_block(recompute, bn_size, offset):
    # In the layout in which a CPU computes inside: PyTorch's other kernels sum in double precision.
    efficient, reference = block_pair(bn_size=bn_size, recompute=recompute, dtype=torch.float32)

    def draw():
        return (image(dtype=torch.float32) + offset).to(memory_format=torch.channels_last)

    assert_training_as_precise(efficient, reference, draw, torch.float32)


@either_mode
@both_kinds
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("half_input", [False, True], ids=["float32-input", "half-input"])
def test_autocast_is_as_precise_as_the_naive_block(recompute, bn_size, half_input, autocast):
    efficient, reference = block_pair(bn_size=bn_size, recompute=recompute, dtype=torch.float32)
    results, states = [], []
    for _ in range(DRAWS):
        x = image(dtype=autocast if half_input else torch.float32).requires_grad_()
        upstream = torch.randn(3, 14, *x.shape[2:])
        truth, exact = truth_of(reference, x, upstream)
        blocks = copy.deepcopy((efficient, reference))
        found = [autocast_results(block, x, upstream, autocast) for block in blocks]
        results.append((*found, truth))
        states.append([block.state_dict() for block in (*blocks, exact)])
    assert_as_precise(results, autocast)
    assert_as_precise(states, autocast)


def autocast_results(block, x, upstream, dtype):
    x.grad = None
    with torch.autocast("cpu", dtype=dtype):
        out = block(x)
    out.backward(upstream.to(out.dtype))
    gradients = {f"gradient of {name}": p.grad for name, p in block.named_parameters()}
    return {"output": out, "gradient of the input": x.grad} | gradients


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
