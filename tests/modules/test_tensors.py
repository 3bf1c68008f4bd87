"""Inputs that are more than a plain tensor of the type of the weights: as the naive network."""

from __future__ import annotations

import copy

import monai
import pytest
import torch
from monai.data import MetaTensor
from torch import nn
from torchvision import tv_tensors

from efficient_densenet import DenseNet, EfficientDenseBlock, convert_
from efficient_densenet.modules.recomputing import run_naive
from support.compare import assert_close, assert_same_training, block_pair, image


def small_densenet(recompute="bottleneck", dims=2):
    torch.manual_seed(0)
    return DenseNet(4, (2, 2), 8, 2, num_classes=3, in_channels=1, dims=dims, recompute=recompute)


def step(model, x):
    out = model(x)
    out.backward(torch.ones_like(out))
    return out, {name: p.grad.as_subclass(torch.Tensor) for name, p in model.named_parameters()}


def meta_batch(*shape):
    maps = [MetaTensor(torch.randn(shape), meta={"filename": f"{i}.nii"}) for i in range(2)]
    return monai.data.utils.collate_meta_tensor(maps)


@pytest.mark.parametrize("recompute", ["norm", "bottleneck"])
def test_metatensor_trains_and_keeps_class_and_metadata(recompute):
    x = meta_batch(1, 40, 40)
    efficient, naive = small_densenet(recompute), small_densenet("none")
    (out, grads), (expected, naive_grads) = step(efficient, x), step(naive, x)
    assert type(out) is type(expected) is MetaTensor
    assert out.meta == expected.meta and out.is_batch == expected.is_batch
    assert_close("output", out.as_tensor(), expected.as_tensor(), 1e-4)
    for name, grad in grads.items():
        assert_close(name, grad, naive_grads[name], 1e-3)


@pytest.mark.parametrize("dims", [2, 3])
def test_batch_of_monai_loader_trains_converted_monai_network(dims):
    data = [{"image": MetaTensor(torch.randn(1, *(40,) * dims))} for _ in range(2)]
    (batch,) = monai.data.DataLoader(monai.data.Dataset(data), batch_size=2)
    naive = monai.networks.nets.DenseNet(
        dims, 1, 2, init_features=8, growth_rate=4, block_config=(2, 2), bn_size=2
    )
    converted = copy.deepcopy(naive)
    assert convert_(converted).replaced
    (out, grads), (expected, naive_grads) = (
        step(model, batch["image"]) for model in (converted, naive)
    )
    assert type(out) is type(expected)
    assert_close("output", out.as_tensor(), expected.as_tensor(), 1e-4)
    assert grads.keys() == naive_grads.keys()
    for name, grad in grads.items():
        assert_close(name, grad, naive_grads[name], 1e-3)


def test_torchvision_image_gives_what_naive_network_gives():
    x = tv_tensors.Image(torch.randn(2, 1, 40, 40))
    out, expected = small_densenet()(x), small_densenet("none")(x)
    assert type(out) is type(expected)
    assert_close("output", out, expected, 1e-4)


def test_parameter_as_input_gets_its_gradient():
    efficient, naive = block_pair()
    for block in (efficient, naive):
        block.x = nn.Parameter(image().clone())
    torch.manual_seed(1)
    naive.x.data.copy_(efficient.x.data)
    for block in (efficient, naive):
        block(block.x).sum().backward()
    assert_close("gradient", efficient.x.grad, naive.x.grad, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8])
def test_input_of_another_type_than_weights_raises_as_naive_block_does(dtype):
    block = EfficientDenseBlock(2, 4, 2, 4)
    x = torch.ones(2, 4, 5, 5, dtype=dtype)
    with pytest.raises(RuntimeError) as naive:
        run_naive(block, x)
    with (
        pytest.raises(RuntimeError) as efficient,
        pytest.warns(UserWarning, match=f"the input is {dtype}"),
    ):
        block(x)
    assert str(efficient.value) == str(naive.value)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_network_under_cpu_autocast_returns_types_of_naive_network(dims, autocast):
    x = torch.randn(2, 1, *(40,) * dims)
    efficient, naive = small_densenet(dims=dims), small_densenet("none", dims)
    with torch.autocast("cpu", autocast):
        found, expected = x, x
        for ours, theirs in zip(efficient.features, naive.features, strict=True):
            found, expected = ours(found), theirs(expected)
            assert found.dtype == expected.dtype
        out = efficient(x)
        assert out.dtype == naive(x).dtype
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in efficient.parameters())


def test_infinite_running_statistics_stay_infinite():
    efficient, naive = block_pair()
    for block in (efficient, naive):
        block["denselayer1"].norm1.running_mean.fill_(torch.inf)
        block(image())
    assert efficient["denselayer1"].norm1.running_mean.isinf().all()
    assert naive["denselayer1"].norm1.running_mean.isinf().all()


def test_block_called_both_ways_before_one_backward_pass():
    efficient, _ = block_pair()
    outputs = [run_naive(efficient, image()), efficient(image())]
    sum(out.sum() for out in outputs).backward()
    assert all(p.grad is not None for p in efficient.parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_come_out_where_naive_block_has_them(value):
    efficient, naive = block_pair()
    x = image()
    x[1, 2].flatten()[3] = value
    with torch.no_grad():
        for block in (efficient.train(), efficient.eval()):
            naive.train(block.training)
            assert torch.equal(efficient(x).isfinite(), naive(x).isfinite())


def test_training_with_metadata_is_same_training():
    efficient, naive = block_pair()
    assert_same_training(efficient, naive, image(), steps=2, view=lambda x: MetaTensor(x))
