"""Modules are read once a call, and what they are read as is what they are at that moment."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from torch import nn

from efficient_densenet import EfficientDenseBlock, densenet121
from efficient_densenet.modules.parts import Structure
from efficient_densenet.modules.reading import (
    Unsupported,
    read_activation,
    read_conv,
    read_norm,
    read_pool,
)


def test_densenet121_reads_each_layer_once_forward(monkeypatch):
    model, reads = densenet121(num_classes=2), Counter()
    children = Structure.children

    def counted(self, module, path):
        reads[id(module)] += 1
        return children(self, module, path)

    monkeypatch.setattr(Structure, "children", counted)
    model(torch.randn(2, 3, 32, 32))
    assert len(reads) == 58 + 3  # layers and transitions
    assert set(reads.values()) == {1}


class Half(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / 2


def with_hook(module):
    module.register_forward_hook(lambda *_: None)
    return module


def with_method(module, name):
    setattr(module, name, getattr(type(module), name).__get__(module))
    return module


REFUSED = [
    (read_norm, nn.GroupNorm(2, 4), "part is a GroupNorm"),
    (read_norm, with_hook(nn.BatchNorm2d(4)), "part has hooks, or a forward or call of its own"),
    (read_conv, Half(4, 4, 1), "part is a Half"),
    (read_conv, with_method(nn.Conv2d(4, 4, 1), "_conv_forward"), "part has a _conv_forward"),
    (read_conv, with_method(nn.Conv2d(4, 4, 1), "forward"), "part has a forward of its own"),
    (read_conv, nn.Conv2d(4, 4, 3, padding="same"), "part pads with 'zeros', 'same'"),
    (read_conv, nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "pads with 'reflect'"),
    (read_activation, nn.Sigmoid(), "part is a Sigmoid"),
    (read_pool, nn.AdaptiveAvgPool2d(1), "part is a AdaptiveAvgPool2d"),
    (read_pool, nn.MaxPool2d(2, return_indices=True), "part returns indices"),
]


@pytest.mark.parametrize(
    ("read", "module", "reason"), REFUSED, ids=[f"{r.__name__}-{why}" for r, _, why in REFUSED]
)
def test_reason_names_part_and_what_it_is(read, module, reason):
    with pytest.raises(Unsupported) as refused:
        read(module, "part")
    assert str(refused.value).startswith(reason) or reason in str(refused.value)


@pytest.mark.parametrize("method", ["forward", "_conv_forward"])
def test_convolution_whose_class_was_changed_is_refused(method, monkeypatch):
    original = getattr(nn.Conv2d, method)
    monkeypatch.setattr(nn.Conv2d, method, lambda self, *args: original(self, *args) / 2)
    with pytest.raises(Unsupported, match=f"part has a {method} of its own"):
        read_conv(nn.Conv2d(4, 4, 1), "part")


def scripted(block):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripts are deprecated
        block["denselayer2"].relu2 = torch.jit.script(nn.Hardswish())


def test_naive_path_is_warned_of_with_reason():
    block, x = EfficientDenseBlock(3, 4, 2, 4), torch.randn(2, 4, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(x)  # efficient: nothing to say
        scripted(block)
        with pytest.raises(UserWarning, match=r"naive, since denselayer2.relu2 is a ScriptModule"):
            block(x)


def test_nobody_is_warned_of_what_was_asked_for():
    block, x = EfficientDenseBlock(3, 4, 2, 4, recompute="none"), torch.randn(2, 4, 5, 5)
    scripted(block)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(x)
        block.recompute = "norm"
        block.eval()(x[:0])
