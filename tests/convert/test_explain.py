"""The report says what would really happen, module by module, and how much each keeps."""

import copy
import warnings

import pytest
import torch
from torch import nn

from efficient_densenet import convert_, densenet_cifar, explain
from efficient_densenet.convert.recording.twin import plain_attributes
from support.compare import assert_same_training
from support.libraries import NETWORKS, blocks, small
from support.storages import kept_bytes
from support.wild import BLOCKS, LAYERS, Bottleneck, K, plain

IMAGE = torch.randn(3, 3, 36, 32, dtype=torch.float64)


def test_explaining_changes_nothing():
    model = small()
    convert_(model.features.denseblock1)
    before = plain_attributes(model)
    explain(model)
    explain(model, IMAGE)
    assert plain_attributes(model) == before


@pytest.mark.parametrize("name", ["torchvision", "timm", "monai-3d", "pytorchcv", "tiramisu"])
def test_bytes_are_those_that_are_kept(name):
    network = NETWORKS[name]
    model = network.make()
    naive = copy.deepcopy(model)
    convert_(model)
    report, seen = explain(model, torch.randn(network.image)), {}
    for path in (finding.path for finding in report):
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen.setdefault(path, torch.randn(args[0].shape))
        )
    model(torch.randn(network.image))
    for module in model.modules():
        module._forward_pre_hooks.clear()
    measured = 0
    for finding in report:
        if finding.kept_bytes is None or finding.path not in seen:
            continue
        x = seen[finding.path].requires_grad_()
        here, there = (m.get_submodule(finding.path) for m in (model, naive))
        assert finding.kept_bytes == pytest.approx(kept_bytes(here, x), rel=0.02, abs=2048)
        assert finding.naive_bytes == pytest.approx(kept_bytes(there, x), rel=0.02, abs=2048)
        measured += 1
    assert measured >= network.blocks


def test_report_has_sizes_only_where_there_is_an_input():
    model = small()
    assert "MiB" not in str(explain(model))
    assert "kept MiB" in str(explain(model, IMAGE)).splitlines()[0]


def test_answer_is_that_of_the_given_input():
    model = small()
    convert_(model)
    assert {f.reason for f in explain(model, IMAGE)} == {None}
    one = torch.randn(1, 3, 32, 32, dtype=torch.float64)  # a single value in the last block
    reasons = {f.path: f.reason for f in explain(model, one)}
    assert reasons["features.denseblock1"] is None
    assert model.features.denseblock1.why_naive(torch.randn(2, 8, 8, 8)) in (
        "the input is torch.float32, and a convolution is torch.float64"
    )


def test_block_of_this_package_that_falls_back_says_why():
    model = densenet_cifar(10, 4)
    model.features.denseblock1.register_forward_hook(lambda *args: None)
    model.features.transition1.pool = nn.MaxPool2d(2)
    report = explain(model, torch.randn(2, 3, 32, 32))
    assert report["features.denseblock1"].state == "recomputes"
    assert "do not commute" in report["features.transition1"].reason
    assert report["features.transition1"].kept_bytes == report["features.transition1"].naive_bytes


@pytest.mark.parametrize("name", ["group-norm", "attention", "weight-norm", "hooks"])
def test_layers_that_are_run_again_are_named(name):
    block = BLOCKS[name].make()
    finding = explain(block)[""]
    assert finding.reason is None
    assert len(finding.run_again) == LAYERS
    convert_(block, strict=True)
    assert "3 layers are run again: denselayers.0" in str(explain(block))


def test_layers_of_blocks_of_this_package_that_are_run_again_are_named():
    model = densenet_cifar(16, 4)
    block = model.features.denseblock2
    block["denselayer1"].norm1 = nn.InstanceNorm2d(block["denselayer1"].norm1.num_features)
    block["denselayer2"].register_forward_hook(lambda *args: None)
    report = explain(model)
    assert report["features.denseblock1"].run_again == ()
    assert report["features.denseblock2"].run_again == (
        "denselayer1.norm1 is a InstanceNorm2d",
        "denselayer2 has hooks, or a forward or call of its own",
    )
    assert "2 layers are run again" in str(report)


class Iterating(nn.Module):
    """Calls the children of a sequence one by one, as encoders do."""

    def __init__(self):
        super().__init__()
        self.features = small().features

    def forward(self, x):
        for child in self.features:
            x = child(x)
        return x


def test_blocks_and_transitions_recompute_where_they_are_called_one_by_one(runs):
    model = Iterating()
    original = copy.deepcopy(model)
    report = convert_(model, strict=True)
    assert report["features"].reason == "its parts are called one by one"
    assert report["features.transition1"].state == "recomputes"
    assert_same_training(model, original, IMAGE, rtol=1e-9, steps=2)
    assert [len(spec.layers) for spec in runs] == [2, 0, 3] * 2
    assert model.features.transition1.why_naive(torch.randn(2, 20, 8, 8).double()) is None


def test_first_fallback_warns_with_reason():
    model = small()
    convert_(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model(IMAGE)
        assert not caught
        model.features.transition1.pool = nn.MaxPool2d(2)
        for _ in range(3):
            model(IMAGE)
    assert [str(w.message) for w in caught] == [
        "_Transition is naive, since the transition does not convolve 1x1 and average without "
        "padding: the two do not commute"
    ]


class Inline(nn.Module):
    """Connects densely between other things, in no module of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.layers = nn.Conv2d(3, 6, 3), plain(Bottleneck)
        self.last = nn.Conv2d(6 + LAYERS * K, 2, 1)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def test_layers_without_a_block_recompute_each_by_itself():
    model = Inline().double()
    original = copy.deepcopy(model)
    report = convert_(model, strict=True)
    found = [f.path for f in report if f.kind == "dense block"]
    assert found == [f"layers.{i}" for i in range(LAYERS)]
    assert len(blocks(model)) == LAYERS
    assert_same_training(model, original, IMAGE, rtol=1e-9, steps=2)
