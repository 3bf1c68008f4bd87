"""Dense blocks are recognised by what they compute, and nothing else is."""

import pytest
import torch
from torch import nn

from efficient_densenet.convert.recognition.dense import match_dense
from efficient_densenet.convert.recording.record import record
from efficient_densenet.convert.recording.twin import Unrecordable
from efficient_densenet.modules.reading import Unsupported
from support.traps import OPAQUE, TRAPS
from support.wild import BLOCKS, C0, K

every_block = pytest.mark.parametrize("wild", BLOCKS.values(), ids=BLOCKS)
INPUT = (torch.randn(3, C0, 8, 6),)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def matched(block, *args, training=True):
    recording = record(block, args, training=training)
    return match_dense(recording, recording.root)


@both_modes
@every_block
def test_block_is_recognised(wild, training):
    match = matched(wild.make(), wild.input(), *wild.extra, training=training)
    assert match.input_channels == C0
    assert [layer.growth for layer in match.layers] == [K] * wild.layers
    assert [len(layer.units) for layer in match.layers] == [wild.units] * wild.layers
    assert match.new_first is wild.new_first
    assert match.returns == ("new" if wild.only_new else "all")
    assert match.entry == ("shrink" if wild.make.__name__ == "Stage" else None)
    for layer in match.layers:
        assert bool(layer.why_opaque) is (wild.units == 0)
        *inner, last = [unit.dropout for unit in layer.units] or [None]
        assert all(dropout.rate == 0 for dropout in inner)
        if last is not None:
            assert last.rate == pytest.approx(wild.p if training else 0)
            assert last.drops_maps is (wild.drops_maps and training)


@every_block
def test_match_names_modules_in_the_order_of_their_use(wild):
    block = wild.make()
    modules = dict(block.named_modules())
    for i, layer in enumerate(matched(block, wild.input(), *wild.extra).layers):
        channels = C0 + i * K
        for unit in layer.units:
            assert modules[unit.norm].num_features == modules[unit.conv].in_channels == channels
            assert unit.activation.name == wild.activation
            channels = modules[unit.conv].out_channels
        if layer.call is not None:
            assert sum(layer.call.form.channels) == C0 + i * K
            assert layer.call.path in modules


@both_modes
@pytest.mark.parametrize(("make", "reason"), TRAPS.values(), ids=TRAPS)
def test_what_computes_something_else_is_refused(make, reason, training):
    with pytest.raises((Unsupported, Unrecordable)) as refusal:
        matched(make(), torch.randn(3, C0, 8, 6), training=training)
    assert reason in str(refusal.value)


@pytest.mark.parametrize(("make", "odd"), OPAQUE.values(), ids=OPAQUE)
def test_layer_with_another_helper_is_no_known_unit(make, odd):
    layers = matched(make(), torch.randn(3, C0, 8, 6)).layers
    assert [i for i, layer in enumerate(layers) if not layer.units] == [odd]
    assert layers[odd].call is not None


def test_convolution_replaced_on_its_class_is_no_known_unit(monkeypatch):
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: forward(self, x) * 2)
    layers = matched(BLOCKS["D-loop"].make(), *INPUT).layers
    assert [layer.units for layer in layers] == [()] * 3


def test_norm_without_tensors_is_known_by_its_call():
    block = BLOCKS["D-loop"].make()
    block.denselayers[0][0] = nn.BatchNorm2d(C0, affine=False, track_running_stats=False)
    assert matched(block, *INPUT).layers[0].units[0].norm == "denselayers.0.0"


@both_modes
def test_attribute_that_does_not_reach_the_operation_is_no_known_unit(training):
    """A norm that normalises with another eps than it says."""

    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            self_eps, self.eps = self.eps, 0.1
            try:
                return super().forward(x)
            finally:
                self.eps = self_eps

    block = BLOCKS["D-loop"].make()
    block.denselayers[1][0].__class__ = Odd
    layers = matched(block, *INPUT, training=training).layers
    assert [bool(layer.units) for layer in layers] == [True, False, True]
    assert "as its attributes say" in " ".join(layers[1].why_opaque)


def test_frozen_norm_is_a_known_unit():
    block = BLOCKS["D-loop"].make()
    block.denselayers[0][0].eval()
    assert all(layer.units for layer in matched(block, *INPUT, training=None).layers)


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_momentum_may_be_any(momentum):
    block = BLOCKS["D-loop"].make()
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = momentum
    assert all(layer.units for layer in matched(block, *INPUT).layers)


def test_synchronised_norms_are_known_units():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(BLOCKS["D-loop"].make())
    assert all(layer.units for layer in matched(block, *INPUT).layers)
