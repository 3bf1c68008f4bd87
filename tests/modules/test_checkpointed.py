"""Checkpointed blocks are torchvision's in memory, and the naive ones in what they compute."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision

from efficient_densenet import DenseNet, densenet_cifar, estimate, fashion_densenet
from efficient_densenet.modules.checkpointed import checkpointed_


def test_checkpointed_blocks_need_torchvisions_memory() -> None:
    theirs = torchvision.models.DenseNet(16, (3, 4, 2), 16, memory_efficient=True)
    ours = checkpointed_(DenseNet(16, (3, 4, 2), 16, recompute="none"))
    expected, found = (estimate(m, (4, 3, 64, 64), target=(4,)) for m in (theirs, ours))
    assert (found.kept, found.peak.total) == (expected.kept, expected.peak.total)


NETWORKS = {
    "basic layers": lambda: fashion_densenet(recompute="none", in_channels=3),
    "bottlenecks": lambda: densenet_cifar(10, 4, recompute="none"),
}


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_checkpointed_networks_compute_what_naive_ones_do(build) -> None:
    naive = build().double()
    twin = checkpointed_(copy.deepcopy(naive))
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for network in (naive, twin):
        network(images).square().sum().backward()
    for expected, found in zip(naive.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
