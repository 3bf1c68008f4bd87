"""What is changed after the conversion, or was never as classes lead one to expect, is seen."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from efficient_densenet import convert_, explain
from efficient_densenet.convert import fronts
from efficient_densenet.convert.recording.twin import plain_attributes
from support.compare import assert_all_close, assert_same_training, randomise_
from support.libraries import NETWORKS, blocks, small
from support.traps import OPAQUE, TRAPS
from support.wild import BLOCKS, C0, DictBlock, K, LoopBlock

INPUT = torch.randn(3, C0, 8, 6, dtype=torch.float64)


def pair(make):
    original = make().double()
    randomise_(original)
    converted = copy.deepcopy(original)
    convert_(converted)
    return converted, original


def assert_same_evaluation(converted, original, x):
    with torch.no_grad():
        found, expected = (model.eval()(x) for model in (converted, original))
    assert_all_close({"output": found}, {"output": expected}, 1e-10)


@pytest.mark.parametrize(("make", "reason"), TRAPS.values(), ids=TRAPS)
def test_block_that_computes_something_else_stays_as_it_is(make, reason):
    original = make().double()
    model = nn.Sequential(copy.deepcopy(original))
    before = plain_attributes(model)
    convert_(model)
    assert plain_attributes(model) == before
    with pytest.raises(ValueError, match=r"no dense block was|cannot be converted"):
        convert_(copy.deepcopy(model), strict=True)
    for module in (model, original):
        torch.manual_seed(1)
        module.result = module(INPUT)
    if isinstance(original.result, tuple):
        model.result, original.result = model.result[0], original.result[0]
    assert torch.equal(model.result, original.result)


@pytest.mark.parametrize(("make", "odd"), OPAQUE.values(), ids=OPAQUE)
def test_layer_with_helper_of_its_own_computes_as_before(make, odd):
    converted, original = pair(make)
    assert_same_training(converted, original, INPUT, rtol=1e-9, steps=2)


def other_squeeze(self, maps):
    return 3 * self.c1(self.act(self.n1(torch.cat(maps, 1))))


def set_on_instance(block, monkeypatch):
    layer = block["unit1"]
    layer.squeeze = other_squeeze.__get__(layer)


def set_on_class(block, monkeypatch):
    monkeypatch.setattr(type(block["unit1"]), "squeeze", other_squeeze)


def set_on_convolutions(block, monkeypatch):
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: forward(self, x) * 2)


def set_on_activations(block, monkeypatch):
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: F.silu(x))


def set_on_inner_convolutions(block, monkeypatch):
    inner = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, *args: -inner(self, *args))


METHODS = (
    set_on_instance,
    set_on_class,
    set_on_convolutions,
    set_on_activations,
    set_on_inner_convolutions,
)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", METHODS, ids=lambda change: change.__name__)
def test_method_that_is_replaced_is_called(change, when, monkeypatch):
    original = DictBlock().double()
    randomise_(original)
    converted = copy.deepcopy(original)
    found = []
    if when == "after":
        convert_(converted)
        converted(INPUT)
    for block in (converted, original):
        with monkeypatch.context() as own:
            change(block, own)
            if when == "before" and block is converted:
                convert_(block)
            found.append(block.train()(INPUT))
    assert_all_close({"output": found[0]}, {"output": found[1]}, 1e-9)


def drop_more(block):
    for layer in block.values():
        layer.p = 0.5


def leaky(block):
    for layer in block.values():
        layer.act = nn.LeakyReLU(0.1)


def frozen(block):
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def momentum(block):
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.37


def eps(block):
    block.unit1.n1.eps = 0.1


def evaluating(block):
    block.eval()


def half_evaluating(block):
    block.unit1.eval()


def same_layer_twice(block):
    block.unit1.c2 = block.unit0.c2


CHANGES = (leaky, frozen, momentum, eps, evaluating, half_evaluating, same_layer_twice)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_attribute_that_changes_later_is_seen(change):
    converted, original = pair(DictBlock)
    for block in (converted, original):
        block(INPUT)
        change(block)
    assert converted.why_naive(INPUT) is None
    assert_same_training(converted, original, INPUT, rtol=1e-9, steps=2)


def test_replaced_convolution_is_seen():
    converted, original = pair(DictBlock)
    other = nn.Conv2d(8, K, 5, padding=2, bias=False).double()
    for block in (converted, original):
        block.unit2.c2 = copy.deepcopy(other)
    assert converted.why_naive(INPUT) is None
    assert_same_training(converted, original, INPUT, rtol=1e-9, steps=2)


def tied():
    block = DictBlock()
    for layer in (block.unit1, block.unit2):
        layer.c2.weight = block.unit0.c2.weight
    return block


def untied(block):
    for i, layer in enumerate(block.values()):
        layer.c2.weight = nn.Parameter(layer.c2.weight.detach() * (i + 1))


def loaded(block):
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    state["unit1.c2.weight"] *= 2
    block.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [untied, loaded], ids=lambda change: change.__name__)
def test_tied_weights_that_are_untied_are_read_one_by_one(change):
    converted, original = pair(tied)
    assert_same_training(converted, original, INPUT, rtol=1e-9)
    for block in (converted, original):
        change(block)
    assert converted.why_naive(INPUT) is None
    assert_same_training(converted, original, INPUT, rtol=1e-7)


def test_array_of_the_class_may_be_replaced(monkeypatch):
    class Block(DictBlock):
        mean = np.array([1.0, 2.0])

    converted, original = pair(Block)
    monkeypatch.setattr(Block, "mean", np.array([1.0, 3.0]))
    assert converted.why_naive(INPUT) is None
    assert_same_training(converted, original, INPUT, rtol=1e-9)


def test_dropout_that_starts_later_drops():
    block, _ = pair(DictBlock)
    assert (block(INPUT)[:, C0:] == 0).double().mean() < 0.01
    drop_more(block)
    assert block.why_naive(INPUT) is None
    assert 0.4 < (block(INPUT)[:, C0:] == 0).double().mean() < 0.6
    block.eval()
    assert (block(INPUT)[:, C0:] == 0).double().mean() < 0.01


class DropsPaths(LoopBlock):
    """Stochastic depth, at first with probability 0."""

    rate = 0.0

    def forward(self, x, scratch=None):
        for layer in self.denselayers:
            new = layer(x)
            if self.training and self.rate > 0:
                keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.rate
                new = new * keep / (1 - self.rate)
            x = torch.cat([x, new], 1)
        return x


def test_stochastic_depth_that_starts_later_is_seen():
    converted, original = pair(DropsPaths)
    assert converted.why_naive(INPUT) is None
    for block in (converted, original):
        block.rate = 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="DropsPaths is naive, since the forward function"):
            converted(INPUT)
    for block in (converted, original):
        torch.manual_seed(3)
        block.found = block(INPUT)
    assert torch.equal(converted.found, original.found)
    for block in (converted, original):
        block.rate = 0.0
    assert converted.why_naive(INPUT) is None


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("hooks", "D-scratch")])
def test_unchanged_block_is_not_looked_at_again_in_either_mode(name, monkeypatch):
    wild, looks = BLOCKS[name], []
    block = wild.make()
    convert_(block)
    record = fronts.record
    monkeypatch.setattr(fronts, "record", lambda *args: looks.append(args) or record(*args))
    for _ in range(2):
        block.train()(wild.input())
        block.eval()(wild.input())
    copy.deepcopy(block)(wild.input())
    assert not looks


def test_second_conversion_with_filter_leaves_module_as_it_is():
    model = small()
    convert_(model)
    report = convert_(model, filter_fn=lambda module, name: False, recompute="norm")
    assert all(finding.converted and finding.reason is None for finding in report)
    assert [finding.state for finding in report] == ["recomputes"] * len(report.findings)
    assert {block.recompute for block in blocks(model)} == {"bottleneck"}


def test_forward_function_with_side_effects_runs_no_more_often_than_before():
    class Counting(LoopBlock):
        calls = 0

        def forward(self, x, scratch=None):
            self.calls += 1
            return super().forward(x)

    model = nn.Sequential(Counting(), nn.Flatten()).double()
    report = convert_(model)
    assert report["0"].reason == "the forward function changes calls when it runs"
    assert model[0].calls == 0
    model(INPUT)
    assert model[0].calls == 1


class TestScriptModules:
    """TorchScript is left alone, and so is nothing else."""

    @pytest.fixture
    def model(self):
        model = small()
        model.head = torch.jit.script(nn.Sequential(nn.Linear(5, 3), nn.ReLU()).double())
        return model

    def test_everything_else_is_converted(self, model):
        report = convert_(model, strict=True)
        assert report["features.denseblock1"].converted
        assert report["features.denseblock2"].converted
        assert "denseblock2" in str(explain(model))

    def test_traced_block_is_left_alone(self):
        model = small()
        block = model.features.denseblock1
        x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
        model.features.denseblock1 = torch.jit.trace(block.eval(), x)
        model.eval()
        expected = model(torch.randn(2, 3, 36, 36, dtype=torch.float64).fill_(0.5))
        report = convert_(model)
        assert [f.path for f in report if f.kind == "dense block"] == ["features.denseblock2"]
        found = model(torch.randn(2, 3, 36, 36, dtype=torch.float64).fill_(0.5))
        assert_all_close({"output": found}, {"output": expected}, 1e-10)


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_helper_of_library_that_is_overridden_is_called(name):
    """torchvision's ``bn_function`` and timm's ``bottleneck_fn``."""
    network = NETWORKS[name]
    original = network.make().double()
    layer = original.features.denseblock1.denselayer2
    helper = "bn_function" if name == "torchvision" else "bottleneck_fn"

    class Own(type(layer)):
        pass

    inherited = getattr(type(layer), helper)
    setattr(Own, helper, lambda self, maps: 2 * inherited(self, maps))
    layer.__class__ = Own
    randomise_(original)
    converted = copy.deepcopy(original)
    convert_(converted)
    x = torch.randn(network.image, dtype=torch.float64)
    assert_same_training(converted, original, x, rtol=1e-9, steps=2)
