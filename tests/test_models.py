"""The models are torchvision's and the papers', and train alike in every mode."""

import pytest
import torch
import torchvision
from torch import nn
from torch.ao.quantization.quantize_fx import prepare_fx
from torchvision.models.feature_extraction import create_feature_extractor

from efficient_densenet import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_cifar,
    fashion_densenet,
)
from support.compare import (
    MODES,
    assert_all_close,
    assert_close,
    assert_same_training,
    randomise_,
    training_results,
)
from support.marks import either_mode

IMAGENET = [densenet121, densenet161, densenet169, densenet201]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def names(build):
    return build.__name__


@pytest.mark.parametrize("build", IMAGENET, ids=names)
def test_imagenet_model_has_torchvisions_state_dict(build):
    with torch.device("meta"):
        ours, theirs = build(), getattr(torchvision.models, build.__name__)()
    assert parameters(ours) == parameters(theirs)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert list(shapes[0]) == list(shapes[1])


def test_densenet264_has_its_layers():
    with torch.device("meta"):
        model = densenet264()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 264
    assert model.classifier.in_features == 2688


def test_cifar_bc_100_12_has_papers_parameters():
    assert parameters(densenet_cifar(100, 12)) == 769_162


@pytest.mark.parametrize(
    ("arguments", "millions"),
    [
        ((40, 12, False, 1.0), 1.0),
        ((100, 12, False, 1.0), 7.0),
        ((100, 24, False, 1.0), 27.2),
        ((100, 12), 0.8),
        ((250, 24), 15.3),
        ((190, 40), 25.6),
    ],
)
def test_cifar_model_has_papers_size(arguments, millions):
    with torch.device("meta"):
        model = densenet_cifar(*arguments)
    assert round(parameters(model) / 1e6, 1) == millions


@either_mode
def test_fashion_densenet_has_its_parameters_and_channels(recompute):
    model = fashion_densenet(recompute=recompute).eval()
    assert parameters(model) == 758_226
    channels = []
    for name, module in model.features.named_children():
        if name == "pool0" or name.startswith("denseblock"):
            module.register_forward_hook(lambda m, args, out: channels.append(out.shape[1]))
    with torch.no_grad():
        assert model(torch.randn(1, 1, 224, 224)).shape == (1, 10)
    assert channels == [64, 192, 224, 240, 248]


@either_mode
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_densenet121_gives_torchvisions_logits(recompute, training):
    theirs = torchvision.models.densenet121().double()
    randomise_(theirs)
    ours = densenet121(recompute=recompute).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.train(training), theirs.train(training)
    x = torch.randn(3, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        logits = {"logits": ours(x)}
        expected = {"logits": theirs(x)}
    assert_all_close(logits | ours.state_dict(), expected | theirs.state_dict(), 1e-9)


@either_mode
def test_small_model_trains_as_torchvisions(recompute):
    size = (4, (2, 3), 6, 2, 0.0, 5)
    theirs = torchvision.models.DenseNet(*size).double()
    randomise_(theirs)
    ours = DenseNet(*size, recompute=recompute).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(4, 3, 33, 35, dtype=torch.float64)
    assert_same_training(ours, theirs, x, steps=3, rtol=1e-9)


MODELS = {
    "bottleneck-imagenet": {"bn_size": 2, "in_channels": 2},
    "basic-cifar": {"bn_size": None, "stem": "cifar"},
    "bias-uncompressed": {"bn_size": 2, "stem": "cifar", "bias": True, "compression": 1.0},
    "1d": {"dims": 1},
    "3d": {"dims": 3, "bn_size": None, "stem": "cifar"},
}


@either_mode
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_three_steps_match_naive_path(recompute, options):
    size = (3, (2, 3), 5)
    model = DenseNet(*size, num_classes=4, recompute=recompute, **options).double()
    naive = DenseNet(*size, num_classes=4, recompute="none", **options).double()
    randomise_(naive)
    model.load_state_dict(naive.state_dict(), strict=True)
    spatial = (19, 17, 18)[: options.get("dims", 2)]
    x = torch.randn(3, options.get("in_channels", 3), *spatial, dtype=torch.float64)
    assert_same_training(model, naive, x, steps=3, rtol=1e-9)


def test_dropout_in_model_is_equal_in_both_modes():
    models = [densenet_cifar(22, 4, drop_rate=0.2, recompute=mode).double() for mode in MODES]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64).requires_grad_()
    results = []
    for model in models:
        torch.manual_seed(5)
        results.append(training_results(model, x))
    assert_all_close(*results, 1e-9)


@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
def test_drop_rate_reaches_every_layer(drop_rate):
    model = densenet_cifar(22, 4, drop_rate=drop_rate)
    rates = [m.drop_rate for m in model.modules() if hasattr(m, "drop_rate")]
    assert rates == [drop_rate] * 9


@pytest.mark.parametrize(
    ("depth", "bottleneck", "step", "nearest"),
    [(101, True, 6, 100), (7, True, 6, 10), (4, True, 6, 10), (41, False, 3, 40), (1, False, 3, 7)],
)
def test_impossible_depth_is_refused_with_nearest_possible(depth, bottleneck, step, nearest):
    message = rf"{step} \* n \+ 4 .* got {depth}; the nearest is {nearest}$"
    with pytest.raises(ValueError, match=message):
        densenet_cifar(depth, 12, bottleneck)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "mnist"}, "stem must be one of .*'mnist'"),
        ({"dims": 4}, "dims must be 1, 2 or 3 .*got 4"),
        ({"compression": 0.0}, r"compression must be in \(0, 1\], got 0.0"),
        ({"recompute": "all"}, "all"),
        ({"drop_rate": 2.0}, "drop_rate must be between 0 and 1, got 2.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DenseNet(4, (2, 2), 8, **options)


def test_pretrained_weights_are_refused_with_line_that_loads_them():
    with pytest.raises(TypeError, match=r"torchvision\.models\.densenet169\(weights="):
        densenet169(weights="DEFAULT")
    assert densenet169(weights=None, num_classes=2).classifier.out_features == 2


def test_flag_of_torchvision_is_refused_with_argument_to_use():
    with pytest.raises(TypeError, match='memory_efficient=True: say recompute="norm"'):
        densenet121(memory_efficient=True)


@pytest.mark.parametrize("recompute", ["none", "norm"])
def test_fx_traces_naive_path(recompute):
    model = DenseNet(4, (2, 2), 8, 2, num_classes=3, recompute=recompute).double().eval()
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(model)
    assert "efficient_densenet" not in traced.code
    assert_close("output", traced(x), model(x), 1e-10)
    extracted = create_feature_extractor(model, {"features.denseblock1.cat": "features"})
    assert extracted(x)["features"].shape == (2, 16, 10, 10)


def test_graph_mode_quantisation_prepares_network():
    model = DenseNet(4, (2, 2), 8, 2, num_classes=3).eval()
    mapping = torch.ao.quantization.get_default_qconfig_mapping()
    prepared = prepare_fx(model, mapping, (torch.randn(1, 3, 40, 40),))
    assert prepared(torch.randn(2, 3, 40, 40)).shape == (2, 3)
