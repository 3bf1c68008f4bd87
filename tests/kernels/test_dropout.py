"""Dropout whose masks are counted from a seed: as on every device but a CPU."""

import pytest
import torch

from efficient_densenet.kernels import dropout, eager
from efficient_densenet.kernels.dropout import random_numbers

RATE = 0.3
SEEDS = [0, 1, 2**33, 2**61 + 12345]


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """A CPU would draw its masks instead."""
    monkeypatch.setattr(dropout, "device_of", lambda x: torch.device("cuda"))


def mask(seed, rate=RATE, whole_maps=False, memory_format=torch.contiguous_format):
    """The factors of a map in ``memory_format``."""
    y = torch.ones(6, 5, 31, 33).to(memory_format=memory_format)
    eager.drop(y, torch.tensor(seed), rate, whole_maps, memory_format)
    return y


@pytest.mark.parametrize("seed", SEEDS)
def test_right_share_is_dropped_along_every_axis(seed):
    kept = mask(seed)
    assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - RATE)])
    for axis in range(4):
        share = (kept != 0).double().mean([a for a in range(4) if a != axis])
        deviation = (RATE * (1 - RATE) * share.numel() / kept.numel()) ** 0.5
        assert (share - (1 - RATE)).abs().max() < 5 * deviation


def test_seed_decides_mask_whatever_the_layout():
    expected = mask(7)
    assert torch.equal(mask(7), expected)
    assert torch.equal(mask(7, memory_format=torch.channels_last), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("other", SEEDS)
def test_samples_and_seeds_do_not_repeat_each_other(seed, other):
    """Not shifted either: the same place in two rows agrees as often as chance has it."""
    first, second = (random_numbers(torch.tensor(s), (64, 3000)).double() for s in (seed, other))
    pairs = [(first[0], second[1]), (first[3, 1:], second[3, :-1]), (first[0], first[-1])]
    pairs += [(first[0], second[0])] if seed != other else []
    for a, b in pairs:
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / 3000**0.5
        assert not torch.equal(a, b)


def test_whole_maps_are_dropped():
    y = mask(3, rate=0.5, whole_maps=True).flatten(2)
    assert torch.equal(y, y[..., :1].expand_as(y))
    assert 0 < (y[..., 0] == 0).sum() < y[..., 0].numel()


def test_rates_of_zero_and_one():
    assert torch.equal(mask(3, rate=0.0), torch.ones_like(mask(3)))
    assert not mask(3, rate=1.0).any()


def test_nan_is_not_dropped():
    y = torch.full((2, 3, 4, 4), torch.nan)
    eager.drop(y, torch.tensor(1), 0.5, False, torch.contiguous_format)
    assert y.isnan().all()
