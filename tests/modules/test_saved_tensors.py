"""Hooks on saved tensors, and checkpoints around a block: rows of the matrix in docs/interop.md."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.compare import (
    assert_all_close,
    assert_same_state,
    assert_same_training,
    block_pair,
    image,
    training_results,
)
from support.marks import both_kinds, clause, every_mode, slabs_and_whole

pytestmark = slabs_and_whole


@clause("6 · saved_tensors_hooks")
@every_mode
@both_kinds
def test_everything_kept_goes_through_saved_tensors_hooks(mode, bn_size, took):
    efficient, naive = block_pair(bn_size=bn_size, recompute=mode, drop_rate=0.0)
    x = image().requires_grad_()
    took(efficient.why_naive(x))
    packed = []

    def pack(tensor):
        packed.append(tensor.numel())
        return tensor.detach().numpy().copy(), tensor.requires_grad

    def unpack(saved):
        array, requires_grad = saved
        return torch.from_numpy(array.copy()).requires_grad_(requires_grad)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        got = training_results(efficient, x)
    assert packed
    assert_all_close(got, training_results(naive, x), 1e-10)
    assert_same_state(efficient, naive)


@clause("6 · save_on_cpu")
@every_mode
def test_saved_tensors_may_be_moved_away(mode, took):
    efficient, naive = block_pair(recompute=mode)
    x = image().requires_grad_()
    took(efficient.why_naive(x))
    with torch.autograd.graph.save_on_cpu():
        got = training_results(efficient, x)
    assert_all_close(got, training_results(naive, x), 1e-10)
    assert_same_state(efficient, naive)


class Checkpointed(nn.Module):
    def __init__(self, block, **options):
        super().__init__()
        self.block, self.options = block, options

    def forward(self, x):
        return checkpoint(self.block, x, **self.options)


class Direct(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)


@clause("6 · an outer checkpoint")
@every_mode
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("change", [nn.Module.train, nn.Module.eval], ids=["train", "eval"])
def test_block_may_be_checkpointed(mode, reentrant, change, took):
    """Running statistics may then be updated twice, as they are with the naive block.

    A checkpoint that is not reentrant stops as soon as it has what was kept: before the efficient
    block would update them again. It is compared with the block without a checkpoint.
    """
    efficient, naive = block_pair(recompute=mode, change=change)
    took(efficient.why_naive(image()))
    efficient = Checkpointed(efficient, use_reentrant=reentrant)
    if reentrant or mode == "none":
        naive = Checkpointed(naive, use_reentrant=reentrant)
    else:
        naive = Direct(naive)
    assert_same_training(efficient, naive, image(), steps=2)


@clause("6 · an outer checkpoint: dropout")
@every_mode
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_dropout_draws_same_masks_again(mode, reentrant, took):
    plain, _ = block_pair(recompute=mode, drop_rate=0.4)
    took(plain.why_naive(image()))
    again = Checkpointed(copy.deepcopy(plain), use_reentrant=reentrant)
    x, found = image(), []
    for module in (plain, again):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        found.append(list(training_results(module, leaf).values()))
    assert_all_close(*(dict(enumerate(values)) for values in found), 1e-12)
