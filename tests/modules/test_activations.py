"""Blocks with any known activation train exactly as naive ones, on the efficient path."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from support.compare import (
    KINDS,
    MODES,
    assert_close,
    assert_efficient,
    assert_same_training,
    block_pair,
    image,
)
from support.marks import slabs_and_whole

pytestmark = slabs_and_whole

ACTIVATIONS = {
    "leaky-relu": nn.LeakyReLU(0.2),
    "elu": nn.ELU(0.7),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu-tanh": nn.GELU(approximate="tanh"),
    "none": nn.Identity(),
}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)


def pair(activation, bn_size=2, mixed=False, **options):
    """Blocks whose activations are all this one, or only those of the first layer."""

    def change(block):
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.ReLU) and not (mixed and "layer1" not in name):
                owner, _, child = name.rpartition(".")
                setattr(block.get_submodule(owner), child, copy.deepcopy(activation))

    return block_pair(bn_size=bn_size, change=change, **options)


@every_activation
@pytest.mark.parametrize("mixed", [False, True], ids=["all", "mixed"])
@pytest.mark.parametrize("bn_size", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("recompute", MODES)
def test_block_with_activation_trains_as_naive_block(recompute, bn_size, mixed, activation):
    efficient, naive = pair(activation, bn_size, mixed, recompute=recompute)
    assert_efficient(efficient, image())
    assert_same_training(efficient, naive, image(), steps=3, rtol=1e-9)


@every_activation
def test_block_with_activation_infers_as_naive_block(activation):
    efficient, naive = pair(activation)
    with torch.no_grad():
        x = image()
        assert_close("output", efficient.eval()(x), naive.eval()(x), 1e-10)
