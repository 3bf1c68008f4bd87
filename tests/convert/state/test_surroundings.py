"""What a forward function finds outside of its module is seen when it changes."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from efficient_densenet import convert_
from efficient_densenet.convert import fronts
from efficient_densenet.convert.state import surroundings
from efficient_densenet.convert.state.surroundings import Surroundings
from efficient_densenet.convert.state.values import Describer
from support.deciding import INPUT, Layer, assert_follows, block, either

FLAGS = {"leaky": False}
SLOPE = 0.1
UNUSED = 0


class Options:
    leaky = False
    slope = 0.1

    @classmethod
    def is_leaky(cls):
        return cls.leaky


OPTIONS = Options()


def helper(y):
    return F.leaky_relu(y, SLOPE)


def helped(y):
    return (lambda y: helper(y))(y)


@functools.singledispatch
def dispatched(y):
    return helper(y)


def by_default(y, options={"slope": 0.1}):  # noqa: B006
    return F.leaky_relu(y, options["slope"])


def by_attribute(y):
    return F.leaky_relu(y, by_attribute.slope)


by_attribute.slope = 0.1


def enclosing():
    flags = [False]
    return (lambda layer, y: either(flags[0], y)), lambda: flags.__setitem__(0, True)


def counting():
    leaky = False

    def activate(layer, y):
        return either(leaky, y)

    def change():
        nonlocal leaky
        leaky = True

    return activate, change


class Methodical(Layer):
    """Decides in a property and a method by attributes of its class."""

    flags = {"leaky": False}  # noqa: RUF012
    leaky = False
    act = functools.partial(F.leaky_relu, negative_slope=0.1)

    @property
    def is_leaky(self):
        return FLAGS["leaky"]

    @staticmethod
    def slope():
        return SLOPE


def set_item(items, key, value):
    return lambda patch: patch.setitem(items, key, value)


def set_attribute(thing, name, value):
    return lambda patch: patch.setattr(thing, name, value)


HERE = globals()
FOUND = {
    "dict": (lambda layer, y: either(FLAGS["leaky"], y), set_item(FLAGS, "leaky", True)),
    "number": (lambda layer, y: F.leaky_relu(y, SLOPE), set_item(HERE, "SLOPE", 0.5)),
    "helper": (lambda layer, y: helped(y), set_item(HERE, "SLOPE", 0.5)),
    "helper in a wrapper of the standard library": (
        lambda layer, y: dispatched(y),
        set_item(HERE, "SLOPE", 0.5),
    ),
    "replaced helper": (
        lambda layer, y: helped(y),
        set_item(HERE, "helper", lambda y: F.leaky_relu(y, 0.5)),
    ),
    "default": (lambda layer, y: by_default(y), set_item(by_default.__defaults__[0], "slope", 0.5)),
    "attribute of a function": (
        lambda layer, y: by_attribute(y),
        set_attribute(by_attribute, "slope", 0.5),
    ),
    "class": (lambda layer, y: either(Options.leaky, y), set_attribute(Options, "leaky", True)),
    "class method": (
        lambda layer, y: either(Options.is_leaky(), y),
        set_attribute(Options, "leaky", True),
    ),
    "class of an object": (
        lambda layer, y: F.leaky_relu(y, OPTIONS.slope),
        set_attribute(Options, "slope", 0.5),
    ),
    "function of PyTorch": (
        lambda layer, y: F.relu(y),
        set_attribute(F, "relu", lambda y: F.leaky_relu(y, 0.5)),
    ),
    "dict of the class": (
        lambda layer, y: either(layer.flags["leaky"], y),
        set_item(Methodical.flags, "leaky", True),
    ),
    "number of the class": (
        lambda layer, y: either(layer.leaky, y),
        set_attribute(Methodical, "leaky", True),
    ),
    "partial of the class": (
        lambda layer, y: type(layer).act(y),
        set_item(Methodical.act.keywords, "negative_slope", 0.5),
    ),
    "property": (lambda layer, y: either(layer.is_leaky, y), set_item(FLAGS, "leaky", True)),
    "static method": (
        lambda layer, y: F.leaky_relu(y, layer.slope()),
        set_item(HERE, "SLOPE", 0.5),
    ),
}


@pytest.mark.parametrize(("activate", "change"), FOUND.values(), ids=FOUND)
def test_change_outside_of_the_module_is_seen(activate, change, monkeypatch):
    once = []
    original = block(activate, layer=Methodical)
    assert_follows(original, lambda model: once or once.append(change(monkeypatch)))


@pytest.mark.parametrize("make", [enclosing, counting])
def test_change_of_what_a_function_encloses_is_seen(make):
    activate, change = make()
    assert_follows(block(activate), lambda model: change())


def test_names_of_methods_that_are_not_called_are_not_compared(monkeypatch):
    class Reporting(Layer):
        def report(self):
            return UNUSED

    model = block(lambda layer, y: F.relu(y), layer=Reporting)
    convert_(model)
    monkeypatch.setattr(fronts, "record", None)
    monkeypatch.setitem(HERE, "UNUSED", 1)
    assert model.why_naive(INPUT) is None


def test_functions_of_libraries_are_looked_at_but_not_read():
    torchvision = pytest.importorskip("torchvision")

    class Network(nn.Module):
        def forward(self, x):
            return torchvision.ops.stochastic_depth(torch.relu(x), SLOPE, "row")

    found = Surroundings([Network], [], Describer()).found
    names = {"torchvision", "torchvision.ops", "torchvision.ops.stochastic_depth"}
    assert {thing.name for thing in found} == names | {"torch", "torch.relu", "torch.ops", "SLOPE"}


def test_surroundings_of_a_torchvision_block_are_few():
    densenet = pytest.importorskip("torchvision.models.densenet")
    classes = [densenet._DenseBlock, densenet._DenseLayer, nn.BatchNorm2d, nn.Conv2d]
    found = Surroundings(classes, [], Describer()).found
    assert len(found) < 20
    assert surroundings._names_in(densenet._DenseLayer.forward.__code__)[0] >= {"torch", "F"}
