"""Evaluation without gradients: the naive result, from one buffer, with batch norms folded."""

import pytest
import torch
from torch import nn

from efficient_densenet import convert_, densenet_cifar
from efficient_densenet.functional import inference
from support.compare import FORMATS, SPATIAL, assert_close, block_pair, image, randomise_
from support.libraries import NETWORKS
from support.marks import both_kinds
from support.precision import DTYPES, relative_error


@pytest.fixture
def inferred(monkeypatch):
    """Counts the blocks that are only inferred."""
    found = []
    run = inference.infer_block
    monkeypatch.setattr(inference, "infer_block", lambda *args: found.append(args) or run(*args))
    return found


@both_kinds
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dims", SPATIAL)
def test_block_infers_what_naive_block_does(bn_size, dims, bias, inferred):
    efficient, naive = block_pair(bn_size=bn_size, dims=dims, bias=bias, change=nn.Module.eval)
    x = image(dims=dims)
    for layout in (torch.contiguous_format, FORMATS.get(dims, torch.contiguous_format)):
        x = x.contiguous(memory_format=layout)
        with torch.no_grad():
            out, expected = efficient(x), naive(x)
        assert_close("output", out, expected, 1e-10)
        assert out.is_contiguous(memory_format=layout)
    assert len(inferred) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_is_as_precise_as_naive_block(dtype, inferred):
    efficient, naive = block_pair(12, 24, 4, 12, dtype=dtype, change=nn.Module.eval)
    x = image(8, 24, dtype=dtype)
    with torch.no_grad():
        found, expected = efficient(x), naive(x)
        truth = naive.double()(x.double())
    allowed = 1.5 * relative_error(expected, truth) + torch.finfo(dtype).eps
    assert inferred
    assert relative_error(found, truth) <= allowed


def test_norms_without_parameters_are_folded(inferred):
    def plain(block):
        for layer in block.values():
            layer.norm2 = nn.BatchNorm2d(6, affine=False).double()
        block.eval()

    efficient, naive = block_pair(change=plain)
    with torch.no_grad():
        x = image()
        assert_close("output", efficient(x), naive(x), 1e-10)
    assert inferred


def test_autocast_infers_in_naive_types(inferred):
    efficient, naive = block_pair(dtype=torch.float32, change=nn.Module.eval)
    x = image(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = efficient(x), naive(x)
    assert found.dtype == expected.dtype
    assert_close("output", found, expected, 2e-2)
    assert inferred


@pytest.mark.parametrize("state", ["training", "gradients", "one norm in training"])
def test_what_may_learn_is_not_only_inferred(state, inferred):
    efficient, _ = block_pair(change=nn.Module.eval)
    if state == "training":
        efficient.train()
    if state == "one norm in training":
        efficient["denselayer2"].norm2.train()
    with torch.set_grad_enabled(state == "gradients"):
        efficient(image())
    assert not inferred


@pytest.mark.capability("infers as before")
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_converted_network_infers_what_original_does(network, inferred):
    model = network.make().double().eval()
    randomise_(model)
    x = torch.randn(network.image, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        convert_(model)
        assert_close("output", model(x), expected, 1e-10)
    assert len(inferred) >= network.blocks


def test_network_of_frozen_parameters_infers_with_gradients_enabled(inferred):
    model = densenet_cifar(10, 4).eval().requires_grad_(False)
    assert not model(torch.randn(2, 3, 16, 16)).requires_grad
    assert len(inferred) == 3


def test_wrong_fold_is_found(monkeypatch):
    """The comparison can fail: a fold that forgets the shift."""
    efficient, naive = block_pair(change=nn.Module.eval)
    fold = inference.folded
    monkeypatch.setattr(inference, "folded", lambda *args: fold(*args)._replace(conv_bias=None))
    x = image()
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_close("output", efficient(x), naive(x), 1e-10)
