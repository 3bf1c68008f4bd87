"""Parametrised, shared and replaced layers: rows of the matrix in docs/interop.md."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from support.compare import (
    MODES,
    assert_all_close,
    assert_same_training,
    block_pair,
    gradients,
    image,
    upstream_for,
)
from support.marks import clause, every_mode


def weight_normed(block):
    parametrizations.weight_norm(block["denselayer2"].conv1)


def spectral_normed(block):
    # Equal starting vectors of the power iteration in both blocks.
    torch.manual_seed(7)
    parametrizations.spectral_norm(block["denselayer2"].conv2)


PARAMETRISED = {"weight norm": weight_normed, "spectral norm": spectral_normed}


@pytest.mark.parametrize(
    ("change", "mode"),
    [
        pytest.param(
            change, mode, marks=clause(f"6 · parametrisation: {name}"), id=f"{name}-{mode}"
        )
        for name, change in PARAMETRISED.items()
        for mode in ("none", *MODES)
    ],
)
def test_parametrised_convolution_is_efficient(change, mode, took):
    efficient, naive = block_pair(recompute=mode, change=change)
    reason = efficient.why_naive(image())
    took(reason)
    assert mode == "none" or reason is None
    assert_same_training(efficient, naive, image(), steps=3, rtol=1e-9)


def share_weight(block):
    block["denselayer2"].conv2.weight = block["denselayer1"].conv2.weight


def share_convolution(block):
    block["denselayer3"].conv2 = block["denselayer1"].conv2


def share_norm(block):
    block["denselayer2"].norm2 = block["denselayer1"].norm2


def share_norm_with_cumulative_average(block):
    share_norm(block)
    block["denselayer2"].norm2.momentum = None


SHARING = [share_weight, share_convolution, share_norm, share_norm_with_cumulative_average]


@clause("6 · weight sharing")
@every_mode
@pytest.mark.parametrize("share", SHARING)
def test_shared_parameters_match_naive(mode, share, took):
    efficient, naive = block_pair(recompute=mode, change=share)
    took(efficient.why_naive(image()))
    assert_same_training(efficient, naive, image(), steps=3)


class LoRA(nn.Module):
    """A frozen convolution and a low-rank correction beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Conv2d(
            base.in_channels, rank, base.kernel_size, padding=base.padding, bias=False
        )
        self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        self.to(base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def with_lora(block):
    block.requires_grad_(False)
    for layer in block.values():
        layer.conv1, layer.conv2 = LoRA(layer.conv1), LoRA(layer.conv2)


@clause("6 · LoRA: replaced convolutions")
@every_mode
def test_replaced_convolutions_are_efficient(mode, took):
    efficient, naive = block_pair(recompute=mode, change=with_lora)
    reason = efficient.why_naive(image())
    took(reason)
    assert mode == "none" or reason is None
    assert_same_training(efficient, naive, image(), steps=3)
    trained = [name for name, p in efficient.named_parameters() if p.grad is not None]
    assert trained
    assert all("down" in name or "up" in name for name in trained)


@clause("6 · merged LoRA: the convolution again")
@every_mode
def test_merged_convolutions_are_efficient_again(mode, took):
    efficient, naive = block_pair(recompute=mode, change=with_lora)
    for block in (efficient, naive):
        for layer in block.values():
            layer.conv1, layer.conv2 = layer.conv1.base, layer.conv2.base
        block.requires_grad_(True)
    took(efficient.why_naive(image()))
    assert_same_training(efficient, naive, image())


def test_hooked_step_has_gradients_of_plain_step():
    """A tensor hook on the block's output sees the arriving gradient, and may change it."""
    efficient, naive = block_pair()
    images, found = image(), []
    for block in (efficient, naive):
        x = images.clone().requires_grad_()
        out = block(x)
        out.register_hook(lambda grad: 2 * grad)
        out.backward(upstream_for(out))
        found.append(gradients(block, x))
    assert_all_close(*found, 1e-10)
