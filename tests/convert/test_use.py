"""What is done with converted models: dropout, slicing, tracing, maps of what they look at."""

import subprocess
import sys
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.densenet import _DenseBlock, _Transition

from efficient_densenet import convert_, estimate
from efficient_densenet.memory import events as timeline
from support.compare import MODES, assert_all_close, assert_same_training
from support.libraries import TiramisuBlock, small
from support.wild import BLOCKS


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
    step = partial(estimate, model, (2, 1, 64, 64, 64), target=(2,), device="cuda")
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


@pytest.mark.parametrize("name", ["A-dict", "B-dropout", "C-new-first", "D-only-new", "stage"])
def test_converted_block_compiles_in_either_mode(name):
    """Into one graph, in which the block is one operator; anew when the mode changes."""
    block, x, graphs = BLOCKS[name].make(), BLOCKS[name].input(), []
    convert_(block, strict=True)

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=keep)
    for training in (True, False):
        block.train(training)
        torch.manual_seed(0)
        found = compiled(x)
        torch.manual_seed(0)
        assert_all_close({"output": found}, {"output": block(x)}, 1e-5)
    assert len(graphs) == 2
    assert all("efficient_densenet.block_forward" in graph for graph in graphs)
