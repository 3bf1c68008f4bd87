"""What a forward function changes outside of its module is left as it was, and never lost."""

import copy
import functools
import random
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from efficient_densenet import convert_, explain, revert_
from efficient_densenet.convert.state.values import described
from support.deciding import INPUT, Layer, block

SEEN, COUNTS, STORE, CALLS = [], {}, types.SimpleNamespace(maps=[]), 0
CHANCE, CHANCES = random.Random(3), np.random.default_rng(3)


class Counting(Layer):
    calls = 0


def counts_globally(layer, y):
    global CALLS
    CALLS += 1


def counts_in_class(layer, y):
    Counting.calls += 1


def adds_to_class(layer, y):
    Counting.latest = y.size(1)


def counts_in_dict(layer, y):
    COUNTS["calls"] = COUNTS.get("calls", 0) + 1


def appends(layer, y):
    SEEN.append(y.detach())


def stores(layer, y):
    STORE.maps.append(y.detach())
    STORE.latest = y


def counts_enclosed():
    calls = []
    return lambda layer, y: calls.append(1), lambda: list(calls)


def makes_global(layer, y):
    global LATEST
    LATEST = y


def makes_enclosed():
    latest: torch.Tensor

    def make(layer, y):
        nonlocal latest
        latest = y

    return make, lambda: latest_is_made(make.__closure__[0])


def latest_is_made(cell):
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


KEPT = {
    "global": (counts_globally, lambda: CALLS, "CALLS"),
    "new global": (makes_global, lambda: "LATEST" in globals(), "LATEST"),
    "new enclosed": (*makes_enclosed(), "latest"),
    "class": (counts_in_class, lambda: Counting.calls, "Counting.calls"),
    "new in class": (adds_to_class, lambda: {*vars(Counting)}, "Counting.latest"),
    "dict": (counts_in_dict, lambda: dict(COUNTS), "COUNTS"),
    "list": (appends, lambda: list(SEEN), "SEEN"),
    "object": (stores, lambda: (list(STORE.maps), {*vars(STORE)}), "STORE"),
    "enclosed": (*counts_enclosed(), "calls"),
}
DRAWN = {
    "generator": (lambda layer, y: CHANCE.random(), lambda: described(CHANCE), "CHANCE"),
    "generator of numpy": (
        lambda layer, y: CHANCES.random(),
        lambda: described(CHANCES),
        "CHANCES",
    ),
}


def activated(leave):
    def activate(layer, y):
        leave(layer, y)
        return F.relu(y)

    return block(activate, layer=Counting)


@pytest.mark.parametrize(("leave", "state", "name"), KEPT.values(), ids=KEPT)
def test_recording_leaves_what_it_changes_as_it_was(leave, state, name):
    model, before = activated(leave), state()
    report = convert_(model)
    assert state() == before
    assert report[""].reason == f"layers.0 changes {name} when it runs"
    model(INPUT)
    assert state() != before


@pytest.mark.parametrize(("leave", "state", "name"), DRAWN.values(), ids=DRAWN)
def test_layer_that_draws_from_a_global_generator_stays_as_it_is(leave, state, name):
    model = activated(leave)
    assert convert_(model)[""].reason == f"layers.0 changes {name} when it runs"
    before = state()
    model(INPUT)
    assert state() != before


def test_what_cannot_be_recorded_leaves_no_traces_either():
    def activate(layer, y):
        SEEN.append(y)
        random.random()
        return F.relu(y)

    SEEN.clear()
    convert_(block(activate))
    assert not SEEN


def test_layer_that_counts_outside_is_not_run_again():
    model = activated(appends)
    for part in model.layers:
        part.bn = nn.GroupNorm(1, part.bn.num_features).double()
    naive = copy.deepcopy(model)
    assert convert_(model)[""].reason == "layers.0 changes SEEN when it runs"
    found = []
    for each in (model, naive):
        SEEN.clear()
        each(INPUT).sum().backward()
        found.append(len(SEEN))
    assert found == [3, 3]


@functools.lru_cache
def ramp(channels):
    return torch.linspace(0, 1, channels).view(1, -1, 1, 1)


RAMPS = {}


def kept_ramp(channels):
    if channels not in RAMPS:
        RAMPS[channels] = torch.linspace(0, 1, channels).view(1, -1, 1, 1)
    return RAMPS[channels]


class Scaled(nn.Module):
    def __init__(self, ramp):
        super().__init__()
        self.ramp = ramp

    def forward(self, x):
        return x * self.ramp(x.size(1))


@pytest.mark.parametrize("make", [ramp, kept_ramp], ids=["cached function", "dict"])
def test_cache_holds_nothing_that_was_only_recorded(make):
    model = nn.Sequential(Scaled(make), block(lambda layer, y: F.relu(y)))
    explain(model, INPUT)
    convert_(model, strict=True)
    assert make(4).device == INPUT.device
    expected = model(INPUT)
    revert_(model)
    assert torch.allclose(model(INPUT), expected)
