"""In a converted block only those parts of a layer run again that are not known."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from efficient_densenet import convert_
from efficient_densenet.modules.naive import BottleneckLayer, DenseBlock
from efficient_densenet.modules.recomputing import Recomputing, read_call
from support.compare import assert_close, assert_same_training, image, randomise_
from support.layers import CHANGES, LoRA, each, instance_norm, lora, squeeze

# Unknown parts, units, and norms with an activation.
PARTS = {
    "group-norm": "?",
    "instance-norm": "?U",
    "layer-norm": "?U",
    "no-norm": "?",  # overwrites what it reads
    "squeeze-and-excitation": "UN?",
    "lora": "N?N?",
    "weight-norm": "N?U",
    "spectral-norm": "UN?",
    "spectral-norm-by-hook": "N?U",
    "other-activation": "U?",
    "hook": "?U",
    "backward-hook": "UN?",
}
each_place = pytest.mark.parametrize(
    "change", [instance_norm, squeeze, lora], ids=["first", "second", "four"]
)


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
    layers = read_call(model[0], x).layers
    (found,) = {"".join(kind(layer, part) for part in layer.parts) for layer in layers}
    return found


def kind(layer, part):
    return "?" if part in layer.opaque else "U" if part.spec.conv else "N"


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("name", "expected"), PARTS.items(), ids=PARTS)
def test_norms_with_an_activation_are_units(name, expected, dims):
    converted, naive = pair(CHANGES[name], dims=dims)
    assert kinds(converted, image(dims=dims)) == expected
    assert_same_training(converted, naive, image(dims=dims), steps=3, rtol=1e-8)


class Scaling(Layer):
    """Computes something between its parts."""

    def forward(self, maps):
        z = self.conv1(self.relu1(self.norm1(torch.cat(maps, 1))))
        return self.conv2(self.relu2(self.norm2(2 * z)))


class Functional(Layer):
    """A step that is not known is no module's."""

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
    """One module runs twice."""

    def forward(self, maps):
        z = self.conv1(self.relu1(self.norm1(torch.cat(maps, 1))))
        return self.conv2(self.relu1(self.norm2(z)))


@pytest.mark.parametrize("kind", [Scaling, Functional, Skipping])
@each_place
def test_layer_that_does_more_runs_again_as_a_whole(kind, change):
    converted, naive = pair(change, kind)
    assert kinds(converted, image()) == "?"
    assert_same_training(converted, naive, image(), steps=2, rtol=1e-8)


@pytest.mark.parametrize("kind", [Remembering])
def test_layer_that_leaves_a_trace_stays_naive(kind):
    converted, naive = pair(squeeze, kind)
    assert_same_training(converted, naive, image(), steps=2, rtol=1e-8)
    assert not isinstance(converted[0], Recomputing)


@each_place
def test_module_of_two_parts(change):
    converted, naive = pair(change, Twice)
    assert kinds(converted, image()) == {instance_norm: "?U", squeeze: "UN?", lora: "N?N?"}[change]
    assert_same_training(converted, naive, image(), steps=2, rtol=1e-8)


def test_hook_on_layer_is_called():
    converted, naive = pair(squeeze)
    for model in (converted, naive):
        for layer in model[0].values():
            layer.register_forward_hook(lambda module, args, out: out * 2)
    assert kinds(converted, image()) == "?"
    assert_same_training(converted, naive, image(), steps=2, rtol=1e-8)


@each_place
def test_modes_that_change_are_followed(change):
    converted, naive = pair(change)
    for evaluates in ("norm1", "norm2"):
        for model in (converted, naive):
            each(lambda layer, name=evaluates: getattr(layer, name).eval())(model[0])
        assert_same_training(converted, naive, image(), steps=2, rtol=1e-8)


class Free(Layer):
    """Its units stand where they like, with functions and dropout among them."""

    def forward(self, maps):
        z = self.conv1(F.silu(self.norm1(torch.cat(maps, 1))))
        z = self.mix(F.relu(self.norm2(z)))
        z = F.dropout(self.conv2(F.elu(self.norm3(z))), 0.0, self.training)
        return F.relu(self.norm4(z))


def free(layer):
    width, growth = layer.conv2.in_channels, layer.conv2.out_channels
    layer.mix = LoRA(nn.Conv2d(width, width, 1))
    layer.norm3, layer.norm4 = nn.BatchNorm2d(width), nn.BatchNorm2d(growth)
    layer.conv2 = LoRA(layer.conv2)


def test_units_anywhere_between_calls():
    converted, naive = pair(free, Free)
    assert kinds(converted, image()) == "UN?N?N"
    assert_same_training(converted, naive, image(), steps=3, rtol=1e-8)


def three(layer):
    width = layer.conv2.in_channels
    layer.norm3, layer.mix = nn.BatchNorm2d(width), nn.Conv2d(width, width, 1)


class Three(Layer):
    def forward(self, maps):
        z = self.conv1(F.relu(self.norm1(torch.cat(maps, 1))))
        z = self.mix(F.relu(self.norm3(z)))
        return self.conv2(F.relu(self.norm2(z)))


def test_three_units():
    converted, naive = pair(three, Three)
    assert kinds(converted, image()) == "UUU"
    assert_same_training(converted, naive, image(), steps=3, rtol=1e-8)
    for model in (converted, naive):
        model.eval()
    assert_same_training(converted, naive, image(), steps=1, rtol=1e-8)
    x = image()
    with torch.no_grad():
        assert_close("without gradients", converted(x), naive(x), 1e-9)
