"""A dense connection of one's own trains as plain autograd's, and keeps the features alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficient_densenet import recompute_connection
from efficient_densenet.modules import connections
from efficient_densenet.modules.naive import CONVS, NORMS
from support.compare import assert_same_training, randomise_
from support.storages import live_bytes


class Connected(nn.Module):
    """Three basic layers in a row, each of which reads all maps before it."""

    def __init__(self, norm, activation, dims=2):
        super().__init__()
        self.dims, self.activation = dims, activation
        self.norms = nn.ModuleList(norm(4 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(
            CONVS[dims](4 + 4 * i, 4, kernel_size=3, padding=1, bias=i == 1) for i in range(3)
        )

    def connect(self, features, norm, conv):
        x = torch.cat(features, 1)
        x = norm(x)
        return conv(self.activation(x))

    def forward(self, x):
        features = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(self.connect(features, norm, conv))
        return torch.cat(features, 1)


class Recomputed(Connected):
    def connect(self, features, norm, conv):
        norm = None if isinstance(norm, nn.Identity) else norm
        return recompute_connection(features, norm, self.activation, conv)


CASES = {
    "batch-norm-1d": (NORMS[1], nn.ReLU(inplace=True), 1, True),
    "batch-norm-2d": (NORMS[2], nn.ReLU(inplace=True), 2, True),
    "batch-norm-3d": (NORMS[3], nn.ReLU(), 3, True),
    "batch-norm-function": (NORMS[2], F.relu, 2, True),
    "batch-norm-silu": (NORMS[2], nn.SiLU(), 2, True),
    "batch-norm-cumulative-gelu": (lambda c: NORMS[2](c, momentum=None), F.gelu, 2, False),
    "group-norm": (lambda c: nn.GroupNorm(2, c), nn.ReLU(), 2, False),
    "instance-norm": (
        lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
        nn.ReLU(),
        2,
        False,
    ),
    "no-norm": (lambda c: nn.Identity(), nn.ReLU(), 2, False),
    "leaky-relu": (lambda c: nn.GroupNorm(1, c), nn.LeakyReLU(0.1), 2, False),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def pair(case, dtype=torch.float64):
    norm, activation, dims, _ = case
    plain = Connected(norm, activation, dims).to(dtype)
    randomise_(plain)
    recomputed = Recomputed(norm, activation, dims).to(dtype)
    recomputed.load_state_dict(plain.state_dict())
    return recomputed, plain


@every_case
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_connection_trains_as_plain_autograd(case, mode, monkeypatch):
    calls = []
    run = connections.connect
    monkeypatch.setattr(connections, "connect", lambda *args: calls.append(args) or run(*args))
    recomputed, plain = pair(case)
    for module in (recomputed, plain):
        module.train(mode == "train")
    x = torch.randn(3, 4, *(7, 6, 5)[: case[2]], dtype=torch.float64)
    assert_same_training(recomputed, plain, x, steps=3, rtol=1e-9)
    assert bool(calls) == case[3]


@every_case
def test_connection_keeps_only_features(case):
    """Two new maps (the last has no reader) and the output; plain autograd keeps much more."""
    recomputed, plain = pair(case, torch.float32)
    x = torch.randn(4, 4, *({1: (900,), 2: (30, 31), 3: (9, 10, 11)}[case[2]])).requires_grad_()
    kept = live_bytes(recomputed, x)
    features, output = 2 * x.nbytes, 4 * x.nbytes
    assert kept == pytest.approx(features + output, rel=0.03)
    assert live_bytes(plain, x) > 1.5 * kept


def test_feature_that_was_changed_in_place_is_refused():
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 2, 4, 4)]
    leaf = maps[0].clone().requires_grad_()
    features = [leaf * 1.0, maps[1]]
    out = recompute_connection(features, nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))
    features[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_no_features_are_refused():
    with pytest.raises(ValueError, match=r"features must be at least one map, got \[\]"):
        recompute_connection([], nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))


def test_hooks_of_norm_fire():
    norm, seen = nn.BatchNorm2d(3), []
    norm.register_forward_hook(lambda *args: seen.append(args))
    x = torch.randn(2, 3, 4, 4).requires_grad_()
    recompute_connection([x], norm, nn.ReLU(), nn.Conv2d(3, 2, 1)).sum().backward()
    assert seen


def test_copy_of_module_that_connects_is_its_own():
    recomputed, plain = pair(CASES["batch-norm-2d"])
    twin = copy.deepcopy(recomputed)
    with torch.no_grad():
        recomputed.convs[0].weight.zero_()
    assert_same_training(twin, plain, torch.randn(2, 4, 5, 5, dtype=torch.float64))
