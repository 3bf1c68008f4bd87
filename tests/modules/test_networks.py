"""Whole networks run their parts together, and train exactly as the naive ones."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficient_densenet import DenseNet, EfficientDenseBlock
from efficient_densenet.modules.calls import BlockCall, StemCall
from efficient_densenet.modules.sequence import EfficientSequential
from support.compare import (
    assert_all_close,
    assert_close,
    assert_same_state,
    assert_same_training,
    training_results,
)
from support.marks import slabs_and_whole
from support.stages import no_change, pair, stages

pytestmark = slabs_and_whole


def model_pair(change=no_change, **options):
    arguments = (3, (2, 2), 6, 2, 0.0, 4)
    efficient = DenseNet(*arguments, **options)
    naive = DenseNet(*arguments, recompute="none", **options)
    return pair(efficient, naive, change)


def test_model_runs_stem_and_stages_together(calls):
    model, naive = model_pair()
    x = torch.randn(3, 3, 33, 35, dtype=torch.float64)
    assert_same_training(model, naive, x, rtol=1e-9)
    assert calls == {StemCall: 1, BlockCall: 2}


def observe(name):
    def change(model):
        model.seen = []
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, args, out: model.seen.append(out.detach().clone()))
        module.register_full_backward_hook(
            lambda m, ins, outs: model.seen.append(outs[0].detach().clone())
        )

    return change


HOOKED = ("features", "features.denseblock2", "features.transition1", "features.norm5")


@pytest.mark.parametrize("name", (*HOOKED, "features.denseblock2.denselayer2"))
def test_hooks_see_what_they_see_in_naive_model(name):
    model, naive = model_pair(observe(name))
    x = torch.randn(3, 3, 65, 67, dtype=torch.float64)
    assert_same_training(model, naive, x, rtol=1e-9)
    assert len(model.seen) == len(naive.seen) == 2
    for ours, theirs in zip(model.seen, naive.seen, strict=True):
        assert_close(name, ours, theirs, 1e-9)


def test_features_may_be_called_by_themselves():
    model, naive = model_pair()
    x = torch.randn(3, 3, 33, 35, dtype=torch.float64)
    assert_same_training(model.features, naive.features, x, rtol=1e-9)


def without_head(model):
    model.features.norm5 = nn.Identity()


def with_tail(model):
    model.features.add_module("tail", nn.Conv2d(12, 12, 1).double())


@pytest.mark.parametrize("change", [without_head, with_tail], ids=lambda c: c.__name__)
def test_changed_model_is_run_as_it_is(change):
    model, naive = model_pair(change)
    x = torch.randn(3, 3, 33, 35, dtype=torch.float64)
    assert_same_training(model, naive, x, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_every_part_naive_types(dtype):
    model, naive = model_pair()
    model.float(), naive.float()
    x = torch.randn(4, 3, 33, 35).requires_grad_()

    def run(module):
        twin = x.detach().clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            logits = module(twin)
        logits.float().square().sum().backward()
        return logits, twin.grad, [p.grad for p in module.parameters()]

    (ours, dx, grads), (theirs, their_dx, their_grads) = run(model), run(naive)
    assert ours.dtype == theirs.dtype
    assert dx.dtype == their_dx.dtype
    assert [g.dtype for g in grads] == [g.dtype for g in their_grads]
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    assert error < 20 * torch.finfo(dtype).eps


def test_networks_are_as_precise_as_naive_ones():
    """In float32 against float64: logits and gradients of a small network, several draws."""
    errors = {"ours": [], "naive": []}
    for seed in range(9):
        torch.manual_seed(seed)
        model, naive = model_pair()
        x = torch.randn(4, 3, 33, 35, dtype=torch.float64)
        truth = training_results(copy.deepcopy(naive), x.clone().requires_grad_())
        upstream = None
        for name, module in (("ours", model), ("naive", naive)):
            got = training_results(module.float(), x.float().requires_grad_(), upstream)
            error = [((got[k].double() - v).norm() / v.norm()).item() for k, v in truth.items()]
            errors[name].append(sum(e * e for e in error) ** 0.5)
    error, allowed = (sorted(errors[name])[4] for name in ("ours", "naive"))
    assert error <= 1.5 * allowed + torch.finfo(torch.float32).eps


def test_results_do_not_depend_on_running_together():
    model, _ = model_pair()
    apart = copy.deepcopy(model)
    for module in apart.features:
        module.register_forward_hook(lambda m, args, out: None)
    x = torch.randn(3, 3, 33, 35, dtype=torch.float64)
    results = [training_results(m, x.clone().requires_grad_()) for m in (model, apart)]
    assert_all_close(*results, 1e-10)
    assert_same_state(model, apart)


def test_empty_batch_passes_in_evaluation_mode():
    model, naive = model_pair(nn.Module.eval)
    x = torch.randn(0, 3, 33, 35, dtype=torch.float64)
    assert_same_training(model, naive, x)


def norms_of_exits_in_training(module):
    module.eval()
    for name in ("transition1", "norm5"):
        if hasattr(module, name):
            getattr(module, name).train()


def test_exit_of_one_value_per_channel_is_refused_as_batch_norm_does():
    efficient, _ = stages("norm", 2, change=norms_of_exits_in_training)
    model, _ = model_pair(lambda m: norms_of_exits_in_training(m.features))
    for module, shape in ((efficient, (1, 5, 1, 1)), (model, (1, 3, 8, 8))):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            module(torch.randn(shape, dtype=torch.float64))


def test_hook_on_last_norm_holds_what_caller_changes_in_place():
    features, held = EfficientSequential(OrderedDict(norm=nn.BatchNorm2d(4))), []
    features.norm.register_forward_hook(lambda module, args, output: held.append(output))
    out = features(torch.randn(2, 4, 5, 5))
    F.relu(out, inplace=True)
    assert torch.equal(held[0], out)


def test_change_of_features_in_place_is_refused_with_remedy():
    block = EfficientDenseBlock(2, 4, 2, 4)
    out = block(torch.randn(2, 4, 5, 5))
    out *= 2
    with pytest.raises(RuntimeError, match=r"modified by an inplace[\s\S]*x = x \* y instead"):
        out.sum().backward()
