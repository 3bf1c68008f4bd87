"""Mixed precision and layouts of training scripts: rows of the matrix in docs/interop.md."""

import copy
from collections import Counter

import pytest
import torch

from support.compare import (
    FORMATS,
    SPATIAL,
    assert_same_training,
    block_pair,
    image,
    training_results,
)
from support.marks import both_kinds, clause, every_mode, recomputing
from support.precision import DRAWS, assert_as_precise, truth_of


def scaled_step(block, x, upstream, dtype, scale):
    """One step under autocast with a GradScaler: output, unscaled gradients, and what it found."""
    optimizer = torch.optim.SGD(block.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    x.grad = None
    with torch.autocast("cpu", dtype=dtype):
        out = block(x)
    scaler.scale((out.float() * upstream).sum()).backward()
    scaler.unscale_(optimizer)
    found = {"output": out.detach(), "gradient of the input": x.grad / scale}
    found |= {f"gradient of {name}": p.grad for name, p in block.named_parameters()}
    scaler.step(optimizer)
    scaler.update()
    return found, scaler.get_scale()


@clause("1 · AMP: autocast with GradScaler")
@every_mode
@both_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_step_is_as_precise_as_naive_step(mode, bn_size, dtype, took):
    """The error against float64 is at most 1.5 times the naive block's; types are its own."""
    efficient, naive = block_pair(bn_size=bn_size, recompute=mode, dtype=torch.float32)
    took(efficient.why_naive(image(dtype=torch.float32)))
    results, states = [], []
    for _ in range(DRAWS):
        x = image(dtype=torch.float32).requires_grad_()
        upstream = torch.randn(3, 14, *x.shape[2:])
        exact = copy.deepcopy(naive).double()
        truth, _ = truth_of(naive, x, upstream)
        exact.load_state_dict(naive.state_dict())
        exact_x = x.detach().double().requires_grad_()
        training_results(
            exact,
            exact_x,
            upstream.double(),
            optimizer=torch.optim.SGD(exact.parameters(), lr=0.05),
        )
        blocks = copy.deepcopy((efficient, naive))
        found = [scaled_step(block, x, upstream, dtype, scale=64.0)[0] for block in blocks]
        results.append((*found, truth))
        states.append([block.state_dict() for block in (*blocks, exact)])
    assert_as_precise(results, dtype)
    assert_as_precise(states, dtype)


@clause("1 · AMP: a step that overflows is skipped")
@every_mode
def test_overflowing_step_is_skipped(mode, took):
    efficient, _ = block_pair(recompute=mode, dtype=torch.float32)
    x = image(dtype=torch.float32).requires_grad_()
    took(efficient.why_naive(x))
    before = {name: p.detach().clone() for name, p in efficient.named_parameters()}
    upstream = torch.full((3, 14, *SPATIAL[2]), 1e3)
    _, scale = scaled_step(efficient, x, upstream, torch.float16, scale=2.0**15)
    assert scale == 2.0**14
    for name, parameter in efficient.named_parameters():
        assert torch.equal(parameter, before[name]), name


@clause("1 · AMP: recomputing under the forward pass's autocast")
@recomputing
def test_autocast_around_backward_changes_nothing(mode, took):
    efficient, _ = block_pair(recompute=mode, dtype=torch.float32)
    x = image(dtype=torch.float32).requires_grad_()
    took(efficient.why_naive(x))
    found = []
    for backward in (None, torch.float16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = efficient(x).float().square().sum()
        with torch.autocast("cpu", dtype=backward, enabled=backward is not None):
            found.append(torch.autograd.grad(loss, (x, *efficient.parameters())))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def is_in_convolution(event):
    while event is not None and "convolution" not in event.name and "slow_conv3d" not in event.name:
        event = event.cpu_parent
    return event is not None


def copied_maps(step, size):
    """How many copies of maps of this ``size`` a step makes, by their channels.

    In three dimensions PyTorch's own 1x1 convolution copies on a CPU; these are left out.
    """
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    copies = [e for e in profile.events() if e.name == "aten::copy_"]
    maps = [e for e in copies if tuple(e.input_shapes[0][2:]) == size]
    return Counter(e.input_shapes[0][1] for e in maps if len(size) < 3 or not is_in_convolution(e))


@clause("2 · channels_last in and out, no hidden copy")
@recomputing
@pytest.mark.parametrize("dims", FORMATS)
def test_channels_last_is_copied_only_into_buffers(mode, dims, took):
    """Input and new maps into the feature buffer, the arriving gradient into the gradient buffer.

    The last map has no reader, so that its gradient is one more copy.
    """
    size, layers, channels, growth = (11, 9, 10)[:dims], 3, 8, 5
    efficient, _ = block_pair(
        layers, channels, 2, growth, dims=dims, recompute=mode, dtype=torch.float32
    )
    x = torch.randn(4, channels, *size).to(memory_format=FORMATS[dims]).requires_grad_()
    took(efficient.why_naive(x))
    out = efficient(x)
    upstream = torch.randn_like(out)
    assert out.is_contiguous(memory_format=FORMATS[dims])

    def step():
        efficient(x).backward(upstream)

    whole = channels + layers * growth
    assert copied_maps(step, size) == {channels: 1, growth: layers + 1, whole: 1}
    assert x.grad.is_contiguous(memory_format=FORMATS[dims])
    # The count can fail: a contiguous input is converted.
    plain, upstream = x.detach().contiguous(), upstream.contiguous()
    x = plain.requires_grad_()
    assert copied_maps(step, size)[whole] > 1


@clause("2 · channels_last: the naive block's result")
@every_mode
@pytest.mark.parametrize("dims", FORMATS)
def test_channels_last_matches_naive(mode, dims, took):
    efficient, naive = block_pair(dims=dims, recompute=mode)
    x = image(dims=dims).to(memory_format=FORMATS[dims])
    took(efficient.why_naive(x))
    assert_same_training(efficient, naive, x, steps=2)
