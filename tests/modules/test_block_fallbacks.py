"""Layers with hooks, forwards of their own or parts that are not known train as the naive ones."""

import pytest
from torch import nn
from torch.nn.utils import parametrizations

from support.compare import assert_efficient, assert_same_training, block_pair, image
from support.marks import either_mode


def recorded(calls):
    def hook(*args):
        calls.append(1)

    return hook


HOOKS = {
    "forward": lambda m, calls: m.register_forward_hook(recorded(calls)),
    "forward-pre": lambda m, calls: m.register_forward_pre_hook(recorded(calls)),
    "backward": lambda m, calls: m.register_full_backward_hook(recorded(calls)),
    "backward-pre": lambda m, calls: m.register_full_backward_pre_hook(recorded(calls)),
}


# PyTorch refuses backward hooks on a norm whose output an in-place ReLU overwrites.
HOOKED = [
    pytest.param(path, hook, id=f"{path}-{name}")
    for path in ("denselayer2", "denselayer2.norm1", "denselayer3.conv2")
    for name, hook in HOOKS.items()
    if not ("norm1" in path and "backward" in name)
]


@either_mode
@pytest.mark.parametrize(("path", "hook"), HOOKED)
def test_hook_on_inner_module_fires(recompute, hook, path):
    efficient, naive = block_pair(recompute=recompute)
    calls = []
    handle = hook(efficient.get_submodule(path), calls)
    assert_efficient(efficient, image())
    assert_same_training(efficient, naive, image())
    assert len(calls) == (2 if hook is HOOKS["forward-pre"] else 1)
    handle.remove()
    assert_efficient(efficient, image())


@either_mode
def test_inner_hook_may_change_features(recompute):
    def change(block):
        block["denselayer1"].relu1.register_forward_hook(lambda module, args, out: out * 2)

    efficient, naive = block_pair(recompute=recompute, change=change)
    assert_same_training(efficient, naive, image())


@either_mode
def test_global_module_hook_fires_for_inner_modules(recompute):
    efficient, _ = block_pair(recompute=recompute)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m))
    try:
        efficient(image())
    finally:
        handle.remove()
    assert {id(m) for layer in efficient.values() for m in layer.modules()} <= {id(m) for m in seen}
    assert_efficient(efficient, image())


@either_mode
def test_hooks_on_block_and_on_parameters_keep_it_efficient(recompute):
    efficient, naive = block_pair(recompute=recompute)
    calls, ready = [], []
    efficient.register_forward_hook(recorded(calls))
    efficient.register_full_backward_hook(recorded(calls))
    for parameter in efficient.parameters():
        parameter.register_post_accumulate_grad_hook(ready.append)
    assert_efficient(efficient, image())
    assert_same_training(efficient, naive, image())
    assert len(calls) == 2
    assert {id(p) for p in ready} == {id(p) for p in efficient.parameters()}


class ScaledConv(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) + 1


def weight_normed(block):
    parametrizations.weight_norm(block["denselayer2"].conv1)


def scaled_conv(block):
    block["denselayer1"].conv2 = ScaledConv(6, 3, 3, padding=1, bias=False).double()


def shifted_norm(block):
    block["denselayer3"].norm1 = ShiftedNorm(11).double()


def other_activation(block):
    block["denselayer2"].relu2 = nn.Hardswish()


def instance_norm(block):
    block["denselayer2"].norm2 = nn.InstanceNorm2d(6, affine=True).double()


def identity_norm(block):
    block["denselayer2"].norm1 = nn.Identity()


UNKNOWN = {
    "weight-norm": weight_normed,
    "convolution-subclass": scaled_conv,
    "norm-subclass": shifted_norm,
    "other-activation": other_activation,
    "instance-norm": instance_norm,
    "identity": identity_norm,
}


@either_mode
@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_inner_module_is_used(recompute, change):
    efficient, naive = block_pair(recompute=recompute, change=change)
    assert_efficient(efficient, image())
    assert_same_training(efficient, naive, image(), rtol=1e-9)


CONVOLUTIONS = {
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 3},
    "reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "padding-by-name": {"kernel_size": 3, "padding": "same"},
    "five-by-five": {"kernel_size": 5, "padding": 2},
}


@either_mode
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_other_convolution_matches_naive(recompute, options):
    def change(block):
        block["denselayer2"].conv2 = nn.Conv2d(6, 3, **options).double()

    efficient, naive = block_pair(recompute=recompute, change=change)
    assert_same_training(efficient, naive, image())


@either_mode
@pytest.mark.parametrize("options", [{"groups": 3}, {"bias": True}], ids=["grouped", "bias"])
def test_other_first_convolution_matches_naive(recompute, options):
    def change(block):
        block["denselayer1"].conv1 = nn.Conv2d(6, 6, 1, **options).double()

    efficient, naive = block_pair(2, 6, recompute=recompute, change=change)
    assert_same_training(efficient, naive, image(channels=6))


@either_mode
def test_replaced_layer_forward_is_used(recompute):
    efficient, naive = block_pair(recompute=recompute)
    for block in (efficient, naive):
        layer = block["denselayer2"]
        layer.forward = lambda features, plain=layer.forward: 2 * plain(features)
    assert_efficient(efficient, image())
    assert_same_training(efficient, naive, image())


@either_mode
def test_layer_of_subclass_is_used(recompute):
    def change(block):
        layer = block["denselayer2"]
        plain = type(layer)
        layer.__class__ = type(
            "Doubled", (plain,), {"forward": lambda self, x: 2 * plain.forward(self, x)}
        )

    efficient, naive = block_pair(recompute=recompute, change=change)
    assert_efficient(efficient, image())
    assert_same_training(efficient, naive, image())


def test_naive_path_says_that_it_was_chosen():
    efficient, naive = block_pair(recompute="none")
    assert "none" in efficient.why_naive(image())
    assert_same_training(efficient, naive, image(), steps=3)
