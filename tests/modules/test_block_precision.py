"""Rounding: the efficient block is as near to the float64 truth as the naive block is."""

import copy

import pytest
import torch
from torch import nn

from support.compare import assert_efficient, block_pair, image, norms
from support.marks import both_kinds, either_mode, slabs_and_whole
from support.precision import DRAWS, DTYPES, assert_as_precise, assert_training_as_precise, truth_of

pytestmark = slabs_and_whole


@either_mode
@both_kinds
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_training_step_is_as_precise_as_naive_block(recompute, bn_size, dims, dtype):
    efficient, naive = block_pair(bn_size=bn_size, dims=dims, recompute=recompute, dtype=dtype)
    assert_efficient(efficient, image(dims=dims, dtype=dtype))
    assert_training_as_precise(
        efficient, naive, lambda: image(batch=8, dims=dims, dtype=dtype), dtype
    )


@either_mode
@both_kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_eval_mode_is_as_precise_as_naive_block(recompute, bn_size, dtype):
    efficient, naive = block_pair(
        bn_size=bn_size, recompute=recompute, dtype=dtype, change=nn.Module.eval
    )
    assert_training_as_precise(efficient, naive, lambda: image(dtype=dtype), dtype)


@either_mode
@both_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_norms_among_half_convolutions_are_as_precise(recompute, bn_size, dtype):
    def change(block):
        for norm in norms(block):
            norm.float()

    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute, dtype=dtype, change=change)
    assert_training_as_precise(efficient, naive, lambda: image(dtype=dtype), dtype)


@either_mode
@both_kinds
@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_large_mean_is_as_precise_as_naive_block(recompute, bn_size, offset):
    # In the layout in which a CPU computes inside: PyTorch's other kernels sum in double precision.
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute, dtype=torch.float32)

    def draw():
        return (image(dtype=torch.float32) + offset).to(memory_format=torch.channels_last)

    assert_training_as_precise(efficient, naive, draw, torch.float32)


@either_mode
@both_kinds
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_input", [False, True], ids=["float32-input", "half-input"])
def test_autocast_is_as_precise_as_naive_block(recompute, bn_size, half_input, autocast):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute, dtype=torch.float32)
    results, states = [], []
    for _ in range(DRAWS):
        x = image(dtype=autocast if half_input else torch.float32).requires_grad_()
        upstream = torch.randn(3, 14, *x.shape[2:])
        truth, exact = truth_of(naive, x, upstream)
        blocks = copy.deepcopy((efficient, naive))
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
def test_autocast_is_entered_by_forward_alone(recompute):
    """A backward inside another autocast region computes what it computes outside."""
    efficient, _ = block_pair(recompute=recompute, dtype=torch.float32)
    x = image(dtype=torch.float32).requires_grad_()
    (expected,) = torch.autograd.grad(efficient(x).square().sum(), x)
    loss = efficient(x).square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(loss, x)
    assert torch.equal(found, expected)
