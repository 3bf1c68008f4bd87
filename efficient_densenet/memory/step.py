"""Memory and time of one training step: measured, metered, or estimated without computing it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from efficient_densenet.kernels.layout import imagined_on
from efficient_densenet.memory.batch import Tree, make_batch, make_hollow_batch, tensors_in
from efficient_densenet.memory.devices import DEVICES, OTHER, check_device
from efficient_densenet.memory.hollow import copy_hollow
from efficient_densenet.memory.meter import LiveMeter
from efficient_densenet.memory.optimizers import MakeOptimizer, Update, build_optimizer
from efficient_densenet.memory.profiler import AllocatorRecord
from efficient_densenet.memory.profiler import phase as allocator_phase
from efficient_densenet.memory.replicas import steps_to_settle
from efficient_densenet.memory.report import StepReport
from efficient_densenet.memory.running import Loss, RunningStep, check_step, uncollected
from efficient_densenet.memory.sharding import has_shards


def measure(
    model: nn.Module,
    *inputs: Tree,
    target: Tree = None,
    loss_fn: Loss | None = None,
    make_optimizer: MakeOptimizer | None = None,
    autocast_dtype: torch.dtype | None = None,
    accumulate: bool = False,
) -> StepReport:
    """Run training steps on a copy of ``model`` and read the allocator: the truth on this machine.

    First one step runs to warm up (in ``DistributedDataParallel`` two or three, and each process
    must call this function), then one that is timed, then one whose memory is read (on CUDA two).
    On a CPU allocations are read from ``torch.profiler``, and include oneDNN's buffers. On CUDA
    they are the caching allocator's, and the report has ``allocated`` and ``requested`` too.

    Args:
        model: in the mode (training or evaluation) that the step is to have; left untouched.
        inputs: the model's arguments: tensors on its device, shapes such as ``(8, 3, 224, 224)``
            for random values of its parameters' type, or dicts, lists and tuples of them.
        target: second argument of the loss: tensors or shapes, as ``inputs``. A shape equal to the
            output's stands for random values, any other for class indices.
        loss_fn: maps the output (and the target, if there is one) to a scalar; ``cross_entropy``
            by default. With neither loss nor target, the backward pass starts from random
            gradients of the output's tensors.
        make_optimizer: an optimizer's class, or a function that makes one from parameters, such as
            ``functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)``. Its state exists before
            the step that is measured. Without one the step ends with the backward pass.
        autocast_dtype: type of automatic mixed precision, none by default. (A ``GradScaler``, which
            float16 needs, would add a few numbers.)
        accumulate: whether gradients of earlier steps exist already, to which the step adds.

    Returns:
        Bytes by kind, and seconds of one step.

    Raises:
        ValueError: if there is no input, or a tensor is on another device than the model.
        TypeError: if an argument is of a wrong kind; the message names and quotes it.
    """
    step = _real_step(model, inputs, target, loss_fn, autocast_dtype, accumulate)
    if make_optimizer is not None:
        step.optimizer = build_optimizer(make_optimizer, step.parameters)
    with _forked_rng(step.device):
        for _ in range(steps_to_settle(step.model)):
            step.run()
        seconds = _timed(step)
        record, allocated, requested = _recorded(step)
    return step.report(
        "CUDA allocator" if step.device.type == "cuda" else "CPU allocator (torch.profiler)",
        record,
        str(step.device),
        seconds=seconds,
        allocated=allocated,
        requested=requested,
    )


def meter(
    model: nn.Module,
    *inputs: Tree,
    target: Tree = None,
    loss_fn: Loss | None = None,
    make_optimizer: MakeOptimizer | None = None,
    autocast_dtype: torch.dtype | None = None,
    accumulate: bool = False,
) -> StepReport:
    """Run one training step on a copy of ``model``, and count the tensors that are alive.

    Works on any device. What operators are known to allocate inside themselves counts too: oneDNN's
    copies on a CPU, nothing on CUDA. Arguments, result and errors as for :func:`measure`; the
    report has no ``seconds``.
    """
    step = _real_step(model, inputs, target, loss_fn, autocast_dtype, accumulate)

    def update(make_optimizer: MakeOptimizer) -> Update:
        return Update(build_optimizer(make_optimizer, step.parameters))

    with _forked_rng(step.device):
        return _metered(step, step.device.type, nullcontext(), make_optimizer, update)


def estimate(
    model: nn.Module,
    *inputs: Tree,
    target: Tree = None,
    loss_fn: Loss | None = None,
    make_optimizer: MakeOptimizer | None = None,
    autocast_dtype: torch.dtype | None = None,
    accumulate: bool = False,
    device: torch.device | str | None = None,
) -> StepReport:
    """Memory of a training step that is not computed: no data, no arithmetic, no GPU.

    The step runs on shapes alone (``meta`` tensors). The report is the one that :func:`meter` would
    make of the same step on real tensors on ``device``, with the operations, memory formats and
    scratch that would be used there: on CUDA those of Triton's kernels, if Triton is installed. It
    leaves out what operators allocate inside themselves on a GPU (the workspaces of cuBLAS and
    cuDNN).

    Args:
        model: left untouched; its parameters may be on any device, ``meta`` too.
        inputs: as for :func:`measure`; of tensors only the shape, type and ``requires_grad`` count.
        autocast_dtype: type of automatic mixed precision, with the operator lists of CPU autocast.
        device: ``"cpu"`` or ``"cuda"``: where the step would run; by default as on this machine.

    Other arguments, result and errors as for :func:`meter`.
    """
    check_step(model, loss_fn, autocast_dtype)
    kind = check_device(device)
    # Autocast does not know meta tensors: with it, tensors are fake ones that say "cpu".
    world = nullcontext() if autocast_dtype is None else FakeTensorMode()
    place = torch.device("meta" if autocast_dtype is None else "cpu")
    with uncollected(), imagined_on(torch.device(kind)):
        with world:
            batch = make_hollow_batch(inputs, target, place, _dtype(model))
            hollow = copy_hollow(model, place)
            step = RunningStep(hollow, batch, loss_fn, autocast_dtype, accumulate)

        def update(make_optimizer: MakeOptimizer) -> Update:
            return Update.on_shapes(make_optimizer, step.parameters, kind)

        return _metered(step, kind, world, make_optimizer, update)


def run_within(
    limit: int,
    device: str,
    model: nn.Module,
    inputs: tuple[Tree, ...],
    target: Tree = None,
    loss_fn: Loss | None = None,
    make_optimizer: MakeOptimizer | None = None,
    autocast_dtype: torch.dtype | None = None,
    accumulate: bool = False,
) -> int | None:
    """Peak bytes of a real step of a copy of ``model``, held to ``limit``; ``None`` if it ran out.

    Raises:
        ValueError: if the model is not on that kind of ``device``; else as :func:`measure`.
    """
    step = _real_step(model, inputs, target, loss_fn, autocast_dtype, accumulate)
    if step.device.type != device:
        raise ValueError(f"verify needs the model on {device!r}, got it on {step.device.type!r}")
    with _forked_rng(step.device):
        return step.run_within(limit, make_optimizer)


def _metered(
    step: RunningStep,
    kind: str,
    world: AbstractContextManager[object],
    make_optimizer: MakeOptimizer | None,
    make_update: Callable[[MakeOptimizer], Update],
) -> StepReport:
    counts = DEVICES.get(kind, OTHER)
    live = LiveMeter(counts.granularity, counts.scratch)
    with world, live:
        step.run(live.enter)
    if make_optimizer is not None:
        update = make_update(make_optimizer)
        update.run(LiveMeter())  # which makes the state
        update.run(live)
        step.optimizer = update.optimizer
    return step.report("live-storage meter", live, kind, granularity=counts.granularity)


def _real_step(
    model: nn.Module,
    inputs: tuple[Tree, ...],
    target: Tree,
    loss_fn: Loss | None,
    autocast_dtype: torch.dtype | None,
    accumulate: bool,
) -> RunningStep:
    check_step(model, loss_fn, autocast_dtype)
    if has_shards(model):
        raise TypeError(
            "model must be one of which a copy can run, got one after fully_shard, which only "
            "estimate takes"
        )
    own = [*model.parameters(), *model.buffers()]
    given = tensors_in((inputs, target))
    device = next((tensor.device for tensor in (*own, *given)), torch.device("cpu"))
    batch = make_batch(inputs, target, device, _dtype(model))
    devices = {tensor.device for tensor in (*own, *given)}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"inputs and target must be on the model's device, got {found}")
    return RunningStep(copy.deepcopy(model), batch, loss_fn, autocast_dtype, accumulate)


def _timed(step: RunningStep) -> float:
    _synchronize(step.device)
    start = time.perf_counter()
    step.run()
    _synchronize(step.device)
    return time.perf_counter() - start


def _recorded(step: RunningStep) -> tuple[AllocatorRecord, int | None, int | None]:
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


def _dtype(model: nn.Module) -> torch.dtype:
    """The type of the model's first parameter that is of floating-point numbers."""
    types = (parameter.dtype for parameter in model.parameters())
    return next((t for t in types if t.is_floating_point), torch.get_default_dtype())
