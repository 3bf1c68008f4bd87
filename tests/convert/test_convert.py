"""Converted models of other libraries train as before, keep only their features, and revert."""

import copy

import pytest
import torch

from efficient_densenet import convert_, explain, revert_
from efficient_densenet.convert.fronts import recognised
from efficient_densenet.convert.recognition.match import DenseMatch
from efficient_densenet.convert.recording.inputs import input_for
from efficient_densenet.modules.naive import DenseBlock
from support.compare import (
    MODES,
    assert_all_close,
    assert_same_training,
    randomise_,
    training_results,
)
from support.copies import pickled, saved_whole
from support.libraries import NETWORKS, blocks, small
from support.precision import assert_training_as_precise
from support.storages import live_bytes

every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def pair(network, dtype=torch.float64, **options):
    """A converted network, and the same one as it was."""
    original = network.make().to(dtype)
    randomise_(original)
    converted = copy.deepcopy(original)
    convert_(converted, **options)
    return converted, original


def image(network, dtype=torch.float64):
    return torch.randn(network.image, dtype=torch.float64).to(dtype)


@pytest.mark.capability("trains as before")
@every_network
@pytest.mark.parametrize("recompute", MODES)
def test_three_steps_train_as_original(network, recompute, runs):
    converted, original = pair(network, recompute=recompute)
    assert_same_training(converted, original, image(network), rtol=1e-9, steps=3)
    assert sum(len(spec.layers) > 0 for spec in runs) == 3 * network.blocks


@pytest.mark.capability("float32 as accurate")
@every_network
def test_single_precision_is_as_precise_as_original(network):
    converted, original = pair(network, torch.float32)
    assert_training_as_precise(
        converted, original, lambda: image(network, torch.float32), torch.float32
    )


@every_network
def test_evaluation_equals_originals(network):
    converted, original = pair(network)
    x = image(network)
    with torch.no_grad():
        found, expected = (model.eval()(x) for model in (converted, original))
    assert_all_close({"output": found}, {"output": expected}, 1e-10)


@pytest.mark.capability("keeps only features")
@every_network
def test_blocks_keep_what_ledger_says(network):
    converted, original = pair(network, torch.float32)
    for block, naive in zip(blocks(converted), same_modules(converted, original), strict=True):
        like = input_for(block)
        dims, channels = like.dim() - 2, like.shape[1]
        size = SIDES[dims] * (2 if recognised(block, DenseMatch).entry else 1)
        x = torch.randn(4, channels, *(size,) * dims).requires_grad_()
        features = block._recomputing_read(x).spec.channels
        kept, before = live_bytes(block, x), live_bytes(naive, x)
        ledger = features * 4 * SIDES[dims] ** dims * 4
        assert kept == pytest.approx(ledger, rel=0.02)
        assert before > 2 * kept


SIDES = {1: 900, 2: 30, 3: 10}


def same_modules(converted, original):
    """The modules of the original that are dense blocks of the converted model."""
    modules = dict(original.named_modules())
    return [modules[name] for name, m in converted.named_modules() if m in set(blocks(converted))]


@pytest.mark.capability("reverts bit for bit")
@every_network
def test_reverted_model_is_original_bit_for_bit(network):
    converted, original = pair(network)
    assert any(
        type(m) is not type(o) for m, o in zip(converted.modules(), original.modules(), strict=True)
    )
    revert_(converted)
    assert not blocks(converted)
    for here, there in zip(converted.modules(), original.modules(), strict=True):
        assert type(here) is type(there)
        assert vars(here).keys() == vars(there).keys()
    x = image(network)
    found, expected = (
        training_results(model, x.clone().requires_grad_()) for model in (converted, original)
    )
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for name, tensor in original.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name


@pytest.mark.capability("copies and pickles")
@every_network
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_whole], ids=lambda c: c.__name__)
def test_copy_is_converted_and_computes_with_its_own_weights(network, copied):
    converted, original = pair(network, recompute="norm")
    twin = copied(converted)
    assert [type(m) for m in twin.modules()] == [type(m) for m in converted.modules()]
    assert [block.recompute for block in blocks(twin)] == ["norm"] * network.blocks
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert_same_training(twin, original, image(network), rtol=1e-9)


def test_unpickled_block_is_recognised_in_its_first_call(monkeypatch):
    block = DenseBlock(3, 5, 2, 3).double()
    convert_(block)
    loaded, x = pickled(block), torch.randn(2, 5, 8, 8, dtype=torch.float64)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert loaded.why_naive(x) == (
        "the module has not been called since it was made: call it once before it is compiled"
    )
    monkeypatch.undo()
    loaded(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert loaded.why_naive(x) is None


@every_network
def test_everything_else_about_model_stays(network):
    original = network.make()
    model = copy.deepcopy(original)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modules, keys, text = list(model.modules()), list(model.state_dict()), repr(model)
    convert_(model)
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, type(o)) for m, o in zip(modules, original.modules(), strict=True))
    own = {id(p) for p in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == own
    plain = [line for line in repr(model).splitlines() if "recompute=" not in line]
    assert plain == [line for line in text.splitlines() if "recompute=" not in line]


@every_network
def test_report_names_every_block(network):
    report = explain(network.make())
    found = [f for f in report if f.kind == "dense block"]
    assert [f.state for f in found] == ["naive, can be converted"] * network.blocks
    model = network.make()
    report = convert_(model)
    assert [f.converted for f in report if f.kind == "dense block"] == [True] * network.blocks
    assert explain(model) == report
    assert all(f.path in str(report) for f in report)


def test_explain_changes_nothing():
    model = small()
    classes = [type(m) for m in model.modules()]
    explain(model)
    assert [type(m) for m in model.modules()] == classes
