"""In a converted block only the half of a layer that is not known runs again."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from efficient_densenet import convert_
from efficient_densenet.modules.naive import BottleneckLayer, DenseBlock
from support.compare import assert_same_training, image, randomise_
from support.layers import CHANGES, each, instance_norm, squeeze

OPAQUE, UNIT = "OpaquePart", "Unit"
WHOLE = ("group-norm", "lora", "no-norm")  # the last one overwrites what it reads
HALVES = {
    "instance-norm": (OPAQUE, UNIT),
    "layer-norm": (OPAQUE, UNIT),
    "weight-norm": (OPAQUE, UNIT),
    "spectral-norm-by-hook": (OPAQUE, UNIT),
    "hook": (OPAQUE, UNIT),
    "squeeze-and-excitation": (UNIT, OPAQUE),
    "spectral-norm": (UNIT, OPAQUE),
    "other-activation": (UNIT, OPAQUE),
    "backward-hook": (UNIT, OPAQUE),
} | {name: (OPAQUE,) for name in WHOLE}


class Layer(BottleneckLayer):
    """A layer whose class is not known, so that it is recorded."""


class Block(DenseBlock):
    """The same of a block."""

    kind = Layer

    def __init__(self, change, dims=2):
        super().__init__(3, 5, 2, 3, dims=dims)
        for layer in self.values():
            layer.__class__ = self.kind
            change(layer)


def pair(change, kind=Layer, dims=2):
    blocks = []
    for _ in range(2):
        torch.manual_seed(0)
        block = type("Block", (Block,), {"kind": kind})(change, dims).double()
        blocks.append(nn.Sequential(block))
    converted, naive = blocks
    randomise_(naive)
    converted.load_state_dict(naive.state_dict())
    convert_(converted)
    return converted, naive


def kinds(model, x):
    layers = model[0].read_call(x).layers
    (found,) = {tuple(type(part).__name__ for part in layer.parts) for layer in layers}
    return found


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("name", "expected"), HALVES.items(), ids=HALVES)
def test_half_that_is_known_is_a_unit(name, expected, dims):
    converted, naive = pair(CHANGES[name], dims=dims)
    assert kinds(converted, image(dims=dims)) == expected
    assert_same_training(converted, naive, image(dims=dims), steps=3, rtol=1e-8)


class Scaling(Layer):
    """Computes something between its halves."""

    def forward(self, maps):
        z = self.conv1(self.relu1(self.norm1(torch.cat(maps, 1))))
        return self.conv2(self.relu2(self.norm2(2 * z)))


class Functional(Layer):
    """One of the unknown half's steps is no module's."""

    def forward(self, maps):
        z = self.conv1(self.relu1(self.norm1(torch.cat(maps, 1))))
        return self.conv2(F.hardswish(self.norm2(z)))


class Skipping(Layer):
    """The second half reads what is inside the first, too."""

    def forward(self, maps):
        a = self.norm1(torch.cat(maps, 1))
        z = self.conv1(self.relu1(a))
        return self.conv2(self.relu2(self.norm2(z))) + a[:, :3]


class Remembering(Layer):
    """The second module reads what the first leaves beside its result."""

    def forward(self, maps):
        z = self.conv1(self.relu1(self.norm1(torch.cat(maps, 1))))
        self.conv2.seen = z.detach() * 0
        return self.conv2(self.relu2(self.norm2(z)))


class Twice(Layer):
    """One module runs in both halves."""

    def forward(self, maps):
        z = self.conv1(self.relu1(self.norm1(torch.cat(maps, 1))))
        return self.conv2(self.relu1(self.norm2(z)))


@pytest.mark.parametrize("kind", [Scaling, Functional, Skipping])
@pytest.mark.parametrize("change", [instance_norm, squeeze], ids=["first", "second"])
def test_layer_that_does_more_runs_again_as_a_whole(kind, change):
    converted, naive = pair(change, kind)
    assert kinds(converted, image()) == (OPAQUE,)
    assert_same_training(converted, naive, image(), steps=2, rtol=1e-8)


@pytest.mark.parametrize("kind", [Remembering])
def test_layer_that_leaves_a_trace_stays_naive(kind):
    converted, naive = pair(squeeze, kind)
    assert_same_training(converted, naive, image(), steps=2, rtol=1e-8)
    assert not hasattr(converted[0], "read_call")


@pytest.mark.parametrize("change", [instance_norm, squeeze], ids=["first", "second"])
def test_module_of_both_halves(change):
    converted, naive = pair(change, Twice)
    assert len(kinds(converted, image())) == 2
    assert_same_training(converted, naive, image(), steps=2, rtol=1e-8)


def test_hook_on_layer_is_called():
    converted, naive = pair(squeeze)
    for model in (converted, naive):
        for layer in model[0].values():
            layer.register_forward_hook(lambda module, args, out: out * 2)
    assert kinds(converted, image()) == (OPAQUE,)
    assert_same_training(converted, naive, image(), steps=2, rtol=1e-8)


@pytest.mark.parametrize("change", [instance_norm, squeeze], ids=["first", "second"])
def test_modes_that_change_are_followed(change):
    converted, naive = pair(change)
    for evaluates in ("norm1", "norm2"):
        for model in (converted, naive):
            each(lambda layer, name=evaluates: getattr(layer, name).eval())(model[0])
        assert_same_training(converted, naive, image(), steps=2, rtol=1e-8)
