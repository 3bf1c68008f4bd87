"""Whatever Python decides by is seen when it changes, wherever it is kept."""

import collections
import copy
import dataclasses
import functools
import itertools
import random
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from efficient_densenet import convert_
from efficient_densenet.convert import fronts
from efficient_densenet.convert.state import snapshot, values
from efficient_densenet.convert.state.values import Describer, TooLarge, described
from support.compare import assert_same_training
from support.deciding import INPUT, Block, Layer, assert_follows, block, either

CHANGED = "changes layers.{}.{} when it runs"


@dataclasses.dataclass
class Slotted:
    __slots__ = ("leaky",)
    leaky: bool


def namespace(**values):
    return types.SimpleNamespace(**values)


HELD = {
    "object in an object": (
        lambda layer, y: either(layer.cfg.model.leaky, y),
        lambda layer: setattr(layer, "cfg", namespace(model=namespace(leaky=False))),
        lambda layer: setattr(layer.cfg.model, "leaky", True),
    ),
    "list in an object": (
        lambda layer, y: either(layer.cfg.acts[0], y),
        lambda layer: setattr(layer, "cfg", namespace(acts=[False])),
        lambda layer: layer.cfg.acts.reverse() or layer.cfg.acts.insert(0, True),
    ),
    "slots": (
        lambda layer, y: either(layer.cfg.leaky, y),
        lambda layer: setattr(layer, "cfg", Slotted(False)),
        lambda layer: setattr(layer.cfg, "leaky", True),
    ),
    "object behind a weak reference": (
        lambda layer, y: either(layer.cfg().leaky, y),
        lambda layer: setattr(layer, "cfg", weakref.ref(SHARED)),
        lambda layer: setattr(SHARED, "leaky", True),
    ),
    "module in a list": (
        lambda layer, y: layer.acts[0](y),
        lambda layer: setattr(layer, "acts", [nn.LeakyReLU(0.1)]),
        lambda layer: setattr(layer.acts[0], "negative_slope", 0.5),
    ),
    "partial": (
        lambda layer, y: layer.act(y),
        lambda layer: setattr(layer, "act", functools.partial(F.leaky_relu, negative_slope=0.1)),
        lambda layer: layer.act.keywords.update(negative_slope=0.5),
    ),
    "deque": (
        lambda layer, y: either(layer.acts[-1], y),
        lambda layer: setattr(layer, "acts", collections.deque([False], maxlen=4)),
        lambda layer: layer.acts.append(True),
    ),
    "array": (
        lambda layer, y: either(layer.acts[0] > 0, y),
        lambda layer: setattr(layer, "acts", np.zeros(2)),
        lambda layer: layer.acts.fill(1),
    ),
    "tensor or none": (
        lambda layer, y: either(layer.mask is None, y),
        lambda layer: setattr(layer, "mask", torch.ones(1)),
        lambda layer: setattr(layer, "mask", None),
    ),
    "tensor or nothing": (
        lambda layer, y: either(hasattr(layer, "mask"), y),
        lambda layer: None,
        lambda layer: setattr(layer, "mask", torch.ones(1)),
    ),
}
SHARED = Slotted.__new__(type("Shared", (Slotted,), {}))


@pytest.mark.parametrize(("activate", "give", "change"), HELD.values(), ids=HELD)
def test_change_inside_of_what_a_layer_holds_is_seen(activate, give, change):
    SHARED.leaky = False
    assert_follows(block(activate, give), lambda model: [change(part) for part in model.layers])


def test_layers_that_know_the_network_follow_it():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.warm = False
            self.block = block(lambda layer, y: either(layer.network[0].warm, y))
            for layer in self.block.layers:
                layer.network = [self]

        def why_naive(self, x):
            return self.block.why_naive(x)

        def forward(self, x):
            return self.block(x)

    assert_follows(Network(), lambda model: setattr(model, "warm", True))


DEFAULT = object()


def test_value_that_is_compared_by_identity_is_no_copy_in_the_recording():
    model = block(
        lambda layer, y: either(layer.mode is DEFAULT, y),
        lambda layer: setattr(layer, "mode", DEFAULT),
    )
    expected = model(INPUT)
    convert_(model, strict=True)
    assert torch.allclose(model(INPUT), expected)


def test_layer_that_only_a_list_still_holds_is_run():
    class Listed(Block):
        def __init__(self, layers):
            super().__init__(layers)
            self.sequence = list(layers)

        def forward(self, x):
            for layer in self.sequence:
                x = torch.cat([x, layer(x)], 1)
            return x

    def replace_layer(model):
        torch.manual_seed(2)
        model.layers[1] = Layer(7, F.relu).double()

    original = Listed([Layer(4 + 3 * i, lambda layer, y: F.relu(y)) for i in range(3)]).double()
    reason = "the forward function computes convolution with a tensor that no module holds"
    assert_follows(original, replace_layer, reason)


TRACES = {
    "deque": (lambda: collections.deque(maxlen=9), lambda thing, y: thing.append(y.size(1))),
    "count": (itertools.count, lambda thing, y: next(thing)),
    "list in an object": (
        lambda: namespace(maps=[]),
        lambda thing, y: thing.maps.append(y.detach()),
    ),
    "array": (lambda: np.zeros(1), lambda thing, y: thing.__iadd__(1)),
    "generator": (lambda: random.Random(3), lambda thing, y: thing.random()),
    "generator of numpy": (lambda: np.random.default_rng(3), lambda thing, y: thing.random()),
}


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("make", "leave"), TRACES.values(), ids=TRACES)
def test_layer_that_leaves_traces_stays_as_it_is(make, leave, norm):
    def activate(layer, y):
        leave(layer.thing, y)
        return F.relu(y)

    def give(layer):
        layer.thing = make()
        if norm == "group":
            layer.bn = nn.GroupNorm(1, layer.bn.num_features)

    model = block(activate, give)
    before = [described(part.thing) for part in model.layers]
    report = convert_(model)
    assert report[""].reason == f"layers.0 {CHANGED.format(0, 'thing')}"
    assert [described(part.thing) for part in model.layers] == before


class Functional(Layer):
    """Calls a norm's function with numbers of its own."""

    def forward(self, x):
        norm = self.bn
        if norm.training:
            norm.num_batches_tracked.add_(1)
        tensors = norm.running_mean, norm.running_var, norm.weight, norm.bias
        return self.conv(F.relu(F.batch_norm(x, *tensors, norm.training, 0.1, 1e-5)))


def test_numbers_that_a_norm_is_given_are_not_taken_for_its_own():
    original = block(None, layer=Functional)
    for eps, momentum in ((1e-5, 0.1), (0.5, 0.1), (1e-5, 0.7)):

        def change(model, eps=eps, momentum=momentum):
            for layer in model.layers:
                layer.bn.eps, layer.bn.momentum = eps, momentum

        assert_follows(copy.deepcopy(original), change)


def test_copy_and_other_mode_are_not_recorded_again(monkeypatch):
    """What is held is described by its contents: the copies of a recording hold it too."""
    model = block(
        lambda layer, y: either(layer.cfg.acts[0], y),
        lambda layer: setattr(layer, "cfg", namespace(acts=[False])),
    )
    convert_(model)
    monkeypatch.setattr(fronts, "record", None)
    model.train()(INPUT)
    model.eval()(INPUT)
    copy.deepcopy(model)(INPUT)


def test_attribute_that_holds_itself_is_compared():
    def give(layer):
        layer.cfg = {"leaky": False}
        layer.cfg["self"] = layer.cfg

    original = block(lambda layer, y: either(layer.cfg["self"]["leaky"], y), give)
    change = lambda model: [layer.cfg.update(leaky=True) for layer in model.layers]  # noqa: E731
    assert_follows(original, change)


def test_block_with_too_much_to_compare_is_naive(monkeypatch):
    model = block(
        lambda layer, y: either(layer.table[0], y),
        lambda layer: setattr(layer, "table", [False, *([i] for i in range(50))]),
    )
    monkeypatch.setattr(snapshot, "LIMIT", 100)
    report = convert_(model)
    assert report[""].reason == "the module holds more than can be compared at every call"


def test_block_whose_attributes_lie_too_deep_is_naive():
    original = block(lambda layer, y: F.relu(y), lambda layer: setattr(layer, "chain", []))
    converted = copy.deepcopy(original)
    convert_(converted)
    for model in (converted, original):
        for _ in range(values.DEPTH):
            model.layers[1].chain = [model.layers[1].chain]
    reason = "the forward function cannot be recorded: It holds values that lie more than 100 deep."
    assert converted.why_naive(INPUT) == reason
    assert_same_training(converted, original, INPUT, rtol=1e-9)
    assert not any(finding.converted for finding in convert_(original))


def test_descriptions_tell_contents_and_aliases_apart():
    one, other = [1], [1]
    assert described((one, other)) == described(([1], [1]))
    assert described((one, one)) != described((one, other))
    assert described([1]) != described([True])
    assert described({1}) != described({True})
    assert described(torch.ones(1)) != described(torch.ones(1))
    with pytest.raises(TooLarge):
        Describer(limit=1)([[]])
