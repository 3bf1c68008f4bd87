"""Measured, metered and estimated memory of a step agree with each other and with arithmetic."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.densenet import _DenseBlock

from efficient_densenet import EfficientDenseBlock, convert_
from efficient_densenet.kernels import workspace
from efficient_densenet.memory.devices import DEVICES
from efficient_densenet.memory.events import Event, find_peak, live_bytes
from efficient_densenet.memory.meter import LiveMeter
from efficient_densenet.memory.step import estimate, measure, meter
from efficient_densenet.models import densenet_cifar
from efficient_densenet.modules.naive import DenseBlock

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
STATIC = {"parameters": 0, "buffers": 0, "inputs": 0, "optimizer": 0}


class Double(nn.Module):
    """``(x * w).exp()``: keeps the product's exponential and nothing else of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.w).exp()


def blocks() -> list:
    x = torch.randn(4, 12, 16, 16, requires_grad=True)
    made = {
        "naive": DenseBlock(6, 12, 4, 12),
        "basic": DenseBlock(6, 12, None, 12, bias=True),
        "dropout": DenseBlock(4, 12, 4, 12, 0.2),
        "torchvision": _DenseBlock(6, 12, 4, 12, 0.0, memory_efficient=True),
        "norm": EfficientDenseBlock(6, 12, 4, 12, recompute="norm"),
        "bottleneck": EfficientDenseBlock(6, 12, 4, 12, recompute="bottleneck"),
        "efficient basic": EfficientDenseBlock(6, 12, None, 12, recompute="bottleneck"),
    }
    return [pytest.param(model, x, id=name) for name, model in made.items()]


# Timeline


def test_peak_is_split_by_what_storages_become() -> None:
    events = [
        Event("forward", "conv", 0, 100),
        Event("forward", "relu", 1, 10),
        Event("forward", "relu", 1, -10),
        Event("backward", "seed", 2, 7),
        Event("backward", "conv_backward", 3, 30),
        Event("backward", "conv_backward", 0, -100),
    ]
    assert live_bytes(events) == [100, 110, 100, 107, 137, 37]
    peak = find_peak(events, gradients={3}, static={**STATIC, "parameters": 1000})
    assert (peak.activations, peak.gradients, peak.transient) == (100, 30, 7)
    assert (peak.step, peak.total) == (137, 1137)
    assert (peak.operator, peak.phase) == ("conv_backward", "backward")


def test_storage_that_grows_is_counted_once() -> None:
    events = [
        Event("forward", "empty", 0, 8),
        Event("forward", "resize_", 0, 24),
        Event("backward", "mul", 1, 4),
    ]
    peak = find_peak(events, gradients=(), static=STATIC)
    assert (peak.activations, peak.transient) == (32, 4)


# Arithmetic that can be done by hand


@pytest.mark.parametrize("instrument", [measure, meter, estimate], ids=lambda f: f.__name__)
def test_step_of_known_size(instrument) -> None:
    size = 2**14
    bytes_ = 4 * size
    report = instrument(Double(size), torch.randn(size), make_optimizer=SGD)
    assert report.kept == bytes_  # the exponential, which is the output
    assert report.peak.parameters == report.peak.inputs == report.peak.optimizer == bytes_
    assert report.peak.buffers == 0
    # the output, its random gradient, exp's gradient and the weight's
    assert report.peak.step == 4 * bytes_


def test_loss_and_target_are_part_of_step() -> None:
    model, x = nn.Linear(64, 32), torch.randn(16, 64)
    report = meter(model, x, target=torch.zeros(16, dtype=torch.int64))
    assert report.peak.inputs == 16 * 64 * 4 + 16 * 8
    # log_softmax, and scalars: the logits themselves are not needed any more
    assert 16 * 32 * 4 <= report.kept <= 16 * 32 * 4 + 16
    own = meter(model, x, loss_fn=lambda output: output.square().mean())
    assert own.kept >= 16 * 32 * 4
    assert {event.phase for event in own.events} == {"forward", "backward"}


def test_frozen_parameters_have_no_gradient() -> None:
    model = DenseBlock(2, 4, 2, 4)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    trained = sum(event.size for event in meter(model, x).events)
    model.requires_grad_(False)
    frozen = sum(event.size for event in meter(model, x).events)
    parameters = sum(4 * p.numel() for p in model.parameters())
    assert trained - frozen == parameters


# Instruments against each other


@pytest.mark.parametrize(("model", "x"), blocks())
def test_meter_agrees_with_allocator(model: nn.Module, x: torch.Tensor) -> None:
    truth, metered = measure(model, x), meter(model, x)
    # each checkpoint also keeps a state of the random generator, which no operator makes
    checkpoints = 6 if isinstance(model, _DenseBlock) else 0
    slack = checkpoints * torch.get_rng_state().numel()
    if "convolution" in truth.peak.operator:  # which holds oneDNN's buffers
        assert 0.99 * truth.peak.step <= metered.peak.step <= 1.03 * truth.peak.step
    else:
        assert metered.peak.step + slack == pytest.approx(truth.peak.step, rel=0.005)
    assert metered.kept == pytest.approx(truth.kept, rel=0.005, abs=slack + 1)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True], ids=["naive", "checkpointed"])
def test_meter_agrees_with_allocator_on_densenet121(checkpointed: bool) -> None:
    model = torchvision.models.densenet121(memory_efficient=checkpointed)
    x, target = torch.randn(8, 3, 224, 224), torch.zeros(8, dtype=torch.int64)
    truth, metered = measure(model, x, target=target), meter(model, x, target=target)
    assert metered.peak.step == pytest.approx(truth.peak.step, rel=0.005)


def test_meter_charges_engines_additions_as_in_place() -> None:
    class Fan(nn.Module):
        """One tensor with many consumers, whose gradients the engine sums."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            return torch.stack([(y * i).mean() for i in range(1, 6)])

    x = torch.randn(2**16, requires_grad=True)
    assert meter(Fan(), x).peak.step == pytest.approx(measure(Fan(), x).peak.step, rel=0.005)


def test_meter_counts_on_any_device() -> None:
    with torch.device("meta"):
        model, x = Double(2**14), torch.empty(2**14)
    assert meter(model, x).peak == meter(Double(2**14), torch.randn(2**14)).peak


def test_metered_training_computes_same_gradients() -> None:
    model, x = DenseBlock(3, 4, 2, 4), torch.randn(2, 4, 8, 8)
    twin = copy.deepcopy(model)
    model(x).square().sum().backward()
    with LiveMeter():
        twin(x).square().sum().backward()
    for plain, metered in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(metered.grad, plain.grad)


@pytest.mark.parametrize("counts", DEVICES)
@pytest.mark.parametrize(("model", "x"), blocks())
def test_estimate_equals_meter_to_byte(
    model: nn.Module, x: torch.Tensor, counts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEVICES, "cpu", DEVICES[counts])
    estimated, metered = estimate(model, x, device="cpu"), meter(model, x)
    assert (estimated.kept, estimated.peak) == (metered.kept, metered.peak)


@pytest.mark.parametrize("samples_per_slab", [1, 2, 3])
@pytest.mark.parametrize("recompute", ["norm", "bottleneck"])
def test_estimate_equals_meter_to_byte_in_many_slabs(
    recompute: str, samples_per_slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", samples_per_slab * 52 * 8 * 8 * 4)
    model = densenet_cifar(16, 10, recompute=recompute)  # up to 50 channels, at 8x8 pixels
    x = torch.randn(11, 3, 8, 8)
    estimated, metered = estimate(model, x, device="cpu"), meter(model, x)
    assert (estimated.kept, estimated.peak) == (metered.kept, metered.peak)


@pytest.mark.parametrize("optimizer", [SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_estimate_covers_networks_and_optimizers(optimizer) -> None:
    model = densenet_cifar(22, 8)
    x, target = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)
    metered = meter(model, x, target=target, make_optimizer=optimizer)
    estimated = estimate(model, (4, 3, 32, 32), target=(4,), make_optimizer=optimizer, device="cpu")
    assert (estimated.kept, estimated.peak) == (metered.kept, metered.peak)
    assert metered.peak.optimizer >= metered.peak.parameters


@pytest.mark.parametrize("recompute", ["none", "norm", "bottleneck"])
def test_estimate_covers_mixed_precision(recompute) -> None:
    model = EfficientDenseBlock(6, 12, 4, 12, recompute=recompute)
    x = torch.randn(4, 12, 16, 16, requires_grad=True)
    options = {"autocast_dtype": torch.bfloat16}
    metered, estimated = meter(model, x, **options), estimate(model, x, device="cpu", **options)
    assert (estimated.kept, estimated.peak) == (metered.kept, metered.peak)


@pytest.mark.parametrize("recompute", ["none", "norm", "bottleneck"])
def test_estimate_of_mixed_precision_is_measured_peak(recompute) -> None:
    model = densenet_cifar(22, 12, recompute=recompute)
    x, target = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)
    options = {"target": target, "autocast_dtype": torch.bfloat16, "make_optimizer": SGD}
    truth = measure(model, x, **options).peak.total
    assert 0.99 * truth <= estimate(model, x, device="cpu", **options).peak.total <= 1.03 * truth


# Manners


@pytest.mark.parametrize("instrument", [measure, meter, estimate], ids=lambda f: f.__name__)
def test_model_inputs_and_random_state_are_left_untouched(instrument) -> None:
    model, x = DenseBlock(2, 4, 2, 4), torch.randn(2, 4, 8, 8, requires_grad=True)
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    parameters = list(model.parameters())
    instrument(model, x, make_optimizer=SGD)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert x.grad is None and all(p.grad is None for p in parameters)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("where", ["all", "a part"])
def test_compiled_model_is_estimated_as_it_was_written(where: str) -> None:
    """Nothing is compiled for it: Inductor fails on tensors without values."""

    def refuse(graph: object, inputs: object) -> None:
        raise AssertionError("compiles")

    model = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=4)
    convert_(model)
    x = torch.randn(2, 3, 32, 32)
    expected = estimate(model, x).peak
    if where == "all":
        model = torch.compile(model, backend=refuse)
    else:
        model.features = torch.compile(model.features, backend=refuse)
    assert estimate(model, x).peak == expected


def test_report_does_not_change_after_step() -> None:
    report = meter(Double(8), torch.randn(8))
    assert sum(event.size for event in report.events) == 4 * 8  # the gradient outlives the step


def test_only_measure_is_timed_and_all_say_their_source() -> None:
    model, x = Double(8), torch.randn(8)
    reports = [measure(model, x), meter(model, x), estimate(model, x, device="cuda")]
    assert [report.seconds is not None for report in reports] == [True, False, False]
    assert "allocator" in reports[0].source
    assert [report.device for report in reports] == ["cpu", "cpu", "cuda"]


def test_network_that_fits_nowhere_is_estimated() -> None:
    with torch.device("meta"):
        model = densenet_cifar(100, 12, recompute="none")
    assert estimate(model, (4096, 3, 32, 32), target=(4096,)).peak.total > 2**36


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "norm", "bottleneck"])
def test_thousand_layers_need_tenth_of_terabyte_only_if_naive(recompute) -> None:
    with torch.device("meta"):
        model = densenet_cifar(1000, 12, recompute=recompute)
    report = estimate(model, (64, 3, 32, 32), target=(64,), make_optimizer=SGD)
    assert (report.peak.total > 100e9) == (recompute == "none")
    assert report.peak.total > 1e9


@pytest.mark.parametrize("recompute", ["norm", "bottleneck"])
def test_estimate_dispatches_operators_in_proportion_to_depth_whatever_batch(
    recompute, monkeypatch
) -> None:
    def dispatched(depth: int, batch: int) -> int:
        with torch.device("meta"):
            model = densenet_cifar(depth, 12, recompute=recompute)
        count.clear()
        estimate(model, (batch, 3, 32, 32), target=(batch,))
        return len(count)

    count: list[object] = []
    dispatch = LiveMeter.__torch_dispatch__

    def counted(self, func, *args, **kwargs):
        count.append(func)
        return dispatch(self, func, *args, **kwargs)

    monkeypatch.setattr(LiveMeter, "__torch_dispatch__", counted)
    few = dispatched(100, 64)
    assert few < 400 * 48  # layers
    assert dispatched(196, 64) < 2.2 * few
    assert dispatched(100, 4096) < 2 * few


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_estimate_for_cuda_has_scratch_of_gpu(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: the slab, and the gradient of what a convolution reads of it."""
    if kernels == "triton":
        pytest.importorskip("triton")
    block = EfficientDenseBlock(2, 64, 4, 32, kernels=kernels)  # type: ignore[arg-type]
    peaks = []
    for mebibytes in (8, 16):
        monkeypatch.setattr(workspace, "GPU_WORKSPACE_BYTES", mebibytes << 20)
        peaks.append(estimate(block, (64, 64, 56, 56), device="cuda").peak.step)
    small, large = peaks
    assert large - small == pytest.approx(2 * (8 << 20), rel=0.1)  # slabs are whole samples


def test_estimate_for_cuda_copies_no_map_into_layout_of_cpu() -> None:
    block = EfficientDenseBlock(2, 16, 4, 8, kernels="eager")
    copies = []
    for device in ("cpu", "cuda"):
        report = estimate(block, (4, 16, 32, 32), device=device)
        born = [e for e in report.events if e.size > 0 and "clone" in e.operator]
        copies.append(sum(e.size for e in born))
    assert copies[0] > 0 == copies[1]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_allocator_is_read() -> None:
    model, x = DenseBlock(4, 12, 4, 12).cuda(), torch.randn(8, 12, 32, 32, device="cuda")
    report, metered = measure(model, x), meter(model, x)
    assert report.source == "CUDA allocator"
    assert report.allocated is not None and report.requested is not None
    assert report.allocated >= report.requested >= metered.peak.total
    assert report.kept == pytest.approx(metered.kept, rel=0.01)
