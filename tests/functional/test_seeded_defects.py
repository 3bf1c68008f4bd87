"""Defects put into the core on purpose: the comparison must find each of them."""

import pytest

from efficient_densenet.kernels import eager, slabs
from efficient_densenet.modules import calls
from support.compare import KINDS, MODES, assert_efficient, assert_same_training, block_pair, image


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
