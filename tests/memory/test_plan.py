"""The largest size that fits is found, of any model, from few estimates; and it is the real one."""

from __future__ import annotations

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn

from efficient_densenet import densenet_cifar, estimate, largest_batch
from efficient_densenet.memory import plan
from efficient_densenet.memory.devices import DEVICES
from efficient_densenet.memory.plan import Fit, find_largest


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=300),
    st.integers(0, 100_000),
    st.integers(1, 5),
)
def test_search_ends_at_edge(rises: list[int], budget: int, smallest: int) -> None:
    most = smallest + len(rises) - 1
    peaks = {smallest + i: sum(rises[: i + 1]) for i in range(len(rises))}
    fit = find_largest(peaks.__getitem__, budget, range(smallest, most + 1))
    edge = max((n for n, peak in peaks.items() if peak <= budget), default=0)
    above = edge + 1 if edge else smallest
    assert (fit.largest, fit.peak) == (edge, peaks.get(edge, 0))
    assert (fit.next, fit.next_peak) == ((None, None) if edge == most else (above, peaks[above]))
    assert fit.peaks == {n: peaks[n] for n in sorted(fit.peaks)}


@pytest.mark.parametrize(
    ("peak", "budget", "looks"),
    [
        (lambda n: 1000 + 7 * n, 1000 + 7 * 900, 5),
        (lambda n: 1000 + 7 * n + max(0, n - 100) * 5, 9000, 6),
        (lambda n: max(50_000, 1000 + 7 * n), 300_000, 8),
        (lambda n: 50 * n * n + 300 * n + 9000, 2_000_000, 7),
    ],
    ids=["affine", "piecewise affine", "flat at first", "quadratic"],
)
def test_search_looks_at_few_sizes(peak, budget: int, looks: int) -> None:
    fit = find_largest(peak, budget, range(2, 2**20 + 1))
    assert peak(fit.largest) <= budget < peak(fit.largest + 1)
    assert len(fit.peaks) <= looks


def test_search_steps_as_its_sizes_do() -> None:
    fit = find_largest(lambda size: 10 * size, 1000, range(32, 1025, 32))
    assert (fit.largest, fit.next) == (96, 128)


def test_search_ends_even_if_everything_fits() -> None:
    fit = find_largest(lambda n: 1, 10, range(2, 1001))
    assert (fit.largest, fit.next) == (1000, None)


# The largest batch

MIB = 2**20
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Pairs(nn.Module):
    """Reads maps of one batch in a dict, and in a list with a scale that has no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1))

    def forward(self, batch: dict[str, Tensor], others: list[Tensor]) -> Tensor:
        other, scale = others
        return self.layers(batch["image"] + scale * other)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return densenet_cifar(16, 4)


def test_largest_batch_is_edge_of_estimate(network) -> None:
    options = {"make_optimizer": SGD, "device": "cpu"}
    fit = largest_batch(network, (None, 3, 16, 16), "8MiB", target=(None,), **options)
    for size, peak in ((fit.largest, fit.peak), (fit.next, fit.next_peak)):
        report = estimate(network, (size, 3, 16, 16), target=(size,), **options)
        assert report.peak.total == peak == fit.peaks[size]
    assert fit.peak <= 8 * MIB == fit.room < fit.next_peak
    assert fit.next == fit.largest + 1 and len(fit.peaks) <= 6


@pytest.mark.parametrize(
    ("inputs", "target"),
    [
        ((5, 3, 16, 16), (5,)),
        (torch.randn(5, 3, 16, 16), torch.arange(5)),
        ((torch.randn(5, 3, 16, 16),), (5,)),
    ],
    ids=["shapes", "tensors", "a tuple"],
)
def test_without_mark_batch_is_what_is_searched(network, inputs, target) -> None:
    marked = largest_batch(network, (None, 3, 16, 16), "8MiB", target=(None,), device="cpu")
    assert largest_batch(network, inputs, "8MiB", target=target, device="cpu") == marked


def test_tensors_keep_their_memory_format(network) -> None:
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    fit = largest_batch(network, images, "8MiB", target=(4,), device="cpu")
    images = torch.randn(fit.largest, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    report = estimate(network, images, target=(fit.largest,), device="cpu")
    assert fit.peak == report.peak.total


def test_any_structure_is_searched() -> None:
    image, other, scale = (None, 3, 8, 8), (None, 3, 8, 8), torch.ones(3, 1, 1)
    inputs = ({"image": image}, [other, scale])
    options = {"loss_fn": F.mse_loss, "device": "cpu", "verify": True}
    fit = largest_batch(Pairs(), inputs, "1MiB", target=(None, 1, 8, 8), **options)
    assert fit.largest > 8 and fit.verified


def test_any_dimension_is_searched_in_steps_of_its_own(network) -> None:
    sizes = range(8, 257, 8)
    options = {"target": (2,), "device": "cpu", "sizes": sizes, "verify": True}
    fit = largest_batch(network, (2, 3, None, None), "4MiB", **options)
    assert fit.largest % 8 == 0 and fit.next == fit.largest + 8
    assert fit.largest > 16 and fit.verified


@pytest.mark.parametrize("make_optimizer", [None, SGD, torch.optim.AdamW], ids=["none", "sgd", "w"])
def test_edge_is_verified_by_real_steps(network, make_optimizer) -> None:
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    options = {"make_optimizer": make_optimizer, "device": "cpu", "verify": True}
    fit = largest_batch(network, images, "4MiB", target=labels, **options)
    assert fit.verified and "real steps agree" in str(fit)
    assert fit.tried[fit.largest] == pytest.approx(fit.peak, rel=0.001)
    assert fit.tried[fit.next] is None


@pytest.mark.parametrize("wrong", [0.9, 1.1])
def test_estimate_that_is_wrong_is_found_out(network, wrong: float, monkeypatch) -> None:
    true = plan.run_within
    monkeypatch.setattr(
        plan, "run_within", lambda room, *rest, **kw: true(int(room * wrong), *rest, **kw)
    )
    fit = largest_batch(
        network, (None, 3, 16, 16), "4MiB", target=(None,), device="cpu", verify=True
    )
    assert not fit.verified and "real steps DISAGREE" in str(fit)


def test_nothing_that_fits_is_result(network) -> None:
    fit = largest_batch(
        network, (None, 3, 16, 16), "64KiB", target=(None,), device="cpu", verify=True
    )
    assert (fit.largest, fit.peak, fit.next) == (0, 0, 2)
    assert fit.verified and str(fit).startswith("nothing fits 0.1 MiB; 2 would need ")


def test_reserve_of_gpu_is_left() -> None:
    model, reserve = nn.Linear(64, 64), DEVICES["cuda"].reserve
    fit = largest_batch(model, (None, 64), reserve + 8 * MIB, device="cuda")
    assert fit.room == 8 * MIB and fit.peak <= 8 * MIB < fit.next_peak


def test_fit_that_was_not_run_is_not_verified() -> None:
    assert not Fit(10, 1, 5, 2, 20, {1: 5, 2: 20}).verified


def test_wrong_calls_are_answered_in_sentence(network) -> None:
    with pytest.raises(ValueError, match=r"budget must be a size .* got '8GBB'"):
        largest_batch(network, (None, 3, 16, 16), "8GBB")
    with torch.device("meta"):
        hollow = densenet_cifar(10, 4)
    with pytest.raises(ValueError, match="verify needs the model on 'cpu', got it on 'meta'"):
        largest_batch(hollow, (None, 3, 16, 16), "4MiB", device="cpu", verify=True)
