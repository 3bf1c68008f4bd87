"""The instruments: is it right, how much memory does it take, how long does it take."""

from __future__ import annotations

import gc
import math
import random
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import DEVICE, FLOOR, NAIVE, Case, Competitor, Subject
from efficient_densenet.memory.batch import make_batch
from efficient_densenet.memory.profiler import AllocatorRecord, quiet_profiler
from efficient_densenet.memory.profiler import phase as allocator_phase
from efficient_densenet.memory.report import StepReport
from efficient_densenet.memory.running import RunningStep

SHARP = 1e-9
"""Relative error (2-norm) allowed in the output and each gradient in float64."""
COARSE = {"output": 1e-4, "input.grad": 3e-2, "parameters.grad": 3e-2}
"""The same in float32, where all parameters' gradients are compared as one vector.

In float32 a rectifier whose input is all but zero opens in one model and not in the other, so
that the naive DenseNet-121's own gradients differ by 1.5% between its two memory formats.
"""
OUT_OF_MEMORY = "out of memory"
NO_TIME = "no time was left"
SECONDS_PER_CASE = 8.0
ROUNDS = (5, 15)
"""Fewest and most interleaved rounds; between them, as many as ``SECONDS_PER_CASE`` allows."""


@dataclass
class Row:
    """What one competitor did on one case; bytes are above parameters, buffers and input.

    They are 0 where graphs are replayed, whose memory was taken before. ``busy`` is the part of a
    step's time in which a GPU ran a kernel; on a CPU, operators stand for kernels.
    """

    case: str
    competitor: Competitor
    failure: str | None = None
    kept: int = 0
    peak: int = 0
    operator: str = ""
    convolution_share: float | None = None
    busy: float | None = None
    first_seconds: float = 0.0  # its check included
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def compile_seconds(self) -> float:
        """How much longer than the others the first step took."""
        return self.first_seconds - self.median


class Judge(Protocol):
    """Says what is wrong with a competitor, or ``None``."""

    def before(self, competitor: Competitor) -> str | None:
        """On a step smaller than the one that will be timed."""

    def after(self, subject: Subject) -> str | None:
        """On the very step that will be timed."""


class SharpJudge:
    """Judges in float64 on a batch of two, and the timed step in float32, by the naive model."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._truth = coarse(case.subject(NAIVE))
        self._small_truth = results(case.small_subject(NAIVE))

    def before(self, competitor: Competitor) -> str | None:
        return check(results(self._case.small_subject(competitor)), self._small_truth, SHARP)

    def after(self, subject: Subject) -> str | None:
        return check(coarse(subject), self._truth, COARSE)


Rows = dict[Competitor, Row]
Tell = Callable[[Rows, Competitor | None], None]


def run(case: Case, competitors: Sequence[Competitor]) -> Rows:
    """Those ``competitors`` and the floor on ``case``, judged sharply."""
    return compete(case, competitors, SharpJudge(case))


# With caches a compile time could be that of a second run.
@torch.compiler.config.patch(force_disable_caches=True)
def compete(
    case: Case,
    competitors: Sequence[Competitor],
    judge: Judge,
    tell: Tell = lambda rows, competitor: None,
    left: Callable[[], float] = lambda: math.inf,
    seconds: float = SECONDS_PER_CASE,
) -> Rows:
    """Measure those ``competitors`` on ``case`` that are right, and the floor, interleaved.

    Who is wrong, or raises an error, has that as its failure. ``tell`` is called with the rows
    before anything is done with a competitor, and with ``None`` before all are timed, which takes
    about ``seconds``. Who would leave no time for that, of the ``left()`` seconds, is left out.

    Raises:
        RuntimeError: if a competitor left the device unusable.
    """
    torch.compiler.reset()  # compiled code of another case would hide this one's compile time
    rows = {competitor: Row(case.name, competitor) for competitor in (*competitors, FLOOR)}
    subjects: dict[Competitor, Step] = {}
    round_seconds = slowest = 0.0
    for competitor, row in rows.items():
        tell(rows, competitor)
        if left() < slowest + ROUNDS[0] * round_seconds:
            row.failure = NO_TIME
            continue
        start = time.perf_counter()
        try:
            if competitor == FLOOR:
                subjects[FLOOR] = case.floor()
                continue
            subject = case.subject(competitor)
            row.failure = judge.before(competitor)
            first = time.perf_counter()
            row.failure = row.failure or judge.after(subject)
            row.first_seconds = time.perf_counter() - first
            if row.failure is None:
                round_seconds += weigh(subject, row)
                subjects[competitor] = subject
        except torch.OutOfMemoryError:
            row.failure = OUT_OF_MEMORY
        except Exception as error:
            traceback.print_exc()
            row.failure = one_line(error)
            synchronize()  # raises if no one can use the device any more
        slowest = max(slowest, time.perf_counter() - start)
    tell(rows, None)
    count = rounds(round_seconds, min(seconds, left() / 2))
    for competitor, times in interleaved(subjects, count).items():
        rows[competitor].seconds = times
    return rows


def one_line(error: BaseException) -> str:
    """An error in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def synchronize() -> None:
    """Wait for the device, and hear of its errors."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def results(subject: Subject) -> dict[str, Tensor]:
    """Output and all gradients of one step, by name."""
    subject.clear()
    found = {"output": subject.step().detach()}
    if subject.x.requires_grad:
        found["input.grad"] = subject.x.grad
    for name, parameter in subject.model.named_parameters():
        found[f"{name}.grad"] = parameter.grad
    subject.clear()
    return found


def coarse(subject: Subject) -> dict[str, Tensor]:
    """As :func:`results`, with the gradients of all parameters in one vector."""
    found = results(subject)
    own = {name: found.pop(name) for name in ("output", "input.grad") if name in found}
    return own | {"parameters.grad": torch.cat([grad.flatten() for grad in found.values()])}


def check(
    found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float | dict[str, float]
) -> str | None:
    """What is wrong with ``found``, or ``None`` if all of it is as near to ``truth`` as it must."""
    for name, expected in truth.items():
        error = relative_error(found[name], expected)
        allowed = tolerance[name] if isinstance(tolerance, dict) else tolerance
        if error > allowed:
            dtype = str(expected.dtype).removeprefix("torch.")
            return f"wrong: {name} differs by {error:.1e} of its norm in {dtype}"
    return None


def relative_error(found: Tensor, expected: Tensor) -> float:
    """2-norm of the difference over that of ``expected``; infinite if there is a NaN."""
    error = ((found - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")


def weigh(subject: Subject, row: Row) -> float:
    """Fill in the memory of one step and what it was busy with; returns about its seconds."""
    if DEVICE.type == "cpu":
        batch = make_batch((subject.x,), None, DEVICE, subject.x.dtype)
        report = recorded(RunningStep(subject.model, batch, None, subject.autocast))
        row.kept, row.peak, row.operator = report.kept, report.peak.step, report.peak.operator
    elif not row.competitor.graphs:
        row.kept, row.peak = counted(subject)
    taken = [timed(subject)] if DEVICE.type == "cuda" else []
    found = kernels(lambda: taken.append(timed(subject)))
    spent = {name: seconds for name, (_, seconds) in found.items()}
    busy = sum(spent.values())
    row.busy = busy / taken[0]
    if DEVICE.type == "cpu":
        row.convolution_share = sum(s for name, s in spent.items() if "convolution" in name) / busy
    return taken[0]


def recorded(step: RunningStep) -> StepReport:
    """What ``measure`` reports of a step on a CPU, without a copy of the model and a warm-up."""
    record = AllocatorRecord(lambda: step.run(allocator_phase), DEVICE)
    report = step.report("CPU allocator (torch.profiler)", record, DEVICE.type)
    step.clear()
    return report


def counted(subject: Subject) -> tuple[int, int]:
    """Bytes kept and at the peak of a step, above those before it, by the CUDA allocator's count.

    Unlike ``measure`` it copies no model and profiles nothing.
    """
    subject.clear()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = subject.forward()
    kept = torch.cuda.memory_allocated()
    output.backward(subject.upstream)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    subject.clear()
    return kept - before, peak - before


def kernels(run: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """By name, how often each kernel ran and for how many seconds altogether.

    On a CPU operators stand for kernels. The profiler takes time of the host's.
    """
    on_gpu = DEVICE.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    quiet_profiler()
    synchronize()
    with profile(activities=activities) as profiler:
        run()
        synchronize()
    kind, spent = (
        (DeviceType.CUDA, "self_device_time_total")
        if on_gpu
        else (DeviceType.CPU, "self_cpu_time_total")
    )
    events = [e for e in profiler.key_averages() if e.device_type == kind]
    return {e.key: (e.count, getattr(e, spent) / 1e6) for e in events}


def rounds(seconds_per_round: float, seconds: float = SECONDS_PER_CASE) -> int:
    """How many interleaved rounds a case gets."""
    fewest, most = ROUNDS
    return min(max(int(seconds / max(seconds_per_round, 1e-9)), fewest), most)


Name = TypeVar("Name")


class Step(Protocol):
    """What is timed, and what drops whatever it leaves behind."""

    def step(self) -> object: ...

    def clear(self) -> None: ...


def interleaved(subjects: Mapping[Name, Step], count: int) -> dict[Name, list[float]]:
    """Seconds per step, in rounds that each run everybody once, in an order of their own.

    Nobody starts cold: the check and the memory measurement have run every step before.
    """
    order = list(subjects)
    shuffle = random.Random(0).shuffle
    times: dict[Name, list[float]] = {name: [] for name in order}
    gc.collect()
    gc.freeze()  # what lives now is not searched again before every step
    try:
        for _ in range(count):
            shuffle(order)
            for name in order:
                times[name].append(timed(subjects[name]))
    finally:
        gc.unfreeze()
    return times


def timed(subject: Step) -> float:
    """Seconds of one step, gradients set to ``None`` before, garbage collected outside."""
    subject.clear()
    gc.collect()
    gc.disable()
    try:
        return _seconds_cuda(subject) if DEVICE.type == "cuda" else _seconds(subject)
    finally:
        gc.enable()
        subject.clear()


def _seconds(subject: Step) -> float:
    start = time.perf_counter()
    subject.step()
    return time.perf_counter() - start


def _seconds_cuda(subject: Step) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    subject.step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000
