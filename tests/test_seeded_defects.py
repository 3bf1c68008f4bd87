"""Defects put into the core on purpose: the comparison must find each of them."""

import pytest
import torch
from compare import KINDS, MODES, assert_efficient, assert_same_training, block_pair, image

from efficient_densenet import backward, lowering
from efficient_densenet.kernels import eager


def update_statistics_twice(monkeypatch):
    update = lowering.update_running_statistics
    monkeypatch.setattr(
        lowering, "update_running_statistics", lambda *args: (update(*args), update(*args))
    )


def drop_second_sum(monkeypatch):
    collect = backward.MapGradient._collect

    def without_s2(self, norm, sum_d, dgamma):
        collect(self, norm, sum_d, torch.zeros_like(dgamma))

    monkeypatch.setattr(backward.MapGradient, "_collect", without_s2)


def drop_first_sum(monkeypatch):
    collect = backward.MapGradient._collect

    def without_s1(self, norm, sum_d, dgamma):
        collect(self, norm, torch.zeros_like(sum_d), dgamma)

    monkeypatch.setattr(backward.MapGradient, "_collect", without_s1)


def forget_the_rectifiers_mask(monkeypatch):
    tail_backward = eager._tail_backward

    def unmasked(grad, a, tail, needs):
        gradients = tail_backward(grad, a, tail, needs)
        a.fill_(1.0)
        return gradients

    monkeypatch.setattr(eager, "_tail_backward", unmasked)


def use_biased_running_variance(monkeypatch):
    update = lowering.update_running_statistics
    monkeypatch.setattr(
        lowering,
        "update_running_statistics",
        lambda seen: update([s._replace(values=10**12) for s in seen]),
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
    efficient, reference = block_pair(bn_size=bn_size, recompute=recompute)
    x = image()
    assert_efficient(efficient, x)
    defect(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same_training(efficient, reference, x)
