"""Which blocks are converted: chosen by the caller, refused with the reason, left alone."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.densenet import _DenseBlock, _DenseLayer

from efficient_densenet import EfficientDenseBlock, convert_, densenet_cifar
from efficient_densenet.modules.recomputing import Settings
from support.compare import assert_same_training
from support.copies import pickled
from support.libraries import NETWORKS, Tiramisu, TiramisuBlock, TiramisuLayer, blocks, small


def test_model_without_blocks_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    report = convert_(model)
    assert not report.findings
    assert type(model) is nn.Sequential
    assert "no dense blocks" in str(report)
    with pytest.raises(ValueError, match="no dense block was recognised"):
        convert_(model, strict=True)


def test_single_block_converts():
    block = small().features.denseblock1
    report = convert_(block)
    assert report[""].converted
    assert block.why_naive(torch.randn(2, 8, 5, 5, dtype=torch.float64)) is None


def test_default_keeps_only_features_and_second_call_changes_mode():
    model = small()
    convert_(model)
    assert {block.recompute for block in blocks(model)} == {"bottleneck"}
    convert_(model, recompute="norm")
    assert {block.recompute for block in blocks(model)} == {"norm"}


@pytest.mark.parametrize("recompute", ["none", "all", None])
def test_unknown_mode_is_refused(recompute):
    model = small()
    with pytest.raises(ValueError, match=rf"recompute must be one of .*got {recompute!r}"):
        convert_(model, recompute=recompute)
    assert not blocks(model)


def test_filter_chooses_by_module_and_name():
    model = small()
    seen = []

    def only_the_second(module, name):
        seen.append((name, module))
        return name == "features.denseblock2"

    report = convert_(model, filter_fn=only_the_second, strict=True)
    assert [f.path for f in report.replaced] == ["features.denseblock2"]
    assert report["features.denseblock1"].reason == "filter_fn leaves it out"
    assert all(model.get_submodule(name) is module for name, module in seen)


NO_JOIN = "the forward function does not return a concatenation of maps"


class OwnForward(_DenseBlock):
    def forward(self, x):
        return super().forward(x) * 2.0


class Asking(_DenseBlock):
    def forward(self, x):
        return super().forward(x if x.shape[-1] < 1000 else x[..., :1000])


class SameForward(_DenseBlock):
    pass


class OwnLayer(_DenseLayer):
    def forward(self, input):
        return super().forward(input) * 2.0


def with_block(cls):
    model = small()
    model.features.denseblock1.__class__ = cls
    return model


def test_subclass_with_its_own_forward_is_left_alone():
    model = with_block(OwnForward)
    report = convert_(model)
    assert type(model.features.denseblock1) is OwnForward
    assert report["features.denseblock1"].reason == NO_JOIN
    assert report["features.denseblock2"].converted


def test_subclass_without_its_own_forward_is_converted():
    model = with_block(SameForward)
    assert convert_(model)["features.denseblock1"].converted
    assert isinstance(pickled(model).features.denseblock1, SameForward)


def test_forward_of_instance_leaves_its_block_alone():
    model = small()
    block = model.features.denseblock1
    block.forward = lambda x: x
    assert not convert_(model)["features.denseblock1"].converted


def test_strict_raises_with_reasons_and_changes_nothing():
    model = with_block(OwnForward)
    model.features.denseblock2.__class__ = Asking
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError) as caught:
        convert_(model, strict=True)
    assert str(caught.value) == (
        f"2 dense block(s) cannot be converted: features.denseblock1: {NO_JOIN}; "
        "features.denseblock2: the forward function asks a map for its shape"
    )
    assert [type(m) for m in model.modules()] == classes


def own_layer(block):
    block.denselayer1.__class__ = OwnLayer


def group_norm(block):
    block.denselayer2.norm1 = nn.GroupNorm(2, 14).double()


def hook(block):
    block.denselayer1.conv2.register_forward_hook(lambda *args: None)


@pytest.mark.parametrize("change", [own_layer, group_norm, hook], ids=lambda f: f.__name__)
def test_layer_of_any_kind_is_run_again(change):
    """Whether it is there before the conversion or comes after it."""
    x = torch.randn(3, 3, 36, 32, dtype=torch.float64)
    early, late = small(), small()
    late.load_state_dict(early.state_dict())
    change(early.features.denseblock1)
    original = copy.deepcopy(early)
    convert_(early, strict=True)
    convert_(late)
    change(late.features.denseblock1)
    late.load_state_dict(original.state_dict())
    for model in (early, late):
        block = model.features.denseblock1
        assert block.why_naive(x[:, :1].expand(-1, 8, -1, -1)) is None
        assert_same_training(model, copy.deepcopy(original), x, rtol=1e-9)


def test_segmentation_encoder_says_that_it_calls_transitions_by_name():
    report = convert_(NETWORKS["segmentation-encoder"].make())
    reasons = {f.reason for f in report if f.kind != "dense block"}
    assert reasons == {"its parts are called one by one"}


def test_our_own_blocks_are_left_as_they_are():
    model = densenet_cifar(10, 4)
    report = convert_(model, strict=True)
    assert {(f.converted, f.reason) for f in report} == {(True, None)}
    assert type(model.features.denseblock1) is EfficientDenseBlock


class Doubling(TiramisuBlock):
    """Connects densely, but each layer reads twice what it should."""

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(2 * x)], 1)
        return x


class Scaling(TiramisuLayer):
    def forward(self, x):
        return 2.0 * super().forward(x)


def test_block_of_no_library_that_connects_otherwise_is_left_alone():
    model = Tiramisu()
    model.down.__class__ = Doubling
    report = convert_(model)
    assert report["down"].reason == "the forward function computes mul"
    assert report["middle"].converted


def test_layer_of_no_library_with_its_own_forward_is_run_again():
    original = Tiramisu().double()
    original.down.layers[1].__class__ = Scaling
    model = copy.deepcopy(original)
    assert convert_(model, strict=True)["down"].converted
    x = torch.randn(3, 3, 18, 16, dtype=torch.float64)
    assert_same_training(model, original, x, rtol=1e-9)


def test_mode_is_that_of_every_converted_module():
    model = small()
    convert_(model, recompute="norm")
    model.features.transition1.recompute = "none"
    convert_(model, recompute="bottleneck")
    modes = {part.recompute for part in model.modules() if isinstance(part, Settings)}
    assert modes == {"bottleneck"}
