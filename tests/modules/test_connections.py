"""Your own dense connection trains as with plain autograd, and keeps only the features."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficient_densenet import recompute_connection
from efficient_densenet.modules import connections
from efficient_densenet.modules.naive import CONVS, NORMS
from support.compare import (
    assert_all_close,
    assert_same_state,
    assert_same_training,
    randomise_,
)
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


class Spectral(nn.Module):
    """A norm that is not known, and a convolution whose buffers learn."""

    def __init__(self, connect):
        super().__init__()
        self.connect = connect
        self.norm = nn.BatchNorm2d(6)
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 3, 3, padding=1))

    def forward(self, x):
        return self.connect([x[:, :2], x[:, 2:]], self.norm, nn.Mish(), self.conv)


def plainly(features, norm, activation, conv):
    x = torch.cat(features, 1)
    x = x if norm is None else norm(x)
    return conv(activation(x))


def spectral_pair():
    recomputed, plain = (Spectral(connect).double() for connect in (recompute_connection, plainly))
    recomputed.load_state_dict(plain.state_dict())
    return recomputed, plain


@pytest.mark.parametrize("starts", [True, False], ids=["train", "eval"])
def test_mode_changed_before_backward_is_not_seen_and_buffers_learn_once(starts):
    results = []
    for module in (modules := spectral_pair()):
        x = torch.randn(3, 6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        out = module.train(starts)(x.requires_grad_())
        module.train(not starts)
        out.square().sum().backward()
        results.append({"x": x.grad} | {n: p.grad for n, p in module.named_parameters()})
    assert_all_close(results[0], results[1], 1e-9)
    assert_same_state(*modules)


CONNECTIONS = {
    "units": (lambda: nn.BatchNorm2d(6), nn.ReLU()),
    "any": (lambda: nn.GroupNorm(2, 6), nn.Mish()),
}
every_connection = pytest.mark.parametrize("parts", CONNECTIONS.values(), ids=CONNECTIONS)


@every_connection
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_connection_without_gradient(parts, context):
    norm, activation = parts[0](), parts[1]
    conv, features = nn.Conv2d(6, 3, 1), [torch.randn(2, 2, 4, 4), torch.randn(2, 4, 4, 4)]
    with context():
        found = recompute_connection([x * 1 for x in features], norm, activation, conv)
        expected = plainly([x * 1 for x in features], norm, activation, conv)
    torch.testing.assert_close(found, expected)


@every_connection
def test_saved_tensor_hooks_see_features_and_parameters(parts):
    norm, activation, conv = parts[0](), parts[1], nn.Conv2d(6, 3, 1)
    features = [torch.randn(2, c, 4, 4).requires_grad_() for c in (2, 4)]
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(id(t)) or t.clone(), lambda t: t
    ):
        out = recompute_connection(features, norm, activation, conv)
    wanted = [*features, *norm.parameters(), *conv.parameters()]
    assert {id(tensor) for tensor in wanted} <= set(packed)
    found = torch.autograd.grad(out.square().sum(), wanted)
    expected = torch.autograd.grad(plainly(features, norm, activation, conv).square().sum(), wanted)
    for actual, value in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-4)


@every_connection
def test_connection_inside_checkpoint(parts):
    norm, activation, conv = parts[0](), parts[1], nn.Conv2d(6, 3, 1)
    x = torch.randn(2, 6, 4, 4).requires_grad_()

    def run(x):
        return recompute_connection([x[:, :2], x[:, 2:]], norm, activation, conv)

    out = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    (found,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad(plainly([x], norm, activation, conv).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@every_connection
def test_second_derivative_of_connection_is_refused(parts):
    x = torch.randn(2, 6, 4, 4).requires_grad_()
    out = recompute_connection([x], parts[0](), parts[1], nn.Conv2d(6, 3, 1))
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@every_connection
def test_compiled_connection_is_plain(parts):
    norm, activation, conv = parts[0](), parts[1], nn.Conv2d(6, 3, 1)
    run = torch.compile(recompute_connection, backend="eager", fullgraph=True)
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(
        run([x], norm, activation, conv), plainly([x], norm, activation, conv)
    )


def test_features_of_two_types_join_as_concatenation_does():
    norm, conv = nn.GroupNorm(1, 6).double(), nn.Conv2d(6, 3, 1).double()
    features = [torch.randn(2, 2, 4, 4), torch.randn(2, 4, 4, 4, dtype=torch.float64)]
    leaves = [x.requires_grad_() for x in features]
    results = []
    for connect in (recompute_connection, plainly):
        out = connect(leaves, norm, nn.ReLU(), conv)
        results.append(torch.autograd.grad(out.square().sum(), leaves))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)


def test_connection_may_overwrite_its_concatenation():
    x = torch.randn(2, 6, 4, 4).requires_grad_()
    conv = nn.Conv2d(6, 3, 1)
    found = recompute_connection([x], None, nn.ReLU(inplace=True), conv)
    torch.testing.assert_close(found, plainly([x], None, nn.ReLU(inplace=True), conv))
