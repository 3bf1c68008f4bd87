"""A budget stops what would pass it, and leaves nothing behind."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.edge_of_budget import edge
from efficient_densenet.memory.budget import BudgetExceeded, MeteredBudget, enforce, forget_backward
from efficient_densenet.memory.meter import LiveMeter
from efficient_densenet.models import densenet_cifar
from efficient_densenet.training import plan as planner
from efficient_densenet.training.config import make_optimizer
from efficient_densenet.training.work import COMPETITORS, Work

CPU = torch.device("cpu")
WORK = Work("cifar-bc", 16, 4, 16, 4)


class Training:
    """A network, its optimizer and steps on one batch."""

    def __init__(self, network: nn.Module, work: Work = WORK) -> None:
        self.network = network
        self.optimizer = make_optimizer(network.parameters(), lr=0.1)
        self.images = torch.randn(
            work.batch_size, work.in_channels, work.image_size, work.image_size
        )
        self.labels = torch.arange(work.batch_size) % work.num_classes

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.network(self.images), self.labels).backward()
        self.optimizer.step()

    def resident(self) -> list[torch.Tensor]:
        state = [v for values in self.optimizer.state.values() for v in values.values()]
        own = [*self.network.parameters(), *self.network.buffers(), *state]
        return [*own, self.images, self.labels]

    def state(self) -> tuple[dict, dict]:
        return copy.deepcopy((self.network.state_dict(), self.optimizer.state_dict()))

    def restore(self, state: tuple[dict, dict]) -> None:
        model, optimizer = copy.deepcopy(state)
        self.network.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)


def assert_same(found, expected, name: str = "state") -> None:
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=name)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_same(found[key], value, f"{name}.{key}")
    elif isinstance(expected, (list, tuple)):
        for i, (own, value) in enumerate(zip(found, expected, strict=True)):
            assert_same(own, value, f"{name}[{i}]")
    else:
        assert found == expected, name


def test_state_that_differs_anywhere_is_not_equal() -> None:
    training = Training(densenet_cifar(10, 4))
    training.step()
    state, other = training.state(), training.state()
    assert_same(other, state)
    next(iter(other[1]["state"].values()))["momentum_buffer"].view(-1)[0] += 1e-3
    with pytest.raises(AssertionError, match="momentum_buffer"):
        assert_same(other, state)


# The metered limit


def test_limit_is_exact() -> None:
    x = torch.randn(1000)
    with MeteredBudget(12_000, [x]) as budget:
        y = x + 1
        y = y + 1
        assert (budget.live, budget.peak) == (8000, 12_000)
        with pytest.raises(BudgetExceeded, match=r"add\.Tensor needs .*budget.*by aten\.add"):
            _ = [y + 1, y + 2]
        assert budget.live == 8000
    assert isinstance(BudgetExceeded(), torch.OutOfMemoryError)


def test_storages_count_once_and_while_they_live() -> None:
    x = torch.randn(1000)
    with MeteredBudget(12_000, [x, x[10:]]) as budget:
        assert budget.resident == 4000
        for _ in range(10):
            y = x * 2
        y.view(10, 100).t()
        assert budget.live == 8000
        del y
        assert budget.live == 4000


@pytest.mark.parametrize("mode", COMPETITORS)
def test_planned_step_fits_its_peak_and_no_smaller_budget(mode: str) -> None:
    planned = WORK.estimate(mode, "cpu").peak.total
    training = Training(WORK.build(mode))
    training.step()
    training.optimizer.zero_grad(set_to_none=True)
    with enforce(planned, CPU, training.resident()) as budget:
        training.step()
    assert budget is not None and budget.peak == pytest.approx(planned, rel=0.001)
    training.optimizer.zero_grad(set_to_none=True)
    short = int(budget.peak * 0.99)
    with pytest.raises(BudgetExceeded), enforce(short, CPU, training.resident()) as budget:
        training.step()
    training.optimizer.zero_grad(set_to_none=True)
    assert budget.live == budget.resident


def test_after_limit_smaller_batch_goes_on() -> None:
    training = Training(densenet_cifar(16, 4, recompute="none"), WORK)
    limit = WORK.estimate("naive", "cpu").peak.total
    images = torch.randn(4 * len(training.images), 3, 16, 16)
    with MeteredBudget(limit, training.resident()) as budget:
        before = budget.live
        with pytest.raises(BudgetExceeded):
            training.network(images).sum().backward()
        training.optimizer.zero_grad(set_to_none=True)
        assert budget.live == before
        training.step()


def test_budget_does_not_change_training() -> None:
    plain = Training(densenet_cifar(16, 4))
    watched = copy.deepcopy(plain.network)
    twin = Training(watched)
    twin.images = plain.images
    for _ in range(2):
        plain.step()
        with enforce(2**30, CPU, twin.resident()):
            twin.step()
    assert_same(twin.network.state_dict(), plain.network.state_dict())


# Memory that runs out anywhere


class Failing(LiveMeter):
    """Runs out of memory at the operator of that number."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.count == self.at:
            raise torch.OutOfMemoryError(f"injected at {func}")
        self.count += 1
        return super().__torch_dispatch__(func, types, args, kwargs)

    def live_bytes(self) -> int:
        return sum(event.size for event in self.events)


@pytest.mark.parametrize("mode", COMPETITORS)
def test_memory_that_runs_out_anywhere_leaves_nothing(mode: str) -> None:
    training = Training(WORK.build(mode))
    training.step()
    state = training.state()
    with Failing(at=None) as probe:
        training.step()
    expected = training.state()
    assert probe.count > 400 and probe.live_bytes() > 0  # gradients
    gc.disable()  # what only the collector would free is a leak as well
    try:
        for at in range(0, probe.count, 10):
            training.restore(state)
            training.optimizer.zero_grad(set_to_none=True)
            meter = Failing(at)
            with pytest.raises(torch.OutOfMemoryError, match="injected"), meter:
                training.step()
            forget_backward()
            training.optimizer.zero_grad(set_to_none=True)
            assert meter.events or at < 10
            assert meter.live_bytes() == 0, f"after operator {at}"
            training.restore(state)
            training.step()
            assert_same(training.state(), expected, f"after operator {at}")
    finally:
        gc.enable()


# The edge


SIZES = {"batch_size": 2, "growth_rate": 4}


@pytest.mark.parametrize("mode", COMPETITORS)
def test_edge_of_plan_is_edge_of_budget(mode: str) -> None:
    assert edge(mode, 4 << 20, SIZES).as_planned


def test_plan_that_promises_too_much_is_found_out(monkeypatch) -> None:
    made = planner.plan("4MiB", **SIZES, device="cpu", modes=["norm"])
    deeper = replace(made["norm"], largest=made["norm"].largest + 6, next=made["norm"].next + 6)
    monkeypatch.setattr(
        "benchmarks.edge_of_budget.plan", lambda *a, **k: replace(made, fits={"norm": deeper})
    )
    assert not edge("norm", 4 << 20, SIZES).as_planned


# The deep end


@pytest.mark.slow
def test_thousand_layers_train() -> None:
    work = Work("cifar-bc", 32, 4, 1000, 12)
    planned = work.estimate("bottleneck", "cpu").peak.total
    training = Training(work.build("bottleneck"), work)
    before = [p.detach().clone() for p in training.network.parameters()]
    with enforce(planned, CPU, training.resident()):
        training.step()
    for old, new in zip(before, training.network.parameters(), strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)
