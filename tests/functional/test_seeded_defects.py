"""Defects put into the core on purpose: the comparison must find each of them."""

from contextlib import nullcontext

import pytest
import torch

from efficient_densenet.functional import opaque
from efficient_densenet.kernels import eager, slabs
from efficient_densenet.modules import calls
from efficient_densenet.modules import opaque as opaque_modules
from support.compare import (
    KINDS,
    MODES,
    assert_close,
    assert_efficient,
    assert_same_state,
    assert_same_training,
    block_pair,
    image,
    upstream_for,
)
from support.layers import dropout_inside, each, group_norm, instance_norm


def update_statistics_twice(monkeypatch):
    update = calls.update_running_statistics
    monkeypatch.setattr(
        calls, "update_running_statistics", lambda *args: (update(*args), update(*args))
    )


def drop_sum(index, monkeypatch):
    collect = eager.collect

    def without(sums, unit, share, totals, accumulate):
        gradients = collect(sums, unit, share, totals, accumulate)
        if totals is not None:
            totals[index].zero_()
        return gradients

    monkeypatch.setattr(eager, "collect", without)


def drop_first_sum(monkeypatch):
    drop_sum(0, monkeypatch)


def drop_second_sum(monkeypatch):
    drop_sum(1, monkeypatch)


def forget_the_rectifiers_mask(monkeypatch):
    tail_backward = slabs.tail_backward

    def unmasked(grad, a, *args):
        gradients = tail_backward(grad, a, *args)
        a.fill_(1.0)
        return gradients

    monkeypatch.setattr(slabs, "tail_backward", unmasked)


def use_biased_running_variance(monkeypatch):
    update = calls.update_running_statistics
    monkeypatch.setattr(
        calls, "update_running_statistics", lambda seen, values: update(seen, 10**12)
    )


DEFECTS = (
    update_statistics_twice,
    drop_first_sum,
    drop_second_sum,
    forget_the_rectifiers_mask,
    use_biased_running_variance,
)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
@pytest.mark.parametrize("bn_size", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("recompute", MODES)
def test_defect_is_found(recompute, bn_size, defect, monkeypatch):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute)
    x = image()
    assert_efficient(efficient, x)
    defect(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same_training(efficient, naive, x)


def let_buffers_learn_again(monkeypatch):
    def own(module, tensors, args, **options):
        parameters = {name for name, _ in module.named_parameters()}
        kept = {name: t for name, t in tensors.items() if name in parameters}
        return torch.func.functional_call(module, kept, args, **options)

    monkeypatch.setattr(opaque_modules, "functional_call", own)


def draw_other_numbers(monkeypatch):
    monkeypatch.setattr(opaque, "drawing_from", lambda state, device: nullcontext())


def forget_what_flows_on(monkeypatch):
    gradients = opaque.Rebuilt.gradients

    def without(rebuilt, grad):
        _, *rest = gradients(rebuilt, grad)
        return [None, *rest]

    monkeypatch.setattr(opaque.Rebuilt, "gradients", without)


def forget_the_modes(monkeypatch):
    monkeypatch.setattr(opaque_modules, "_in_modes", lambda modes: nullcontext())


OPAQUE_DEFECTS = {
    let_buffers_learn_again: instance_norm,
    draw_other_numbers: dropout_inside,
    forget_what_flows_on: group_norm,
    forget_the_modes: instance_norm,
}


@pytest.mark.parametrize(
    ("defect", "change"), OPAQUE_DEFECTS.items(), ids=lambda value: value.__name__
)
def test_defect_of_layers_that_run_again_is_found(defect, change, monkeypatch):
    def alike(block):
        each(change)(block)
        block.double()

    efficient, naive = block_pair(change=alike)
    x = image()
    assert_efficient(efficient, x)
    defect(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        train_and_evaluate_before_backward(efficient, naive, x)


def train_and_evaluate_before_backward(efficient, naive, x):
    results = []
    for block in (efficient, naive):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        out = block.train()(leaf)
        block.eval()
        out.backward(upstream_for(out))
        results.append(leaf.grad)
    assert_close("input", *results, 1e-9)
    assert_same_state(efficient, naive, rtol=1e-9)


def test_none_is_found_without_defect():
    for change in OPAQUE_DEFECTS.values():

        def alike(block, change=change):
            each(change)(block)
            block.double()

        train_and_evaluate_before_backward(*block_pair(change=alike), image())
