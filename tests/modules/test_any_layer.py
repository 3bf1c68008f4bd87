"""A dense layer of any kind trains as in the naive block, and the block keeps only its features."""

import math

import pytest
import torch

from efficient_densenet import EfficientDenseBlock, estimate
from efficient_densenet.modules.naive import DenseBlock
from support.compare import (
    assert_all_close,
    assert_efficient,
    assert_same_state,
    block_pair,
    image,
    upstream_for,
)
from support.layers import CHANGES, changes, each

CHANGED = dict(changes())


def changed_pair(change, **options):
    """An efficient block and its naive copy, after a change that may draw random numbers."""

    def alike(block):
        torch.manual_seed(7)
        change(block)
        block.double()

    return block_pair(change=alike, **options)


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_any_layer_trains_as_naive(change):
    efficient, naive = changed_pair(change)
    assert_efficient(efficient, image())
    torch.manual_seed(3)
    drawn = []
    results = []
    for block in (efficient, naive):
        torch.manual_seed(3)
        drawn.append(steps(block, results))
    assert_all_close(results[0], results[1], 1e-9)
    assert_same_state(efficient, naive, rtol=1e-9)
    assert torch.equal(*drawn)


def steps(block, results, count=3):
    """Trains, and returns the state of the random generator after it."""
    optimizer = torch.optim.SGD(block.parameters(), lr=0.05, momentum=0.9)
    found = {}
    for step in range(count):
        x = image_of(step).requires_grad_()
        optimizer.zero_grad()
        out = block(x)
        out.backward(upstream_for(out))
        found[f"{step}: output"], found[f"{step}: input"] = out.detach(), x.grad
        grads = {f"{step}: {name}": p.grad for name, p in block.named_parameters()}
        found |= {name: None if g is None else g.clone() for name, g in grads.items()}
        optimizer.step()
    results.append(found)
    return torch.get_rng_state()


def image_of(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(3, 5, 7, 5, dtype=torch.float64, generator=generator)


DEEP = ("group-norm", "instance-norm", "squeeze-and-excitation", "weight-norm", "lora", "hook")


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", DEEP)
def test_deep_block_keeps_features_and_peaks_near_one_layer(name, dims):
    def build(kind):
        torch.manual_seed(0)
        block = kind(24, 24, 4, 12, dims=dims)
        each(CHANGES[name])(block)
        return block

    size = {2: (32, 32), 3: (8, 12, 10)}[dims]
    with torch.device("meta"):
        efficient, naive = build(EfficientDenseBlock), build(DenseBlock)
        layer = build(DenseBlock)["denselayer24"]
    report, plain = (estimate(block, (4, 24, *size)) for block in (efficient, naive))
    features = 4 * 4 * math.prod(size) * (24 + 24 * 12)
    assert report.kept <= 1.05 * features
    assert plain.kept > 10 * features
    one = estimate(layer, torch.empty(4, 24 + 23 * 12, *size).requires_grad_())
    assert report.peak.total <= 4 * features + one.peak.total
