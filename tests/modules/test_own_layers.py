"""A block of your own layers trains as the plain loop does, and keeps only the features."""

import math

import pytest
import torch
from torch import nn

from efficient_densenet import recompute_dense_block
from efficient_densenet.modules.calls import BlockCall
from efficient_densenet.modules.naive import CONVS, NORMS
from support.compare import assert_same_training, randomise_
from support.layers import SqueezeExcitation
from support.storages import kept_bytes, live_bytes

K = 4


def units(c, dims):
    return nn.Sequential(NORMS[dims](c), nn.ReLU(), CONVS[dims](c, K, 3, padding=1))


def bottleneck(c, dims):
    return nn.Sequential(
        *(NORMS[dims](c), nn.ReLU(inplace=True), CONVS[dims](c, 8, 1, bias=False)),
        *(NORMS[dims](8), nn.ReLU(inplace=True), CONVS[dims](8, K, 3, padding=1)),
    )


def group(c, dims):
    return nn.Sequential(nn.GroupNorm(1, c), nn.Mish(), CONVS[dims](c, K, 3, padding=1))


def post(c, dims):
    """Convolution first, then a batch norm: its statistics are its own."""
    return nn.Sequential(CONVS[dims](c, K, 3, padding=1), NORMS[dims](K), nn.ReLU())


def dropping(c, dims):
    return nn.Sequential(nn.Mish(), CONVS[dims](c, K, 1), nn.Dropout(0.2))


def excited(c, dims):
    return nn.Sequential(nn.Hardswish(), SqueezeExcitation(CONVS[dims](c, K, 1)))


ROWS = {
    "units": (units, bottleneck),
    "group-norm": (group,),
    "post": (post,),
    "dropping": (dropping,),
    "excited": (excited,),
    "mixed": (units, group, bottleneck, post, dropping, excited),
}


class Loop(nn.Module):
    def __init__(self, makers, dims, depth=6):
        super().__init__()
        makers = [makers[i % len(makers)] for i in range(depth)]
        self.layers = nn.ModuleList(make(5 + K * i, dims) for i, make in enumerate(makers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class Recomputed(Loop):
    def forward(self, x):
        return recompute_dense_block(self.layers, x, K)


class Seeded(nn.Module):
    """Draws the same numbers at every call."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        torch.manual_seed(5)
        return self.block(x)


def pair(makers, dims=2, dtype=torch.float64, depth=6):
    plain = Loop(makers, dims, depth).to(dtype)
    randomise_(plain)
    recomputed = Recomputed(makers, dims, depth).to(dtype)
    recomputed.load_state_dict(plain.state_dict())
    return Seeded(recomputed), Seeded(plain)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("makers", ROWS.values(), ids=ROWS)
def test_block_trains_as_loop(makers, dims):
    recomputed, plain = pair(makers, dims)
    x = torch.randn(3, 5, *(6, 5, 4)[:dims], dtype=torch.float64)
    assert_same_training(recomputed, plain, x, steps=3, rtol=1e-9)


@pytest.mark.parametrize("count", [kept_bytes, live_bytes])
@pytest.mark.parametrize("makers", ROWS.values(), ids=ROWS)
def test_block_keeps_only_features(makers, count):
    recomputed, plain = pair(makers, 2, torch.float32)
    x = torch.randn(4, 5, 37, 41).requires_grad_()
    features = x.nbytes // 5 * (5 + 6 * K)
    random = 5200 * sum(make is dropping for make in makers) * 6 // len(makers)
    assert features <= count(recomputed, x) <= 1.02 * features + random
    assert count(plain, x) > 2 * features


def test_units_of_layers_are_known(monkeypatch):
    calls = []
    run = BlockCall.run
    monkeypatch.setattr(BlockCall, "run", lambda self: calls.append(self) or run(self))
    pair(ROWS["mixed"])[0](torch.randn(2, 5, 6, 6, dtype=torch.float64))
    units = [len(layer.units) for layer in calls[0].layers]
    assert dict(zip((maker.__name__ for maker in ROWS["mixed"]), units, strict=True)) == {
        "units": 1,
        "group": 0,
        "bottleneck": 2,
        "post": 1,
        "dropping": 0,
        "excited": 0,
    }


def test_functions_without_parameters_are_layers():
    layers = [lambda x: torch.sin(x[:, :2]), lambda x: x[:, -2:] * x[:, :2]]
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    upstream = torch.randn(2, 7, 4, 4, dtype=torch.float64)

    def results(run):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        return out, *torch.autograd.grad(out, leaf, upstream)

    def loop(y):
        for layer in layers:
            y = torch.cat([y, layer(y)], 1)
        return y

    for found, expected in zip(
        results(lambda y: recompute_dense_block(layers, y, 2)), results(loop), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_growth_rates_may_differ():
    layers = nn.ModuleList([CONVS[2](3, 2, 1), CONVS[2](5, 4, 1)])
    assert recompute_dense_block(layers, torch.randn(2, 3, 4, 4), (2, 4)).shape == (2, 9, 4, 4)


@pytest.mark.parametrize(("count", "growth"), [(0, 4), (2, [4]), (1, [4, 4])])
def test_number_of_layers_is_checked(count, growth):
    layers = [nn.Conv2d(3, 4, 1)] * count
    with pytest.raises(ValueError, match=rf"got {count} layers and growth_rate="):
        recompute_dense_block(layers, torch.randn(1, 3, 2, 2), growth)


def shrinking():
    return nn.Conv2d(3, K, 3)


def other_growth():
    return nn.Conv2d(3, K + 1, 1)


def of_wider_type():
    class Wide(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).double()

    return Wide(3, K, 1)


def reads_other_parameter():
    outside = nn.Conv2d(3, K, 1)
    return lambda x: outside(x)


def returns_pair():
    class Pair(nn.Conv2d):
        def forward(self, x):
            return super().forward(x), x

    return Pair(3, K, 1)


def overwrites_input():
    return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, K, 1))


UNFIT = {
    overwrites_input: r"overwrites maps that others read",
    shrinking: r"returns \(2, 4, 3, 3\) instead of \(2, 4, 5, 5\)",
    other_growth: r"returns \(2, 5, 5, 5\) instead of \(2, 4, 5, 5\)",
    of_wider_type: r"returns torch.float64 beside features of torch.float32",
    reads_other_parameter: r"learns a tensor that is not one of its parameters",
    returns_pair: r"returns a tuple",
}


@pytest.mark.parametrize(("make", "reason"), UNFIT.items(), ids=[f.__name__ for f in UNFIT])
def test_layer_that_is_not_dense_takes_loop_and_says_why(make, reason):
    layer, x = make(), torch.randn(2, 3, 5, 5)
    with pytest.warns(UserWarning, match=f"recompute_dense_block is naive, since layer 0 {reason}"):
        try:
            out = recompute_dense_block([layer], x.clone(), K)
        except (RuntimeError, TypeError):  # as the loop
            with pytest.raises((RuntimeError, TypeError)):
                torch.cat([x, layer(x)], 1)
        else:
            torch.testing.assert_close(out, torch.cat([x, layer(x)], 1))


def test_what_ran_before_naive_path_is_undone():
    """Buffers have learnt once and as many random numbers are drawn as by the loop."""
    layers = nn.ModuleList([dropping(3, 2), post(3 + K, 2), nn.Conv2d(3 + 2 * K, K + 1, 1)])
    twin = nn.ModuleList([dropping(3, 2), post(3 + K, 2), nn.Conv2d(3 + 2 * K, K + 1, 1)])
    twin.load_state_dict(layers.state_dict())
    x = torch.randn(2, 3, 5, 5)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="is naive"):
        found = recompute_dense_block(layers, x, K)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    y = x
    for layer in twin:
        y = torch.cat([y, layer(y)], 1)
    assert torch.equal(found, y)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in twin.state_dict().items():
        assert torch.equal(layers.state_dict()[name], value), name


def test_compiled_block_is_loop():
    recomputed, plain = (seeded.block for seeded in pair(ROWS["group-norm"]))
    compiled = torch.compile(recomputed, backend="eager", fullgraph=True)
    x = torch.randn(2, 5, 6, 6, dtype=torch.float64)
    assert_same_training(compiled._orig_mod, plain, x, rtol=1e-9)
    torch.testing.assert_close(compiled(x), plain(x))


def test_features_are_all_that_is_alive_at_end():
    x = torch.randn(2, 5, 8, 8).requires_grad_()
    recomputed, _ = pair(ROWS["group-norm"], 2, torch.float32, depth=24)
    features = 2 * (5 + 24 * K) * math.prod(x.shape[2:]) * 4
    assert live_bytes(recomputed, x) <= 1.05 * features
