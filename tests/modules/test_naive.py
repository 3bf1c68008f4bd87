"""The naive layers are torchvision's, in more dimensions and kinds."""

import pytest
import torch
from torch import nn
from torchvision.models.densenet import _DenseBlock, _DenseLayer, _Transition

from efficient_densenet.modules.naive import BottleneckLayer, DenseBlock, Transition, compressed
from support.compare import KINDS, SPATIAL, assert_close, assert_same_training, image, randomise_


def test_unwritten_memory_is_nan():
    x = torch.ones(3)
    empties = (torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (1,)))
    assert all(e.isnan().all() for e in empties)


def test_bottleneck_layer_matches_torchvision():
    ours, theirs = BottleneckLayer(5, 3, 2, 0.0).double(), _DenseLayer(5, 3, 2, 0.0).double()
    randomise_(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert_same_training(ours, theirs, image(), rtol=1e-14)


def test_block_matches_torchvision():
    ours, theirs = DenseBlock(3, 5, 2, 3).double(), _DenseBlock(3, 5, 2, 3, 0.0).double()
    randomise_(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert_same_training(ours, theirs, image(), rtol=1e-14)


def test_transition_matches_torchvision():
    ours, theirs = Transition(5, 2).double(), _Transition(5, 2).double()
    randomise_(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert_same_training(ours, theirs, image(), rtol=1e-14)


@pytest.mark.parametrize("dims", SPATIAL)
@pytest.mark.parametrize("bn_size", KINDS.values(), ids=KINDS)
def test_layer_concatenates_list(bn_size, dims):
    layer = DenseBlock(1, 5, bn_size, 3, dims=dims, bias=True).double()["denselayer1"]
    x = image(dims=dims)
    assert layer(x).shape == (3, 3, *SPATIAL[dims])
    assert_close("new features", layer([x[:, :2], x[:, 2:]]), layer(x), 1e-14)


@pytest.mark.parametrize("dims", SPATIAL)
def test_basic_block_is_batch_norm_relu_convolution(dims):
    block = DenseBlock(1, 5, None, 3, dims=dims, bias=True).double()
    layer = block["denselayer1"]
    x = image(dims=dims)
    axes = (0, *range(2, x.dim()))
    normed = (x - x.mean(axes, keepdim=True)) / (x.var(axes, False, keepdim=True) + 1e-5).sqrt()
    expected = torch.cat([x, layer.conv1(normed.relu())], 1)
    assert_close("output", block(x), expected, 1e-12)


@pytest.mark.parametrize("dims", SPATIAL)
def test_transition_halves_every_dimension(dims):
    x = image(dims=dims)
    out = Transition(5, 2, dims=dims).double()(x)
    assert out.shape == (3, 2, *(s // 2 for s in SPATIAL[dims]))


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_bias_is_in_every_convolution(bias):
    block = DenseBlock(2, 5, 2, 3, bias=bias)
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 4
    assert all((c.bias is not None) == bias for c in convs)


def test_dropout_drops_in_training_only():
    block = DenseBlock(1, 5, None, 3, drop_rate=1.0).double()
    x = image()
    assert not block(x)[:, 5:].any()
    assert block.eval()(x)[:, 5:].all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_layers", 0), ("num_input_features", -1), ("growth_rate", 0), ("bn_size", 0)],
)
def test_size_below_one_is_refused(name, value):
    sizes = {"num_layers": 2, "num_input_features": 5, "bn_size": 2, "growth_rate": 3}
    with pytest.raises(ValueError, match=rf"{name} must be at least 1, got {value}"):
        DenseBlock(**{**sizes, name: value})


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_drop_rate_outside_its_range_is_refused(rate):
    with pytest.raises(ValueError, match=rf"drop_rate must be between 0 and 1, got {rate}"):
        DenseBlock(2, 5, 2, 3, rate)


@pytest.mark.parametrize("dims", [0, 4])
def test_unknown_dims_are_refused(dims):
    with pytest.raises(ValueError, match=rf"dims must be 1, 2 or 3 .*, got {dims}"):
        DenseBlock(2, 5, 2, 3, dims=dims)


@pytest.mark.parametrize(("compression", "kept"), [(1.0, 9), (0.5, 4), (0.34, 3)])
def test_compression_rounds_down(compression, kept):
    assert compressed(9, compression) == kept


@pytest.mark.parametrize("compression", [0.0, -0.5, 1.01])
def test_compression_outside_its_range_is_refused(compression):
    with pytest.raises(ValueError, match=rf"compression must be in \(0, 1\], got {compression}"):
        compressed(9, compression)
