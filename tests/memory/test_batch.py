"""Any structure of inputs, targets and outputs is a step; what is none is refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_densenet import estimate, measure, meter

INSTRUMENTS = (measure, meter, partial(estimate, device="cpu"))
ids = ["measure", "meter", "estimate"]
every_instrument = pytest.mark.parametrize("instrument", INSTRUMENTS, ids=ids)


class Structured(nn.Module):
    """Reads a dict of maps and a pair, returns a dict of a map and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.offset = torch.ones(4, 1, 1)  # neither parameter nor buffer

    def forward(self, batch: dict[str, Tensor], pair: tuple[Tensor, str]) -> dict[str, object]:
        assert pair[1] == "words pass"
        maps = self.conv(batch["image"]) + self.offset
        return {"maps": maps, "rest": (maps.mean(), batch["image"].sum())}


def loss_of(output: dict, target: dict) -> Tensor:
    maps = F.mse_loss(output["maps"], target["maps"])
    return maps + F.cross_entropy(output["maps"], target["classes"])


@every_instrument
def test_dicts_and_tuples_go_in_and_out(instrument) -> None:
    pair = (torch.zeros(5), "words pass")
    free = instrument(Structured(), {"image": (2, 3, 8, 8)}, pair)
    assert free.peak.inputs == 4 * (2 * 3 * 64 + 5)
    target = {"maps": (2, 4, 8, 8), "classes": (2, 8, 8)}
    held = instrument(Structured(), {"image": (2, 3, 8, 8)}, pair, target=target, loss_fn=loss_of)
    assert held.peak.inputs == free.peak.inputs + 4 * 2 * 4 * 64 + 8 * 2 * 64


@pytest.mark.parametrize(
    ("target", "size"),
    [((6,), 6 * 8), ((6, 5), 6 * 5 * 4), (torch.rand(6, 5, dtype=torch.float64), 6 * 5 * 8)],
    ids=["indices", "values", "tensor"],
)
@every_instrument
def test_target_of_outputs_shape_holds_values(instrument, target, size) -> None:
    report = instrument(nn.Linear(7, 5), (6, 7), target=target)
    assert report.peak.inputs == 6 * 7 * 4 + size


@every_instrument
def test_target_may_be_all_that_loss_takes(instrument) -> None:
    def loss_fn(output: Tensor, target: float) -> Tensor:
        return (output - target).abs().mean()

    assert instrument(nn.Linear(7, 5), (6, 7), target=0.5, loss_fn=loss_fn).peak.inputs == 6 * 7 * 4


LOSSES = (
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.soft_margin_loss),
    *(F.binary_cross_entropy, F.binary_cross_entropy_with_logits),
)


@pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda function: function.__name__)
def test_estimate_is_meter_to_byte_whatever_loss(loss_fn) -> None:
    model, options = nn.Sequential(nn.Linear(7, 500), nn.Sigmoid()), {"loss_fn": loss_fn}
    metered = meter(model, (60, 7), target=(60, 500), **options)
    estimated = estimate(model, (60, 7), target=(60, 500), device="cpu", **options)
    assert (estimated.kept, estimated.peak) == (metered.kept, metered.peak)


@every_instrument
def test_output_that_needs_no_gradient_is_no_start(instrument) -> None:
    with pytest.raises(TypeError, match=r"loss_fn must be given .* a tensor of shape \(2, 3\)"):
        instrument(nn.Identity(), torch.zeros(2, 3))


def call(*args: object, model: nn.Module | None = None, **options: object) -> Callable:
    return lambda instrument: instrument(model or nn.Linear(7, 5), *args, **options)


WRONG: dict[str, tuple[Callable, type[Exception], str]] = {
    "no input": (call(), ValueError, "inputs must hold at least one tensor or shape, got none"),
    "nothing in the input": (call({}), ValueError, "inputs must hold at least one tensor"),
    "a shape in pieces": (call(4, 3, 96, 96), TypeError, r"got 4: is \(4, 3, 96, 96\) one shape\?"),
    "text": (call("image"), TypeError, "inputs must be tensors, shapes .* got 'image'"),
    "no model": (
        call((6, 7), model=F.relu),
        TypeError,
        "model must be a torch.nn.Module, got an instance of builtin_function|function",
    ),
    "no gradient": (
        call((6, 7), target=(6,), model=nn.Linear(7, 5).requires_grad_(False)),
        TypeError,
        "model must have a parameter that requires a gradient, got none",
    ),
    "a target in pieces": (call((6, 7), target=6), TypeError, "target must be .* got 6"),
    "a target of fractions": (
        call((6, 7), target=(6.0,)),
        TypeError,
        r"target must be a tensor, or a shape of whole numbers, .* got \(6.0,\)",
    ),
    "values of another shape": (
        call((6, 7), target=torch.rand(6)),
        TypeError,
        r"target must be .* shape \(6, 5\), .* got torch.float32 of shape \(6,\)",
    ),
    "a loss that is a name": (
        call((6, 7), target=(6,), loss_fn="bce"),
        TypeError,
        "loss_fn must be a function of output and target, got 'bce'",
    ),
    "a precision that is a name": (
        call((6, 7), target=(6,), autocast_dtype="bf16"),
        TypeError,
        "autocast_dtype must be torch.bfloat16 or torch.float16, got 'bf16'",
    ),
    "a precision of whole numbers": (
        call((6, 7), target=(6,), autocast_dtype=torch.int8),
        TypeError,
        "autocast_dtype must be .* got torch.int8",
    ),
    "an argument of before": (call((6, 7), granularity=0), TypeError, "'granularity'"),
    "a loss that is none": (
        call((6, 7), loss_fn=lambda output: output),
        TypeError,
        r"loss_fn must return a scalar, got a tensor of shape \(6, 5\)",
    ),
    "no loss for a dict": (
        call({"image": (2, 3, 8, 8)}, (torch.zeros(5), "words pass"), model=Structured(), target=2),
        TypeError,
        "loss_fn must be given where the output is no tensor, got an instance of dict",
    ),
}


@pytest.mark.parametrize(("wrong", "error", "said"), WRONG.values(), ids=WRONG)
@every_instrument
def test_wrong_call_is_answered_in_sentence(instrument, wrong, error, said) -> None:
    with pytest.raises(error, match=said) as caught:
        wrong(instrument)
    assert "\n" not in str(caught.value)


def test_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, got 'tpu'"):
        estimate(nn.Linear(7, 5), (6, 7), device="tpu")


@pytest.mark.parametrize("instrument", [measure, meter], ids=lambda f: f.__name__)
def test_tensors_on_another_device_are_refused_with_both(instrument) -> None:
    with pytest.raises(ValueError, match="on the model's device, got cpu, meta"):
        instrument(nn.Linear(7, 5), torch.empty(6, 7, device="meta"))
