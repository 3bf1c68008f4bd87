"""Blocks and stems with every activation: training, evaluation, operators, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from efficient_densenet.functional import autograd, operators
from efficient_densenet.functional.encoding import decode, encode
from efficient_densenet.functional.precision import Types
from efficient_densenet.functional.spec import BlockSpec, LayerSpec, StemSpec, UnitSpec, UnitTensors
from efficient_densenet.kernels import workspace
from efficient_densenet.kernels.interface import RELU, Geometry, Pool
from efficient_densenet.memory.events import live_bytes
from efficient_densenet.memory.meter import LiveMeter
from support.activations import ACTIVATIONS
from support.marks import either_mode

MODES = ("norm", "bottleneck")
EPS = 1e-3
ENTERING, WIDTH, GROWTH, LAYERS, LEAVING = 3, 4, 2, 3, 5
POINTWISE = Geometry((1, 1), (0, 0), (1, 1), 1)
PADDED = Geometry((1, 1), (1, 1), (1, 1), 1)
HALVES = Pool("average", (2, 2), (2, 2), (0, 0), (1, 1))
DOUBLE = Types(torch.float64, torch.float64)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
training_or_not = pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])


def mixed():
    """A different activation for each unit of a block, by name."""
    names = list(ACTIVATIONS)
    return [names[i % len(names)] for i in range(2 * LAYERS + 1)]


def block_spec(names, training, recompute="bottleneck"):
    """Bottleneck layers and a transition, with the activations of these names."""

    def unit(name, conv, pool=None):
        return UnitSpec(EPS, training, conv, pool, ACTIVATIONS[name][0])

    layers = tuple(
        LayerSpec(
            parts=(unit(names[2 * i], POINTWISE), unit(names[2 * i + 1], PADDED)),
            channels=ENTERING + i * GROWTH,
            widths=(WIDTH, GROWTH),
            drop_rate=0.0,
        )
        for i in range(LAYERS)
    )
    return BlockSpec(
        layers=layers,
        exit=unit(names[-1], POINTWISE, HALVES),
        input_channels=ENTERING,
        recompute=recompute,
        types=DOUBLE,
    )


def unit_tensors(reads, leaves, kernel, training):
    running = (None, None) if training else (torch.randn(reads), torch.rand(reads) + 0.5)
    conv = torch.randn(leaves, reads, kernel, kernel), torch.randn(leaves)
    found = (torch.randn(reads), torch.randn(reads), *running, *conv)
    return UnitTensors(*(None if t is None else t.double() for t in found))


def block_tensors(training):
    units = []
    for i in range(LAYERS):
        units.append(unit_tensors(ENTERING + i * GROWTH, WIDTH, 1, training))
        units.append(unit_tensors(WIDTH, GROWTH, 3, training))
    return [*units, unit_tensors(ENTERING + LAYERS * GROWTH, LEAVING, 1, training)]


def naive_norm(x, spec, tensors):
    gamma, beta, mean, var, *_ = tensors
    return F.batch_norm(x, mean, var, gamma, beta, spec.batch_statistics, 0.1, EPS)


def naive_unit(x, spec, tensors, name):
    y = ACTIVATIONS[name][1](naive_norm(x, spec, tensors))
    y = F.avg_pool2d(y, 2) if spec.pool else y
    return F.conv2d(y, tensors.conv_weight, tensors.conv_bias, padding=spec.conv.padding)


def naive_block(x, spec, units, names):
    units, names = iter(units), iter(names)
    for layer in spec.layers:
        y = x
        for unit in layer.units:
            y = naive_unit(y, unit, next(units), next(names))
        x = torch.cat([x, y], 1)
    return naive_unit(x, spec.exit, next(units), next(names))


def learning(units):
    """The tensors that have gradients, of all units."""
    groups = ([u.weight, u.bias, u.conv_weight, u.conv_bias] for u in units)
    return [t for group in groups for t in group]


def results(function, x, units):
    """Output and gradients of everything, from one random gradient."""
    leaves = [x, *learning(units)]
    for leaf in leaves:
        leaf.requires_grad_()
    out = function(x, units)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_alike(ours, naive, x, units):
    found, expected = (results(function, x, units) for function in (ours, naive))
    for a, b in zip(found, expected, strict=True):
        scale = max(1.0, b.abs().max().item())
        assert_close(a, b, rtol=0, atol=1e-10 * scale)


@every_activation
@either_mode
@training_or_not
def test_block_trains_as_naive_one(activation, recompute, training, monkeypatch):
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 8 * 9 * 36 * 3)  # several slabs
    names = [activation] * (2 * LAYERS + 1)
    check_block(names, training, recompute)


@either_mode
def test_each_unit_has_its_own_activation(recompute):
    check_block(mixed(), True, recompute)


def check_block(names, training, recompute):
    spec = block_spec(names, training, recompute)
    assert_alike(
        lambda x, units: autograd.dense_block(x, spec, units)[0],
        lambda x, units: naive_block(x, spec, units, names),
        torch.randn(4, ENTERING, 6, 6).double(),
        block_tensors(training),
    )


@every_activation
def test_block_evaluates_as_naive_one(activation):
    """Norms are folded into the convolutions before them, activations are not."""
    names = [activation] * (2 * LAYERS + 1)
    spec, units = block_spec(names, False), block_tensors(False)
    x = torch.randn(4, ENTERING, 6, 6).double()
    with torch.no_grad():
        found, *_ = autograd.dense_block(x, spec, units)
        assert_close(found, naive_block(x, spec, units, names), rtol=1e-10, atol=1e-10)


def test_units_evaluate_with_activation_each():
    names = mixed()
    spec, units = block_spec(names, False), block_tensors(False)
    x = torch.randn(4, ENTERING, 6, 6).double()
    with torch.no_grad():
        found, *_ = autograd.dense_block(x, spec, units)
        assert_close(found, naive_block(x, spec, units, names), rtol=1e-10, atol=1e-10)


def stem_spec(activation, training):
    pool = Pool("maximum", (3, 3), (2, 2), (1, 1), (1, 1))
    unit = UnitSpec(EPS, training, None, pool, ACTIVATIONS[activation][0])
    return StemSpec(PADDED, unit, DOUBLE)


def stem_tensors(training):
    norm = unit_tensors(WIDTH, 1, 1, training)
    conv = unit_tensors(ENTERING, WIDTH, 3, training)
    return norm._replace(conv_weight=conv.conv_weight, conv_bias=conv.conv_bias)


def naive_stem(x, spec, tensors, activation):
    y = F.conv2d(x, tensors.conv_weight, tensors.conv_bias, padding=1)
    y = ACTIVATIONS[activation][1](naive_norm(y, spec.unit, tensors))
    return F.max_pool2d(y, 3, 2, 1)


@every_activation
@training_or_not
def test_stem_trains_as_naive_one(activation, training):
    spec = stem_spec(activation, training)
    assert_alike(
        lambda x, units: autograd.stem(x, spec, units[0])[0],
        lambda x, units: naive_stem(x, spec, units[0], activation),
        torch.randn(3, ENTERING, 7, 6).double(),
        [stem_tensors(training)],
    )


@every_activation
def test_stem_evaluates_as_naive_one(activation):
    spec, tensors = stem_spec(activation, False), stem_tensors(False)
    x = torch.randn(3, ENTERING, 7, 6).double()
    with torch.no_grad():
        found, *_ = autograd.stem(x, spec, tensors)
        assert_close(found, naive_stem(x, spec, tensors, activation), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "elu", "leaky_relu"])
@either_mode
def test_gradients_are_those_of_finite_differences(activation, recompute):
    spec = block_spec([activation] * (2 * LAYERS + 1), True, recompute)
    units = block_tensors(True)
    tensors = [t.requires_grad_() for t in learning(units)]

    def block(x, *flat):
        groups = [flat[i : i + 4] for i in range(0, len(flat), 4)]
        full = [UnitTensors(a, b, None, None, c, d) for a, b, c, d in groups]
        return autograd.dense_block(x, spec, full)[0]

    x = torch.randn(2, ENTERING, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(block, (x, *tensors), fast_mode=True)


@either_mode
def test_operators_carry_activations(recompute):
    """What a compiler sees is a text."""
    names = mixed()
    spec = block_spec(names, True, recompute)
    assert decode(encode(spec)) == spec

    def by_operators(x, units):
        return operators.dense_block(spec, None, x, [t for unit in units for t in unit])[0]

    assert_alike(
        by_operators,
        lambda x, units: naive_block(x, spec, units, names),
        torch.randn(4, ENTERING, 6, 6).double(),
        block_tensors(True),
    )


@every_activation
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@training_or_not
def test_what_is_not_finite_spreads_as_in_naive_block(activation, value, training):
    """One pixel; the same outputs and gradients are NaN."""
    names = [activation] * (2 * LAYERS + 1)
    spec, units = block_spec(names, training), block_tensors(training)
    x = torch.randn(2, ENTERING, 6, 6).double()
    x[1, 2, 3, 3] = value
    found, expected = (
        results(function, x.clone(), units)
        for function in (
            lambda x, units: autograd.dense_block(x, spec, units)[0],
            lambda x, units: naive_block(x, spec, units, names),
        )
    )
    for ours, naive in zip(found, expected, strict=True):
        assert torch.equal(ours.isnan(), naive.isnan())
        assert torch.equal(ours.isinf(), naive.isinf())
    assert any(not t.isfinite().all() for t in expected)


def peak(activation, device):
    """Bytes at the peak of a step of a block."""
    spec, units = block_spec([activation] * (2 * LAYERS + 1), True), block_tensors(True)
    units = [UnitTensors(*(None if t is None else t.to(device) for t in u)) for u in units]
    x = torch.randn(8, ENTERING, 32, 32).double().to(device)
    tensors = [t.requires_grad_() for t in learning(units)]
    with LiveMeter() as meter:
        out, *_ = autograd.dense_block(x.requires_grad_(), spec, units)
        torch.autograd.grad(out, [x, *tensors], torch.ones_like(out))
    return max(live_bytes(meter.events))


@every_activation
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_activation_needs_more_memory_than_relu(activation, device):
    """What a derivative needs is computed again in the same place; with values and without."""
    assert peak(activation, device) == peak("relu", device)


def test_unit_rectifies_unless_told_otherwise():
    assert UnitSpec(EPS, True, POINTWISE).activation == RELU
