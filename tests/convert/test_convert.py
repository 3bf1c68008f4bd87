"""Converted models of other libraries train as before, keep their features alone, and go back."""

import copy
import io
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.densenet import _DenseBlock, _DenseLayer, _Transition

from efficient_densenet import (
    EfficientDenseBlock,
    convert_,
    densenet_cifar,
    estimate,
    explain,
    revert_,
)
from efficient_densenet.functional import autograd
from efficient_densenet.memory import events as timeline
from efficient_densenet.modules.block import RecomputingBlock
from support.compare import (
    assert_all_close,
    assert_same_training,
    randomise_,
    training_results,
)
from support.libraries import NETWORKS, Tiramisu, TiramisuBlock, TiramisuLayer
from support.precision import assert_training_as_precise
from support.storages import live_bytes

every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
MODES = ("norm", "bottleneck")


def pair(network, dtype=torch.float64, **options):
    """A converted network, and the same one as it was."""
    original = network.make().to(dtype)
    randomise_(original)
    converted = copy.deepcopy(original)
    convert_(converted, **options)
    return converted, original


def small():
    return torchvision.models.DenseNet(6, (2, 3), 8, 2, num_classes=5).double()


def image(network, dtype=torch.float64):
    return torch.randn(network.image, dtype=torch.float64).to(dtype)


def blocks(model):
    return [m for m in model.modules() if isinstance(m, RecomputingBlock)]


@pytest.fixture
def runs(monkeypatch):
    """Counts what runs through the recomputing function."""
    found = []
    run = autograd.dense_block

    def counted(x, spec, units):
        found.append(spec)
        return run(x, spec, units)

    monkeypatch.setattr(autograd, "dense_block", counted)
    return found


@pytest.mark.capability("trains as before")
@every_network
@pytest.mark.parametrize("recompute", MODES)
def test_three_steps_train_as_original(network, recompute, runs):
    converted, original = pair(network, recompute=recompute)
    assert_same_training(converted, original, image(network), rtol=1e-9, steps=3)
    assert sum(len(spec.layers) > 0 for spec in runs) == 3 * network.blocks


@pytest.mark.capability("float32 as precise")
@every_network
def test_single_precision_is_as_precise_as_original(network):
    converted, original = pair(network, torch.float32)
    assert_training_as_precise(
        converted, original, lambda: image(network, torch.float32), torch.float32
    )


@every_network
def test_evaluation_equals_originals(network):
    converted, original = pair(network)
    x = image(network)
    with torch.no_grad():
        found, expected = (model.eval()(x) for model in (converted, original))
    assert_all_close({"output": found}, {"output": expected}, 1e-10)


@pytest.mark.capability("keeps features alone")
@every_network
def test_blocks_keep_what_ledger_says(network):
    converted, original = pair(network, torch.float32)
    for block, naive in zip(blocks(converted), same_modules(converted, original), strict=True):
        layers = [layer.spec for layer in block.read_layers(None)]
        channels = layers[0].channels
        features = channels + sum(layer.growth for layer in layers)
        dims = len(layers[0].units[0].conv.stride)
        size = SIDES[dims]
        transition = transition_of(block)
        if transition is not None:
            channels, size = transition.conv.conv.in_channels, 2 * size
        x = torch.randn(4, channels, *(size,) * dims).requires_grad_()
        kept, before = live_bytes(block, x), live_bytes(naive, x)
        ledger = features * 4 * SIDES[dims] ** dims * 4
        assert kept == pytest.approx(ledger, rel=0.02)
        assert before > 2 * kept


SIDES = {1: 900, 2: 30, 3: 10}


def transition_of(block):
    return block.transition() if hasattr(block, "transition") else None


def same_modules(converted, original):
    """The modules of the original that are dense blocks of the converted model."""
    modules = dict(original.named_modules())
    return [modules[name] for name, m in converted.named_modules() if m in set(blocks(converted))]


@pytest.mark.capability("reverts bit for bit")
@every_network
def test_reverted_model_is_original_bit_for_bit(network):
    converted, original = pair(network)
    assert any(
        type(m) is not type(o) for m, o in zip(converted.modules(), original.modules(), strict=True)
    )
    revert_(converted)
    assert not blocks(converted)
    for here, there in zip(converted.modules(), original.modules(), strict=True):
        assert type(here) is type(there)
        assert vars(here).keys() == vars(there).keys()
    x = image(network)
    found, expected = (
        training_results(model, x.clone().requires_grad_()) for model in (converted, original)
    )
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for name, tensor in original.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.capability("copies and pickles")
@every_network
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_whole], ids=lambda c: c.__name__)
def test_copy_is_converted_and_computes_with_its_own_weights(network, copied):
    converted, original = pair(network, recompute="norm")
    twin = copied(converted)
    assert [type(m) for m in twin.modules()] == [type(m) for m in converted.modules()]
    assert [block.recompute for block in blocks(twin)] == ["norm"] * network.blocks
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert_same_training(twin, original, image(network), rtol=1e-9)


@every_network
def test_everything_else_about_model_stays(network):
    original = network.make()
    model = copy.deepcopy(original)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modules, keys, text = list(model.modules()), list(model.state_dict()), repr(model)
    convert_(model)
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, type(o)) for m, o in zip(modules, original.modules(), strict=True))
    own = {id(p) for p in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == own
    plain = [line for line in repr(model).splitlines() if "recompute=" not in line]
    assert plain == [line for line in text.splitlines() if "recompute=" not in line]


@every_network
def test_report_names_every_block(network):
    report = explain(network.make())
    found = [f for f in report if f.kind == "dense block"]
    assert [f.state for f in found] == ["naive, can be converted"] * network.blocks
    model = network.make()
    report = convert_(model)
    assert [f.converted for f in report if f.kind == "dense block"] == [True] * network.blocks
    assert explain(model) == report
    assert all(f.path in str(report) for f in report)


def test_explain_changes_nothing():
    model = small()
    classes = [type(m) for m in model.modules()]
    explain(model)
    assert [type(m) for m in model.modules()] == classes


def test_model_without_blocks_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    report = convert_(model, strict=True)
    assert not report.findings
    assert type(model) is nn.Sequential
    assert "no dense blocks" in str(report)


def test_single_block_converts():
    block = small().features.denseblock1
    report = convert_(block)
    assert report[""].converted
    assert block.why_naive(torch.randn(2, 8, 5, 5, dtype=torch.float64)) is None


def test_auto_keeps_only_features_and_second_call_changes_mode():
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


class OwnForward(_DenseBlock):
    def forward(self, x):
        return super().forward(x) * 2.0


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
    assert report["features.denseblock1"].reason == "OwnForward has a forward function of its own"
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
    model.features.denseblock2.denselayer3.relu1 = nn.Hardswish()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError) as caught:
        convert_(model, strict=True)
    assert str(caught.value) == (
        "2 dense block(s) cannot be converted: features.denseblock1: OwnForward has a forward "
        "function of its own; features.denseblock2: denselayer3.relu1 is a Hardswish"
    )
    assert [type(m) for m in model.modules()] == classes


def own_layer(block):
    block.denselayer1.__class__ = OwnLayer


def group_norm(block):
    block.denselayer2.norm1 = nn.GroupNorm(2, 14).double()


def added_child(block):
    block.denselayer1.extra = nn.Identity()


def hook(block):
    block.denselayer1.conv2.register_forward_hook(lambda *args: None)


REASONS = {
    own_layer: "denselayer1",
    group_norm: "denselayer2.norm1 is a GroupNorm",
    added_child: "denselayer1.extra is a Identity",
    hook: "denselayer1.conv2 has hooks or a forward of its own",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_what_is_not_known_falls_back_and_says_why(change):
    """Before the conversion the block is left alone; after it, it runs as it was."""
    reason, x = REASONS[change], torch.randn(3, 3, 36, 32, dtype=torch.float64)
    early, late = small(), small()
    change(early.features.denseblock1)
    assert reason in convert_(early)["features.denseblock1"].reason
    convert_(late)
    original = copy.deepcopy(late)
    revert_(original)
    for model in (late, original):
        change(model.features.denseblock1)
    assert reason in late.features.denseblock1.why_naive(x[:, :1].expand(-1, 8, -1, -1))
    assert_same_training(late, original, x, rtol=1e-9)


def test_segmentation_encoder_says_that_it_calls_transitions_by_name():
    report = convert_(NETWORKS["segmentation-encoder"].make())
    reasons = {f.reason for f in report if f.kind != "dense block"}
    assert reasons == {"DenseNetEncoder calls its parts one by one"}


def test_our_own_blocks_are_left_as_they_are():
    model = densenet_cifar(10, 4)
    report = convert_(model, strict=True)
    assert {f.reason for f in report} == {"is efficient by itself"}
    assert type(model.features.denseblock1) is EfficientDenseBlock


def test_transition_reads_features_inside_block(runs):
    model = small()
    convert_(model)
    model(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert [(len(spec.layers), spec.exit is not None) for spec in runs] == [(2, True), (3, False)]


def test_checkpointed_model_learns_its_statistics_once():
    """torchvision's own mode updates them twice."""
    flagged, plain = (
        torchvision.models.DenseNet(6, (2, 3), 8, 2, memory_efficient=flag).double()
        for flag in (True, False)
    )
    plain.load_state_dict(flagged.state_dict())
    convert_(flagged)
    assert_same_training(flagged, plain, torch.randn(2, 3, 36, 32).double(), rtol=1e-9, steps=2)


class Sparse(TiramisuBlock):
    """Connects each layer to the input and the last one only."""

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([layer(x), x], 1)
        return x


class Scaling(TiramisuLayer):
    def forward(self, x):
        return 2.0 * super().forward(x)


def test_block_of_no_library_that_connects_otherwise_is_left_alone():
    model = Tiramisu()
    model.down.__class__ = Sparse
    report = convert_(model)
    assert "does not connect densely" in report["down"].reason
    assert report["middle"].converted


def test_layer_of_no_library_with_its_own_forward_is_left_alone():
    model = Tiramisu()
    model.down.layers[1].__class__ = Scaling
    assert convert_(model)["down"].reason == "Scaling has a forward function of its own"


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("library", ["MONAI", "tiramisu", "pytorchcv"])
def test_dropout_module_drops_what_it_says(library, recompute):
    """Whole maps by ``Dropout2d``; the gradient is that of the masks that the forward drew."""
    if library == "MONAI":
        nets = pytest.importorskip("monai.networks.nets.densenet")
        block = nets._DenseBlock(2, 2, 4, 2, 3, 0.4)
    elif library == "tiramisu":
        block = TiramisuBlock(4, 3, 2, drop_rate=0.4)
    else:
        unit = pytest.importorskip("pytorchcv.models.densenet").DenseUnit
        block = nn.Sequential(unit(4, 7, 0.4), unit(7, 10, 0.4))
    block = block.double()
    convert_(block, recompute=recompute, strict=True)
    x = torch.randn(64, 4, 3, 3, dtype=torch.float64)
    assert block.why_naive(x) is None
    new = block(x)[:, 4:]
    dropped = (new == 0).flatten(2)
    whole = dropped.all(2)
    assert 0.3 < whole.double().mean() < 0.5 if library != "pytorchcv" else not whole.all()
    assert library == "pytorchcv" or bool((whole == dropped.any(2)).all())
    assert 0.3 < dropped.double().mean() < 0.5

    def seeded(x):
        torch.manual_seed(1)
        return block(x)

    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.track_running_stats = False
    assert torch.autograd.gradcheck(seeded, torch.randn(2, 4, 3, 3).double().requires_grad_())


def activation_peak(report):
    """Most bytes at a time of all that dies in a step: no parameter, no gradient that is left."""
    died = {event.storage for event in report.events if event.size < 0}
    return max(timeline.live_bytes([e for e in report.events if e.storage in died]))


def test_volumetric_network_peaks_at_one_sixth_and_keeps_one_fifteenth():
    nets = pytest.importorskip("monai.networks.nets")
    model = nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=2)
    step = partial(estimate, model, (1, 1, 64, 64, 64), target=(1,), device="cuda")
    naive = step()
    convert_(model)
    converted = step()
    assert 6 * activation_peak(converted) <= activation_peak(naive)
    assert 15 * converted.kept <= naive.kept


def test_features_can_be_sliced_and_traced():
    model = small()
    convert_(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(model)
    model.eval()
    traced.eval()
    assert torch.allclose(traced(x), model(x))
    head = model.features[:6]
    assert torch.equal(
        head(x), model.features.transition1(model.features[:5](x))
    ) or torch.allclose(head(x), model.features.transition1(model.features[:5](x)))


def test_output_has_layout_of_image():
    model = small()
    convert_(model)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert model.features(x).is_contiguous()
    last = model.features(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_no_library_is_imported_until_model_of_it_appears():
    libraries = ["timm", "monai", "torchxrayvision", "torchreid", "pytorchcv"]
    libraries.append("segmentation_models_pytorch")
    code = f"""
import sys, torch, efficient_densenet
efficient_densenet.convert_(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)))
print([name for name in {libraries} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_known_classes_are_those_of_libraries():
    block = _DenseBlock(2, 8, 2, 6, 0.0)
    convert_(block)
    assert isinstance(block, _DenseBlock)
    assert issubclass(type(block), _DenseBlock)
    assert type(block).__name__ == "_DenseBlock"
    transition = _Transition(8, 4)
    convert_(transition)
    assert isinstance(transition, _Transition)
    assert transition.why_naive(torch.randn(2, 8, 4, 4)) is None


class TestGradCam:
    """The maps of the package ``grad-cam`` before and after the conversion."""

    @pytest.mark.parametrize("target", ["features.denseblock2.denselayer3", "features"])
    def test_map_is_unchanged(self, target):
        cam = pytest.importorskip("pytorch_grad_cam")
        model = small().eval()
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        maps = []
        for _ in range(2):
            with cam.GradCAM(model=model, target_layers=[model.get_submodule(target)]) as grad_cam:
                maps.append(torch.from_numpy(grad_cam(x.clone(), None)))
            convert_(model)
        assert maps[0].abs().max() > 0
        assert_all_close({"map": maps[1]}, {"map": maps[0]}, 1e-6)

    @pytest.mark.slow
    @pytest.mark.parametrize("target", ["features.denseblock4.denselayer16", "features"])
    def test_map_of_densenet121_is_unchanged(self, target):
        cam = pytest.importorskip("pytorch_grad_cam")
        model = torchvision.models.densenet121().eval()
        x = torch.randn(1, 3, 96, 96)
        maps = []
        for _ in range(2):
            with cam.GradCAM(model=model, target_layers=[model.get_submodule(target)]) as grad_cam:
                maps.append(torch.from_numpy(grad_cam(x.clone(), None)))
            convert_(model)
        assert maps[0].abs().max() > 0
        assert_all_close({"map": maps[1]}, {"map": maps[0]}, 1e-3)
