"""Whole blocks and networks through the Triton kernels."""

import copy

import pytest
import torch

from efficient_densenet import DenseNet
from efficient_densenet.kernels.layout import outer_format
from efficient_densenet.kernels.triton import launch, operations
from support.compare import (
    FORMATS,
    assert_close,
    assert_efficient,
    assert_same_training,
    block_pair,
    gradients,
    image,
    randomise_,
    training_results,
)
from support.layers import each, every_second, lora
from support.marks import both_kinds, either_mode
from support.precision import assert_training_as_precise


@pytest.fixture(autouse=True)
def with_triton(monkeypatch):
    """Everything runs through Triton, and something does."""
    launched = []
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda *a, **k: (launched.append(a[0]), run(*a, **k)))
    yield
    assert launched


@pytest.fixture(params=["planes", "channels_last"])
def layout(request, monkeypatch):
    """The layout inside, which would always be channels_last."""
    if request.param == "planes":
        monkeypatch.setattr(operations, "inner_format", outer_format)
        return torch.contiguous_format
    return torch.channels_last


@either_mode
@both_kinds
def test_training_step_matches_naive_block(recompute, bn_size, layout):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute, dtype=torch.float32)
    x = image(dtype=torch.float32)
    assert_efficient(efficient, x)
    assert_same_training(efficient, naive, x.to(memory_format=layout), rtol=2e-4, steps=2)


@either_mode
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("spread", [each, every_second], ids=["all", "second"])
def test_chain_of_known_and_other_parts_matches_naive_block(spread, dims, recompute):
    """Of norms with an activation alone the kernels make, and read, whole maps."""

    def alike(block):
        torch.manual_seed(7)
        spread(lora)(block)

    efficient, naive = block_pair(dims=dims, recompute=recompute, dtype=torch.float32, change=alike)
    x = image(dims=dims, dtype=torch.float32)
    assert_efficient(efficient, x)
    assert_same_training(efficient, naive, x, rtol=2e-4)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions_match_naive_block(dims):
    efficient, naive = block_pair(dims=dims, dtype=torch.float32)
    assert_same_training(efficient, naive, image(dims=dims, dtype=torch.float32), rtol=2e-4)


@both_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_step_is_as_precise_as_naive_block(bn_size, dtype):
    efficient, naive = block_pair(bn_size=bn_size, dtype=dtype)
    assert_training_as_precise(efficient, naive, lambda: image(dtype=dtype), dtype, draws=5)


def test_frozen_norms_and_weights_match_naive_block():
    def change(block):
        block.eval()
        for i, parameter in enumerate(block.parameters()):
            parameter.requires_grad_(i % 3 > 0)

    efficient, naive = block_pair(dtype=torch.float32, change=change)
    assert_same_training(efficient, naive, image(dtype=torch.float32), rtol=2e-4)


def test_autocast_runs_and_keeps_types_of_naive_block(device):
    efficient, naive = block_pair(dtype=torch.float32)
    x = image(dtype=torch.float32)
    found = []
    for block in (efficient, naive):
        with torch.autocast(device, dtype=torch.bfloat16):
            out = block(x)
        out.sum().backward()
        found.append([out, *(p.grad for p in block.parameters())])
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == expected.dtype
        assert ours.isfinite().all()
    assert (found[0][0] - found[1][0]).abs().max() < 0.1 * found[1][0].abs().max()


def test_network_matches_naive_network(layout):
    """Stem, transitions and head, beside the blocks."""
    sizes = {"growth_rate": 3, "block_config": (2, 2), "num_init_features": 6, "bn_size": 2}
    efficient, naive = (
        DenseNet(**sizes, num_classes=5, recompute=mode) for mode in ("bottleneck", "none")
    )
    randomise_(naive)
    efficient.load_state_dict(naive.state_dict())
    x = torch.randn(3, 3, 32, 32).to(memory_format=layout)
    assert_same_training(efficient, naive, x, rtol=1e-3)


@either_mode
def test_nan_is_not_lost(recompute, layout):
    """A network that has seen one says so, in every place where the naive one does."""
    network = DenseNet(3, (2, 2), 6, 2, num_classes=5, recompute=recompute)
    naive = DenseNet(3, (2, 2), 6, 2, num_classes=5, recompute="none")
    naive.load_state_dict(network.state_dict())
    x = torch.randn(3, 3, 32, 32).to(memory_format=layout)
    x[1, 1, 9, 9] = torch.nan
    found = []
    for model in (network, naive):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        out.sum().backward()
        found.append({"output": out, **gradients(model, leaf)})
    assert found[1]["output"].isnan().all()
    for name, expected in found[1].items():
        assert torch.equal(found[0][name].isnan(), expected.isnan()), name


@pytest.mark.parametrize(("named", "dtype"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_gradients_are_summed_in_type_that_is_named(named, dtype, monkeypatch):
    if named:
        monkeypatch.setenv(operations.GRADIENTS, named)
    summed, run = set(), launch.run

    def noting(kernel, grid, *args, **constants):
        if kernel.__name__ == "input_gradient":
            summed.add(args[3].data.dtype)
        run(kernel, grid, *args, **constants)

    monkeypatch.setattr(launch, "run", noting)
    block, _ = block_pair(dtype=torch.bfloat16)
    x = image(dtype=torch.bfloat16).requires_grad_()
    block(x).sum().backward()
    assert summed == {dtype}
    assert x.grad.dtype == torch.bfloat16


def test_compiled_block_of_16_bits_is_that_of_eager_mode():
    """Its operators say of the input's gradient which type it has."""
    block, _ = block_pair(dtype=torch.bfloat16)
    x = image(dtype=torch.bfloat16)
    compiled = torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True)
    found = [training_results(b, x.clone().requires_grad_()) for b in (compiled, block)]
    assert all(torch.equal(a, b) for a, b in zip(*(f.values() for f in found), strict=True))


def test_compiled_block_matches_naive_block():
    """By operators, whose results may not share memory."""
    efficient, naive = block_pair(dtype=torch.float32)
    x = image(dtype=torch.float32)
    compiled = torch.compile(efficient, backend="aot_eager", fullgraph=True)
    found = [training_results(b, x.clone().requires_grad_()) for b in (compiled, naive)]
    for ours, expected in zip(*(f.values() for f in found), strict=True):
        assert_close("of a compiled block", ours, expected, 2e-4)


def test_results_are_reproducible():
    block, _ = block_pair(dtype=torch.bfloat16)
    x = image(dtype=torch.bfloat16).to(memory_format=FORMATS[2])
    found = []
    for twin in (block, copy.deepcopy(block)):
        leaf = x.clone().requires_grad_()
        twin(leaf).square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in twin.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
