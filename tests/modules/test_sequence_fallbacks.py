"""A sequence calls by itself what it does not know, and refuses what batch norm refuses."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from efficient_densenet import EfficientDenseBlock
from efficient_densenet.modules import sequence
from efficient_densenet.modules.calls import StemCall
from efficient_densenet.modules.sequence import EfficientSequential, EfficientTransition
from support.compare import assert_same_training
from support.marks import all_dims
from support.stages import big, pair, stages, stem_modules, stems, transitions


def hook_transition(module):
    module.transition1.register_forward_hook(lambda m, args, out: out * 2)


def hook_block(module):
    module.denseblock1.register_forward_hook(lambda m, args, out: out * 2)


def hook_inner_norm(module):
    module.transition1.norm.register_forward_hook(lambda m, args, out: out * 2)


def other_pool(module):
    module.transition1.pool = nn.MaxPool2d(2, 2)


def padded_pool(module):
    module.transition1.pool = nn.AvgPool2d(2, 2, padding=1)


def ceiling_pool(module):
    module.transition1.pool = nn.AvgPool2d(2, 2, ceil_mode=True)


def wide_convolution(module):
    module.transition1.conv = nn.Conv2d(11, 4, 3, padding=1).double()


def extra_child(module):
    module.transition1.add_module("extra", nn.Tanh())


def own_forward(module):
    plain = module.transition1.forward
    module.transition1.forward = lambda x: plain(x) + 1


FALLBACKS = (
    hook_transition,
    hook_block,
    hook_inner_norm,
    other_pool,
    padded_pool,
    ceiling_pool,
    wide_convolution,
    extra_child,
    own_forward,
)


@pytest.mark.parametrize("change", FALLBACKS, ids=lambda c: c.__name__)
def test_unknown_module_is_called_by_itself(change):
    efficient, naive = stages("bottleneck", 2, change=change)
    assert_same_training(efficient, naive, big(2), steps=2)


def hook_on_relu(module):
    module.relu0.register_forward_hook(lambda m, args, out: out * 2)


def reflecting(module):
    module.conv0 = nn.Conv2d(5, 6, 3, padding=1, padding_mode="reflect").double()


def padding_by_name(module):
    module.conv0 = nn.Conv2d(5, 6, 3, padding="same").double()


@pytest.mark.parametrize("change", [hook_on_relu, reflecting, padding_by_name])
def test_unknown_stem_is_called_module_by_module(calls, change):
    efficient, naive = stems(change=change)
    assert_same_training(efficient, naive, big(2))
    assert calls[StemCall] == 0


def test_stem_without_its_pool_is_called_module_by_module(calls):
    modules = stem_modules()
    del modules["pool0"]
    efficient, naive = pair(EfficientSequential(modules), nn.Sequential(copy.deepcopy(modules)))
    assert_same_training(efficient, naive, big(2))
    assert calls[StemCall] == 0


@pytest.mark.parametrize("expected", [1, 6])
def test_wrong_number_of_channels_is_refused_as_batch_norm_does(expected):
    transition = EfficientTransition(expected, 2)
    x = torch.randn(2, 5, 4, 4)
    assert f"expects {expected} channels and gets 5" in transition.why_naive(x)
    block = EfficientDenseBlock(1, 3, 2, 2)
    for model, shape in (
        (transition, (2, 5, 4, 4)),
        (EfficientSequential(OrderedDict(block=block, transition=transition)), (2, 3, 4, 4)),
        (lambda x: sequence.run_to_average([block, transition.norm], x, 2), (2, 3, 4, 4)),
        (lambda x: sequence.run_to_average([nn.Identity(), transition.norm], x, 2), (2, 5, 4, 4)),
    ):
        with pytest.raises(RuntimeError, match="running_mean should contain 5 elements"):
            model(torch.randn(shape))


@all_dims
def test_one_value_per_channel_is_refused_as_batch_norm_does(dims):
    size = (1,) * dims
    for efficient, channels in ((transitions(dims)[0], 5), (stems(dims)[0], 5)):
        x = torch.randn(1, channels, *size, dtype=torch.float64)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            efficient(x)
