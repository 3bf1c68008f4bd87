"""The state and the update of any optimizer are estimated as they are."""

from __future__ import annotations

import inspect
from functools import partial
from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
)

from efficient_densenet import estimate, measure, meter
from efficient_densenet.memory.meter import LiveMeter
from efficient_densenet.memory.report import StepReport

CLASSES = (
    *(ASGD, Adadelta, Adafactor, Adagrad, Adam, AdamW, Adamax),
    *(NAdam, RAdam, RMSprop, Rprop, SGD),
)
INSTRUMENTS = pytest.mark.parametrize(
    "instrument", [measure, meter, estimate], ids=lambda function: function.__name__
)


def variants(*flags: str) -> list:
    """Every optimizer as it is, and with each of ``flags`` that it knows."""
    made = [pytest.param(cls, id=cls.__name__) for cls in CLASSES]
    for cls in CLASSES:
        for flag in flags:
            if flag in inspect.signature(cls).parameters:
                made.append(pytest.param(partial(cls, **{flag: True}), id=f"{cls.__name__} {flag}"))
    return made


class Net(nn.Module):
    """Few activations beside its parameters, so that the update is the peak; one is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(96, 160), nn.ReLU(), nn.Linear(160, 4, bias=False))
        self.unused = nn.Parameter(torch.zeros(10_000))
        self.frozen = nn.Parameter(torch.zeros(50), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize("make_optimizer", variants("foreach", "fused", "amsgrad", "centered"))
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16], ids=["plain", "autocast"])
def test_estimated_update_is_metered_one(make_optimizer, autocast_dtype) -> None:
    options = {"target": (2,), "make_optimizer": make_optimizer, "autocast_dtype": autocast_dtype}
    model, x = Net(), torch.randn(2, 96)
    metered, estimated = meter(model, x, **options), estimate(model, x, device="cpu", **options)
    assert estimated.peak == metered.peak
    assert highest_of_update(estimated) == highest_of_update(metered)
    assert estimated.peak.optimizer < 4 * estimated.peak.parameters - 3 * 4 * 10_000  # the unused


@pytest.mark.parametrize("make_optimizer", variants())
def test_estimated_peak_is_measured_one(make_optimizer) -> None:
    options = {"target": (2,), "make_optimizer": make_optimizer}
    measured = measure(Net(), torch.randn(2, 96), **options)
    estimated = estimate(Net(), (2, 96), device="cpu", **options)
    assert estimated.peak.total == pytest.approx(measured.peak.total, rel=0.002)


def highest_of_update(report: StepReport) -> int:
    """Most bytes that the optimizer's step holds at once, above those before it."""
    sizes = (event.size for event in report.events if event.phase == "optimizer")
    return max(accumulate(sizes), default=0)


@pytest.mark.parametrize("make_optimizer", variants("foreach", "fused", "capturable"))
def test_update_on_gpu_is_estimated_without_one(make_optimizer) -> None:
    report = estimate(Net(), (2, 96), target=(2,), make_optimizer=make_optimizer, device="cuda")
    assert report.peak.total >= report.peak.parameters + report.peak.optimizer


def test_state_on_gpu_is_what_lives_there() -> None:
    def state(**flags: bool) -> int:
        make = partial(AdamW, **flags)
        report = estimate(Net(), (2, 96), target=(2,), make_optimizer=make, device="cuda")
        return report.peak.optimizer

    trained = (96 * 160, 160, 160 * 4)
    moments = 2 * sum(-(-4 * size // 512) * 512 for size in trained)
    assert state() == moments  # the counts of steps are on the CPU
    assert state(fused=True) == state(capturable=True) == moments + 512 * len(trained)


def test_update_on_gpu_is_of_all_parameters_at_once_unless_told() -> None:
    def highest(device: str, **flags: bool) -> int:
        make = partial(SGD, lr=0.1, weight_decay=1e-4, **flags)
        options = {"target": (2,), "make_optimizer": make, "device": device}
        return highest_of_update(estimate(Net(), (2, 96), **options))

    trained = 4 * (96 * 160 + 160 + 160 * 4)
    assert highest("cuda") == pytest.approx(trained, rel=0.01)  # a decayed gradient for each
    assert highest("cuda", foreach=False) == highest("cpu") == 4 * 96 * 160
    assert highest("cuda", fused=True) == 0


def test_gradient_scaler_adds_few_numbers() -> None:
    model, x, target = Net(), torch.randn(2, 96), torch.zeros(2, dtype=torch.int64)
    optimizer, scaler = AdamW(model.parameters()), torch.amp.GradScaler("cpu")

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(model(x), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    step()
    optimizer.zero_grad()
    with LiveMeter() as live:
        step()
    scaled = max(accumulate(event.size for event in live.events))
    options = {"make_optimizer": AdamW, "autocast_dtype": torch.float16, "device": "cpu"}
    estimated = estimate(model, x, target=target, **options)
    assert estimated.peak.step == pytest.approx(scaled, abs=64)


@INSTRUMENTS
def test_gradients_of_earlier_steps_live_all_the_time(instrument) -> None:
    """With many activations the peak is before there are all gradients of the step itself."""
    layers = nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU())
    alone = instrument(layers, (4096, 96))
    added = instrument(layers, (4096, 96), accumulate=True)
    gradients = sum(parameter.nbytes for parameter in layers.parameters())
    assert added.kept == alone.kept
    assert added.peak.gradients == gradients
    assert 0 < added.peak.total - alone.peak.total <= gradients


@INSTRUMENTS
def test_copy_of_weights_that_is_part_of_model_is_counted(instrument) -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.average = torch.optim.swa_utils.AveragedModel(self.net).requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    alone = instrument(Net(), (2, 96), target=(2,)).peak
    both = instrument(Averaged(), (2, 96), target=(2,)).peak
    assert both.parameters == 2 * alone.parameters and both.step == alone.step


@INSTRUMENTS
@pytest.mark.parametrize(
    ("make_optimizer", "error", "said"),
    [
        (SGD(Net().parameters()), TypeError, "make_optimizer must make .* an instance of SGD"),
        (lambda parameters: "Adam", TypeError, "made an instance of str"),
        (LBFGS, TypeError, "LBFGS, whose step runs the model by itself"),
        (lambda parameters: SGD(Net().parameters()), ValueError, "only the parameters that it is"),
    ],
    ids=["an optimizer", "no optimizer", "lbfgs", "other parameters"],
)
def test_what_makes_no_optimizer_is_refused(instrument, make_optimizer, error, said) -> None:
    with pytest.raises(error, match=said):
        instrument(Net(), (2, 96), target=(2,), make_optimizer=make_optimizer)


@INSTRUMENTS
def test_optimizer_of_some_parameters_has_state_for_them_alone(instrument) -> None:
    def make(parameters):
        return AdamW([{"params": [p for p in parameters if p.dim() == 1 and p.requires_grad]}])

    report = instrument(Net(), (2, 96), target=(2,), make_optimizer=make)
    assert 2 * 4 * 160 <= report.peak.optimizer <= 2 * 512 * 2 + 512
