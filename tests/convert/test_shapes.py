"""Dense blocks of every shape in which people write them train as before once converted."""

import copy

import pytest
import torch
from torch import nn

from efficient_densenet import convert_, revert_
from efficient_densenet.convert.converted import Converted
from support.compare import (
    MODES,
    assert_all_close,
    assert_same_training,
    randomise_,
    training_results,
)
from support.copies import pickled
from support.libraries import blocks
from support.storages import live_bytes
from support.wild import BLOCKS, C0, K, Stage

every_shape = pytest.mark.parametrize("wild", BLOCKS.values(), ids=BLOCKS)
NOT_TO_BE_PICKLED = ("weight-norm", "hooks")
DROPPING = {name: wild for name, wild in BLOCKS.items() if wild.p}


class Calling(nn.Module):
    """Calls a block with all that it takes."""

    def __init__(self, block, extra):
        super().__init__()
        self.block, self.extra = block, extra

    def forward(self, x):
        return self.block(x, *self.extra)


def pair(wild, dtype=torch.float64, **options):
    """A converted module around a block, and the same one as it was."""
    original = Calling(wild.make(), wild.extra).to(dtype)
    randomise_(original)
    converted = copy.deepcopy(original)
    convert_(converted, strict=True, **options)
    for module in original.modules():
        if "saving" in vars(module):
            module.saving = None  # its checkpoints would let norms learn twice
    return converted, original


@pytest.mark.capability("trains as before")
@every_shape
@pytest.mark.parametrize("recompute", MODES)
def test_three_steps_train_as_original(wild, recompute):
    converted, original = pair(wild, recompute=recompute)
    x = wild.input(torch.float64)
    if wild.p:  # which draws other masks
        converted.eval(), original.eval()
    (block,) = blocks(converted)
    assert block.why_naive(x, *wild.extra) is None
    assert_same_training(converted, original, x, rtol=1e-9, steps=3)


@pytest.mark.capability("infers as before")
@every_shape
def test_evaluation_equals_original(wild):
    converted, original = pair(wild)
    x = wild.input(torch.float64)
    with torch.no_grad():
        found, expected = (model.eval()(x) for model in (converted, original))
    assert_all_close({"output": found}, {"output": expected}, 1e-10)


@pytest.mark.parametrize("wild", DROPPING.values(), ids=DROPPING)
def test_gradient_is_that_of_masks_that_were_drawn(wild):
    converted, _ = pair(wild)
    for norm in (m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.track_running_stats = False
    x = wild.input(torch.float64)[:, :, :3, :2]

    def seeded(x):
        torch.manual_seed(1)
        return converted(x)

    (block,) = blocks(converted)
    assert block.why_naive(x) is None
    dropped = (seeded(x)[:, C0:] == 0).double().mean()
    assert wild.p / 3 < dropped < 2 * wild.p
    assert torch.autograd.gradcheck(seeded, x.requires_grad_())


@pytest.mark.capability("keeps only features")
@every_shape
def test_block_keeps_what_ledger_says(wild):
    converted, original = pair(wild, torch.float32)
    size = {1: (4096,), 2: (64, 64), 3: (16, 16, 16)}[wild.dims]
    x = torch.randn(2, wild.input().shape[1], *size).requires_grad_()
    features = C0 + wild.layers * K
    positions = 4096 // 4 if wild.make is Stage else 4096
    kept, before = live_bytes(converted, x), live_bytes(original, x)
    assert kept == pytest.approx(features * positions * 2 * 4, rel=0.02)
    assert before > 2 * kept


@pytest.mark.capability("reverts bit for bit")
@every_shape
def test_reverted_block_is_original_bit_for_bit(wild):
    converted, original = pair(wild)
    x = wild.input(torch.float64)
    converted.eval(), original.eval()
    converted(x), original(x)
    revert_(converted)
    assert not any(isinstance(module, Converted) for module in converted.modules())
    for here, there in zip(converted.modules(), original.modules(), strict=True):
        assert type(here) is type(there)
        assert vars(here).keys() == vars(there).keys()
    found, expected = (
        training_results(model, x.clone().requires_grad_()) for model in (converted, original)
    )
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.capability("copies and pickles")
@pytest.mark.parametrize(
    ("copied", "wild"),
    [
        pytest.param(copied, wild, id=f"{copied.__name__}-{name}")
        for copied in (copy.deepcopy, pickled)
        for name, wild in BLOCKS.items()
        if copied is copy.deepcopy or name not in NOT_TO_BE_PICKLED
    ],
)
def test_copy_recomputes_with_its_own_weights(copied, wild):
    block = wild.make().double()
    convert_(block, strict=True)
    x = wild.input(torch.float64)
    twin, expected = copied(block), block.eval()(x, *wild.extra)
    assert type(twin) is type(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    twin.eval()
    assert twin.why_naive(x, *wild.extra) is None
    assert torch.equal(twin(x, *wild.extra), expected)
