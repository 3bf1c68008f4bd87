"""Random networks are converted and compute the same, or are not converted and say why."""

import copy
import random
import warnings

import pytest
import torch
from torch import nn

from efficient_densenet import convert_
from support.compare import assert_same_training, randomise_
from support.marks import slabs_and_whole
from support.random_networks import RandomNetwork, change_later

pytestmark = slabs_and_whole

SEEDS = range(500)
QUICK = SEEDS[::100]


class Seeded(nn.Module):
    """A network whose every call draws the same random numbers."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        torch.manual_seed(7)
        return self.network(x)


def check(seed):
    original = RandomNetwork(seed).double()
    randomise_(original)
    x = torch.randn(original.image, dtype=torch.float64)
    converted = copy.deepcopy(original)
    report = convert_(converted)
    for path in original.blocks:
        found = [f for f in report if f"{f.path}.".startswith(f"{path}.")]
        assert found, f"nothing is said of block {path}"
        whole = next((f for f in found if f.path == path), None)
        assert whole is None or whole.reason is None or " " in whole.reason
    pair = Seeded(converted), Seeded(original)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_training(*pair, x, rtol=1e-8, steps=2)
        for model in (converted, original):
            change_later(random.Random(seed), model)
        assert_same_training(*pair, x, rtol=1e-8, steps=1)
    return report


@pytest.mark.parametrize("seed", QUICK)
def test_network_trains_as_original_or_says_why_not(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, len(SEEDS), 50))
def test_all_networks_train_as_original_or_say_why_not(start):
    reports = [check(seed) for seed in SEEDS[start : start + 50]]
    found = [f for report in reports for f in report if f.kind == "dense block"]
    recompute = [f for f in found if f.reason is None]
    assert len(recompute) > len(found) / 2
    assert any(f.reason for f in found)
