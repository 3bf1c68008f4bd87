"""A layer is a chain of parts, of which only those that are not known run again."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from efficient_densenet import EfficientDenseBlock, estimate
from efficient_densenet.functional.units import UnitRunner
from efficient_densenet.modules.calls import BlockCall
from efficient_densenet.modules.naive import CONVS, NORMS, DenseBlock
from efficient_densenet.modules.recomputing import read_call
from support.compare import (
    MODES,
    assert_all_close,
    assert_close,
    assert_efficient,
    assert_same_state,
    assert_same_training,
    block_pair,
    image,
    training_results,
)
from support.layers import (
    CHANGES,
    Gaussian,
    Loop,
    SqueezeExcitation,
    each,
    every_second,
    group_norm,
    instance_norm,
    lora,
    squeeze,
    weight_norm,
)

CHANGED = {"first": instance_norm, "second": squeeze, "both": group_norm, "four": lora}
each_place = pytest.mark.parametrize(
    "change", [instance_norm, squeeze, lora], ids=["first", "second", "four"]
)
# Unknown parts, units, and norms with an activation.
PARTS = {
    "group-norm": "?",
    "instance-norm": "?U",
    "layer-norm": "?U",
    "no-norm": "?U",
    "squeeze-and-excitation": "UN?",
    "lora": "N?N?",
    "weight-norm": "N?U",
    "weight-norm-by-hook": "UN?",
    "spectral-norm": "UN?",
    "spectral-norm-by-hook": "N?U",
    "other-activation": "U?",
    "reflecting": "UN?",
    "hook": "?U",
    "backward-hook": "UN?",
    "dropout": "N?U",
    "noise": "?U",
}


def pair(change, **options):
    def alike(block):
        torch.manual_seed(7)
        change(block)
        block.double()

    return block_pair(change=alike, **options)


def read(block, x):
    return read_call(block, x).layers


def kinds(layer):
    return "".join(
        "?" if part in layer.opaque else "U" if part.spec.conv else "N" for part in layer.parts
    )


@pytest.mark.parametrize("name", CHANGES)
def test_norms_with_an_activation_are_units(name):
    block, _ = pair(each(CHANGES[name]))
    assert [kinds(layer) for layer in read(block, image())] == [PARTS[name]] * 3


def test_hooks_on_a_layer_make_all_of_it_run_again():
    block, _ = block_pair()
    block["denselayer2"].register_forward_hook(lambda module, args, out: out * 1)
    block["denselayer3"].conv1.register_forward_hook(lambda module, args, out: out * 1)
    layers = read(block, image())
    assert [kinds(layer) for layer in layers] == ["UU", "?", "N?U"]


@pytest.mark.parametrize("spread", [each, every_second], ids=["all", "second"])
@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_layer_half_known_trains_as_naive(change, dims, recompute, spread):
    efficient, naive = pair(spread(change), dims=dims, bias=True, recompute=recompute)
    assert_efficient(efficient, image(dims=dims))
    assert_same_training(efficient, naive, image(dims=dims), steps=3, rtol=1e-8)


NORMS_EVALUATE = {
    "all": lambda layer: layer.eval(),
    "first": lambda layer: layer.norm1.eval(),
    "second": lambda layer: layer.norm2.eval(),
}


@pytest.mark.parametrize("evaluate", NORMS_EVALUATE.values(), ids=NORMS_EVALUATE)
@pytest.mark.parametrize("recompute", MODES)
@each_place
def test_norms_that_evaluate_train_as_naive(change, recompute, evaluate):
    efficient, naive = pair(each(change), recompute=recompute)
    for block in (efficient, naive):
        each(evaluate)(block)
    assert_same_training(efficient, naive, image(), steps=3, rtol=1e-8)


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("frozen", ["norm1", "conv1", "norm2", "conv2", "denselayer1", ""])
@pytest.mark.parametrize("change", [weight_norm, squeeze, lora], ids=["first", "second", "four"])
def test_frozen_parts_get_no_gradient(change, frozen, recompute):
    efficient, naive = pair(each(change), recompute=recompute)
    for block in (efficient, naive):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and frozen not in name)
    got, expected = (training_results(block, image_of(0)) for block in (efficient, naive))
    assert_all_close(got, expected, 1e-8)


def image_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, 7, 5, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("recompute", MODES)
@each_place
def test_dropout_at_end_drops_the_same_again(change, recompute):
    efficient, naive = pair(each(change), drop_rate=0.4, recompute=recompute)
    x = image().requires_grad_()
    assert_efficient(efficient, x)
    got = training_results(efficient, x)
    for layer, new in zip(naive.values(), got["output"][:, 5:].split(3, 1), strict=True):
        layer.drop_rate = 0.0
        mask = (new != 0).double() / 0.6
        layer.register_forward_hook(lambda module, args, out, mask=mask: out * mask)
    assert_all_close(got, training_results(naive, x), 1e-8)


@pytest.mark.parametrize("noisy", ["relu1", "relu2"])
def test_random_numbers_of_a_half_are_drawn_again(noisy):
    def change(layer):
        setattr(layer, noisy, nn.Sequential(nn.ReLU(), Gaussian()))

    efficient, naive = pair(each(change))
    results, states = [], []
    for block in (efficient, naive):
        torch.manual_seed(5)
        results.append(training_results(block, image_of(1).requires_grad_()))
        states.append(torch.get_rng_state())
    assert_all_close(*results, 1e-8)
    assert torch.equal(*states)


CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize(
    ("change", "layout"), [(instance_norm, CONTIGUOUS), (squeeze, CONTIGUOUS), (squeeze, LAST)]
)
def test_half_sees_memory_format_that_it_sees_in_naive_block(change, layout):
    seen = []

    def looking(layer):
        change(layer)
        part = layer.norm1 if change is instance_norm else layer.conv2
        part.register_forward_hook(lambda m, args, out: seen.append(args[0].stride()))

    x = image().contiguous(memory_format=layout)
    for block in pair(each(looking)):
        block(x)
    assert seen[:3] == seen[3:]


@pytest.mark.parametrize("recompute", MODES)
@each_place
def test_autocast_is_as_close_to_float64_as_naive(change, recompute):
    efficient, naive = pair(each(change), recompute=recompute)
    truth = training_results(naive, image_of(2).requires_grad_())
    truth = {name: value for name, value in truth.items() if value is not None}
    efficient.float(), naive.float()
    x = image_of(2).float()
    assert_efficient(efficient, x)
    close, found = (autocast_results(block, x) for block in (naive, efficient))
    for name, value in truth.items():
        allowed = 1.5 * error(close[name], value) + 2**-8 * value.abs().max()
        assert error(found[name], value) <= allowed, name
        assert found[name].dtype == close[name].dtype


def autocast_results(block, x):
    x = x.clone().requires_grad_()
    block.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    return training_results_of(block, x, out)


def training_results_of(block, x, out):
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out)
    out.backward(upstream)
    grads = {f"gradient of {name}": p.grad for name, p in block.named_parameters()}
    grads = {name: grad for name, grad in grads.items() if grad is not None}
    return {"output": out.detach(), "gradient of the input": x.grad} | grads


def error(actual, expected):
    return (actual.double() - expected).abs().max()


class Widening(nn.Conv2d):
    """A convolution that hands on what autocast made narrow in 32 bits again."""

    def forward(self, input):
        return super().forward(input).float()


def test_half_may_leave_what_autocast_did_not_narrow():
    def change(layer):
        layer.conv1.__class__ = Widening

    efficient, naive = block_pair(dtype=torch.float32, change=each(change))
    x = image(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_efficient(efficient, x)
        assert_close("output", efficient(x).detach(), naive(x).detach(), 2**-7)
    assert [kinds(layer) for layer in read(efficient, x)] == ["N?U"] * 3


class Narrowing(nn.Conv2d):
    def forward(self, input):
        return super().forward(input).half()


def test_half_that_leaves_another_type_takes_naive_path_and_says_why():
    def change(layer):
        layer.conv1.__class__ = Narrowing

    efficient, naive = block_pair(dtype=torch.float32, change=each(change))
    x = image(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match=r"denselayer1 hands torch.float16 to a norm"):
            out = efficient(x)
        assert torch.equal(out, naive(x))
    assert_same_state(efficient, naive)


class NewFirst(nn.Module):
    """The layers of a block that puts new maps before the older ones, run again or naive."""

    def __init__(self, layers, growth):
        super().__init__()
        self.layers, self.growth, self.naive = nn.ModuleList(layers), growth, False

    def forward(self, x):
        if not self.naive:
            block = EfficientDenseBlock(1, 1, 2, self.growth)
            read, channels = [], x.shape[1]
            for i, layer in enumerate(self.layers):
                read.append(block.read_known(f"layer{i}", layer, channels))
                channels += self.growth
            return BlockCall.of(x, read, None, self.recompute, "auto", True).run()
        for layer in self.layers:
            x = torch.cat([layer(x), x], 1)
        return x


@pytest.mark.parametrize("recompute", MODES)
@each_place
def test_new_maps_first(change, recompute):
    efficient, naive = (NewFirst(block.values(), 3) for block in pair(each(change)))
    naive.naive, efficient.recompute = True, recompute
    assert_same_training(efficient, naive, image(), steps=3, rtol=1e-8)


@pytest.mark.parametrize("recompute", MODES)
@each_place
def test_known_parts_are_not_called(change, recompute, monkeypatch):
    """And run again only where their maps are not kept."""
    efficient, _ = pair(each(change), recompute=recompute)
    kernels, convolve = [], nn.functional.conv2d
    units, run = [], UnitRunner.forward

    def counting(x, weight, *rest):
        kernels.append(weight.shape[-1])
        return convolve(x, weight, *rest)

    monkeypatch.setattr(nn.functional, "conv2d", counting)
    monkeypatch.setattr(
        UnitRunner, "forward", lambda *args, **options: units.append(1) or run(*args, **options)
    )
    efficient(image().requires_grad_()).sum().backward()
    convolved = {instance_norm: [1], squeeze: [3], lora: [1, 1, 1, 3, 3, 1]}[change]
    assert sorted(kernels) == sorted(convolved * 6)
    forward, again = {instance_norm: (1, 0), squeeze: (2, 2), lora: (2, 2)}[change]
    if change is squeeze and recompute == "norm":
        again = 1  # the norm before the convolution that is not known
    assert len(units) == 3 * (forward + again)


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["instance-norm", "squeeze-and-excitation", "lora"])
def test_deep_block_keeps_no_more_and_peaks_near_one_layer(name, dims, recompute):
    layers, c0, growth = 24, 24, 12

    def build(kind, **options):
        torch.manual_seed(0)
        block = kind(layers, c0, 4, growth, dims=dims, **options)
        each(CHANGES[name])(block)
        return block

    size = {2: (32, 32), 3: (8, 12, 10)}[dims]
    with torch.device("meta"):
        efficient = build(EfficientDenseBlock, recompute=recompute)
        layer = build(DenseBlock)["denselayer24"]
    report = estimate(efficient, (4, c0, *size))
    maps = 4 * 4 * math.prod(size)
    features = maps * (c0 + layers * growth)
    keeps = recompute == "norm" and name == "squeeze-and-excitation"
    bottlenecks = maps * 4 * growth * layers if keeps else 0
    assert report.kept <= 1.05 * features + bottlenecks
    one = estimate(layer, torch.empty(4, c0 + 23 * growth, *size).requires_grad_())
    assert report.peak.total <= 4 * features + bottlenecks + one.peak.total


class Counting(nn.Module):
    """Computes something else at every call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + 0.01 * self.calls)


@pytest.mark.parametrize("evaluates", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("place", ["relu1", "conv1", "relu2", "conv2"])
def test_part_that_computes_something_else_again_is_refused(place, evaluates):
    efficient, _ = block_pair()
    layer = efficient["denselayer2"]
    setattr(layer, place, nn.Sequential(getattr(layer, place), Counting()))
    efficient.train(not evaluates)
    out = efficient(image())
    with pytest.raises(RuntimeError, match="denselayer2 computes something else when it is run"):
        out.sum().backward()


@pytest.mark.parametrize("place", ["relu1", "conv1", "relu2", "conv2"])
def test_map_of_a_part_that_escapes_takes_naive_path(place):
    efficient, naive = block_pair()
    kept = []
    for block in (efficient, naive):
        getattr(block["denselayer2"], place).register_forward_hook(
            lambda m, args, out: kept.append(out)
        )
    x = image()
    with pytest.warns(UserWarning, match="perhaps through a hook"):
        found = efficient(x)
    assert torch.equal(found, naive(x))
    assert_same_state(efficient, naive)
    assert "perhaps through a hook" in efficient.why_naive(x)


@pytest.mark.parametrize("recompute", MODES)
def test_part_may_overwrite_the_map_of_a_convolution(recompute, recwarn):
    def change(layer):
        layer.norm2, layer.relu2 = nn.Identity(), nn.Hardswish(inplace=True)

    efficient, naive = pair(each(change), recompute=recompute)
    assert_same_training(efficient, naive, image(), rtol=1e-8)
    assert not recwarn.list


def test_halves_of_other_sizes_run_as_one():
    """The two together leave the map as it is, but neither does alone."""

    def change(layer):
        layer.norm1 = nn.InstanceNorm2d(layer.norm1.num_features)
        layer.conv1.padding, layer.conv2.padding = (1, 1), (0, 0)

    efficient, naive = pair(each(change))
    assert [len(layer.parts) for layer in read(efficient, image())] == [1] * 3
    assert_same_training(efficient, naive, image(), rtol=1e-8)


def own(channels, dims, place):
    """Three or six modules, of which one is not known, and dropout after them."""
    first = [NORMS[dims](channels), nn.ReLU(), CONVS[dims](channels, 8, 1)]
    second = [NORMS[dims](8), nn.ReLU(inplace=True), CONVS[dims](8, 4, 3, padding=1)]
    if place == "first":
        first[1] = nn.Mish()
    else:
        second[2] = SqueezeExcitation(second[2])
    return nn.Sequential(*first, *second)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("place", ["first", "second"])
def test_own_layers_of_which_half_is_known(place, dims, monkeypatch):
    calls, run = [], BlockCall.run
    monkeypatch.setattr(BlockCall, "run", lambda self: calls.append(self) or run(self))
    make = partial(own, dims=dims, place=place)
    recomputed, plain = (Loop(make, naive).double() for naive in (False, True))
    recomputed.load_state_dict(plain.state_dict())
    assert_same_training(recomputed, plain, image(dims=dims), steps=3, rtol=1e-8)
    parts = [kinds(layer) for layer in calls[0].layers]
    assert parts == ["?U" if place == "first" else "UN?"] * 3
