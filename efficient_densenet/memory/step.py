"""Memory and time of one training step: measured, metered, or estimated without computing it."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from efficient_densenet.memory.devices import DEVICES
from efficient_densenet.memory.events import Event, Peak, find_peak, live_after_forward
from efficient_densenet.memory.meter import LiveMeter, Scratch
from efficient_densenet.memory.profiler import AllocatorRecord
from efficient_densenet.memory.profiler import phase as allocator_phase

Loss = Callable[..., Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
Phase = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class StepReport:
    """Memory of one training step.

    Attributes:
        source: what counted: an allocator, or the live-storage meter.
        device: where the step ran.
        kept: bytes alive when the forward pass ended, above parameters, buffers, inputs and
            optimizer state: what is kept for the backward pass, the output included.
        peak: the largest moment, split.
        events: every birth and death of a storage, in order.
        seconds: of one step, unwatched; ``None`` if it was not timed.
        allocated: CUDA only: peak of the allocator, all that lives on the device included.
        requested: CUDA only: the same before the allocator's rounding.
    """

    source: str
    device: str
    kept: int
    peak: Peak
    events: Sequence[Event]
    seconds: float | None = None
    allocated: int | None = None
    requested: int | None = None


def measure(
    model: nn.Module,
    *inputs: Tensor,
    target: Tensor | None = None,
    loss_fn: Loss | None = None,
    make_optimizer: MakeOptimizer | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> StepReport:
    """Run training steps on a copy of ``model`` and read the allocator: the truth on this machine.

    A warm-up step comes first, then a timed one, then the one whose memory is read. On a CPU the
    account is that of ``torch.profiler``'s allocator events, oneDNN's buffers included; on CUDA the
    caching allocator's, and ``allocated`` and ``requested`` are set.

    Args:
        model: in the mode (training or evaluation) that the step is to have; left untouched.
        inputs: tensors on the model's device.
        target: second argument of the loss, ``cross_entropy`` unless ``loss_fn`` is given.
        loss_fn: maps the output (and the target, if there is one) to a scalar. With neither loss
            nor target, the backward pass starts from a random gradient of the output.
        make_optimizer: makes the optimizer from the parameters, e.g.
            ``functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)``. Its state is created
            before the step that is measured. Without one the step ends with the backward pass.
        autocast_dtype: dtype of automatic mixed precision, none by default.

    Raises:
        ValueError: if there is no input, or one on another device than the model.
        TypeError: if the output is no tensor and there is no loss.
    """
    step = _real_step(model, inputs, target, loss_fn, make_optimizer, autocast_dtype)
    with _forked_rng(step.device):
        step.run()
        seconds = _timed(step)
        record, allocated, requested = _recorded(step)
    source = "CUDA allocator" if step.device.type == "cuda" else "CPU allocator (torch.profiler)"
    return step.report(source, record, seconds, allocated, requested)


def meter(
    model: nn.Module,
    *inputs: Tensor,
    target: Tensor | None = None,
    loss_fn: Loss | None = None,
    make_optimizer: MakeOptimizer | None = None,
    autocast_dtype: torch.dtype | None = None,
    granularity: int = 1,
) -> StepReport:
    """Run one training step on a copy of ``model`` under the live-storage meter.

    Counts live tensors, on any device, rounded up to ``granularity`` bytes each, and is blind to
    what an operator allocates and frees inside itself: a lower bound of :func:`measure`. Other
    arguments and errors as there.
    """
    step = _real_step(model, inputs, target, loss_fn, make_optimizer, autocast_dtype)
    with _forked_rng(step.device):
        return _metered(step, granularity)


def estimate(
    model: nn.Module,
    *inputs: Tensor | Sequence[int],
    target: Tensor | Sequence[int] | None = None,
    loss_fn: Loss | None = None,
    make_optimizer: MakeOptimizer | None = None,
    autocast_dtype: torch.dtype | None = None,
    granularity: int = DEVICES["cuda"].granularity,
    scratch: Scratch | None = None,
) -> StepReport:
    """Memory of a training step that is not computed: no data, no arithmetic, no GPU.

    The step runs on shapes alone (``meta`` tensors), and the report is what :func:`meter` with the
    same ``granularity`` says of the same step on real tensors. It leaves out what operators
    allocate inside themselves (cuBLAS's and cuDNN's workspaces on a GPU), unless ``scratch`` tells.

    Args:
        model: left untouched; its parameters may be on any device, ``meta`` too.
        inputs: tensors, of which shape, dtype and ``requires_grad`` are used, or shapes, which get
            the dtype of the model's first parameter.
        target: as in :func:`measure`, or its shape: then it holds class indices.
        autocast_dtype: dtype of automatic mixed precision, with the operator lists of CPU autocast.
        granularity: bytes that every size is rounded up to; the CUDA allocator's unless given.
        scratch: what operators allocate inside themselves, e.g. ``meter.onednn_scratch``.

    Other arguments and errors as in :func:`measure`.
    """
    with _uncollected(), _shape_only(autocast_dtype) as device:
        twin = _twin(model, device)
        dtype = _dtype(model)
        images = [_hollow(x, device, dtype) for x in inputs]
        labels = None if target is None else _hollow(target, device, torch.int64)
        with LiveMeter():  # what it saw is not read: it is quick where there are no values
            step = _Step(twin, images, labels, loss_fn, make_optimizer, autocast_dtype)
        return _metered(step, granularity, scratch)


class _Step:
    """One training step of a model that it may change, and what lives around it."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Tensor],
        target: Tensor | None,
        loss_fn: Loss | None,
        make_optimizer: MakeOptimizer | None,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        if not inputs:
            raise ValueError("a step needs at least one input, got none")
        self.model, self.inputs, self.target = model, inputs, target
        self.loss_fn: Loss | None = loss_fn
        if loss_fn is None and target is not None:
            self.loss_fn = F.cross_entropy
        self.autocast_dtype = autocast_dtype
        self.device = inputs[0].device
        self.optimizer = None if make_optimizer is None else make_optimizer(model.parameters())
        if self.optimizer is not None:
            create_state(self.optimizer)

    def run(self, phase: Phase = lambda name: nullcontext()) -> None:
        """Run the step, gradients set to ``None`` first, each part inside ``phase(its name)``."""
        self.clear()
        with phase("forward"):
            result = self._forward()
        with phase("backward"):
            result.backward(None if self.loss_fn else torch.randn_like(result))
        if self.optimizer is not None:
            with phase("optimizer"):
                self.optimizer.step()

    def clear(self) -> None:
        for tensor in (*self.model.parameters(), *self.inputs):
            tensor.grad = None

    def gradients(self) -> list[Tensor]:
        leaves = (*self.model.parameters(), *self.inputs)
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    def report(
        self,
        source: str,
        record: AllocatorRecord | LiveMeter,
        seconds: float | None = None,
        allocated: int | None = None,
        requested: int | None = None,
        granularity: int = 1,
    ) -> StepReport:
        events = tuple(record.events)  # a meter logs deaths after the step, too
        gradients = record.storages_of(self.gradients())
        return StepReport(
            source=source,
            device=str(self.device),
            kept=live_after_forward(events).total(),
            peak=find_peak(events, gradients, self._static(granularity)),
            events=events,
            seconds=seconds,
            allocated=allocated,
            requested=requested,
        )

    def _forward(self) -> Tensor:
        dtype = self.autocast_dtype
        context = torch.autocast(self.device.type, dtype) if dtype else nullcontext()
        with context:
            output = self.model(*self.inputs)
            if self.loss_fn is None:
                if not isinstance(output, Tensor):
                    raise TypeError(
                        f"without a loss the output must be a tensor, got {type(output)}"
                    )
                return output
            return (
                self.loss_fn(output) if self.target is None else self.loss_fn(output, self.target)
            )

    def _static(self, granularity: int) -> dict[str, int]:
        state = self.optimizer.state.values() if self.optimizer else ()
        groups: dict[str, Iterable[Any]] = {
            "parameters": self.model.parameters(),
            "buffers": self.model.buffers(),
            "inputs": (*self.inputs, self.target),
            "optimizer": (value for values in state for value in values.values()),
        }
        return {name: _storage_bytes(values, granularity) for name, values in groups.items()}


def _storage_bytes(values: Iterable[Any], granularity: int) -> int:
    storages = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for value in values
        if isinstance(value, Tensor)
    }
    return sum(-(-size // granularity) * granularity for size in storages.values())


def create_state(optimizer: Optimizer) -> None:
    """Let an optimizer allocate its state, by a step with gradients of zero."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _real_step(
    model: nn.Module,
    inputs: Sequence[Tensor],
    target: Tensor | None,
    loss_fn: Loss | None,
    make_optimizer: MakeOptimizer | None,
    autocast_dtype: torch.dtype | None,
) -> _Step:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers(), *inputs)}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model and inputs must be on one device, got {found}")
    own = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    return _Step(copy.deepcopy(model), own, target, loss_fn, make_optimizer, autocast_dtype)


def _metered(step: _Step, granularity: int, scratch: Scratch | None = None) -> StepReport:
    with LiveMeter(granularity, scratch) as live:
        step.run(live.enter)
    return step.report("live-storage meter", live, granularity=granularity)


def _timed(step: _Step) -> float:
    _synchronize(step.device)
    start = time.perf_counter()
    step.run()
    _synchronize(step.device)
    return time.perf_counter() - start


def _recorded(step: _Step) -> tuple[AllocatorRecord, int | None, int | None]:
    step.clear()
    if step.device.type != "cuda":
        return AllocatorRecord(lambda: step.run(allocator_phase), step.device), None, None
    torch.cuda.reset_peak_memory_stats(step.device)
    step.run()
    torch.cuda.synchronize(step.device)
    allocated = torch.cuda.max_memory_allocated(step.device)
    requested = torch.cuda.memory_stats(step.device)["requested_bytes.all.peak"]
    step.clear()
    record = AllocatorRecord(lambda: step.run(allocator_phase), step.device)
    return record, allocated, requested


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forked_rng(device: torch.device) -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's garbage collector, which takes a fifth of an estimate's time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _shape_only(autocast_dtype: torch.dtype | None) -> Iterator[torch.device]:
    """Where tensors have shapes but no data.

    Autocast does not know ``meta`` tensors: with it, tensors are fake ones that say "cpu".
    """
    if autocast_dtype is None:
        yield torch.device("meta")
    else:
        with FakeTensorMode():
            yield torch.device("cpu")


def _twin(model: nn.Module, device: torch.device) -> nn.Module:
    """Deep copy of ``model`` whose parameters and buffers are empty ones on ``device``."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = _empty_like(parameter, device)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = _empty_like(buffer, device)
    return copy.deepcopy(model, memo)


def _hollow(tensor: Tensor | Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(tensor, Tensor):
        return _empty_like(tensor, device).requires_grad_(tensor.requires_grad)
    return torch.empty(tuple(tensor), device=device, dtype=dtype)


def _empty_like(tensor: Tensor, device: torch.device) -> Tensor:
    # Not torch.empty_like: inside FakeTensorMode it would refuse a real tensor.
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.get_default_dtype())
