"""The instruments: is it right, how much memory does it take, how long does it take."""

from __future__ import annotations

import gc
import random
import time
from dataclasses import dataclass, field
from functools import cache
from statistics import median, quantiles

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import COMPETITORS, DEVICE, FLOOR, NAIVE, Case, Competitor, Subject
from benchmarks.floor import ConvolutionsAlone
from efficient_densenet.memory import measure

SHARP = 1e-9
"""Relative error (2-norm) allowed in the output and each gradient in float64."""
COARSE = {"output": 1e-4, "input.grad": 3e-2, "parameters.grad": 3e-2}
"""The same in float32, where all parameters' gradients are compared as one vector.

In float32 a rectifier whose input is all but zero opens in one model and not in the other, so
that the naive DenseNet-121's own gradients differ by 1.5% between its two memory formats.
"""
SECONDS_PER_CASE = 8.0
ROUNDS = (5, 15)
"""Fewest and most interleaved rounds; between them, as many as ``SECONDS_PER_CASE`` allows."""


@dataclass
class Row:
    """What one competitor did on one case; bytes are above parameters, buffers and input."""

    case: str
    competitor: Competitor
    failure: str | None = None
    kept: int = 0
    peak: int = 0
    operator: str = ""
    convolution_share: float = 1.0
    first_seconds: float = 0.0
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


@cache
def run(case: Case) -> dict[Competitor, Row]:
    """Every competitor on ``case``, and the floor: the right ones measured, all interleaved."""
    torch.compiler.reset()  # compiled code of another case would hide this one's compile time
    rows = {competitor: Row(case.name, competitor) for competitor in (*COMPETITORS, FLOOR)}
    truth, small_truth = coarse(case.subject(NAIVE)), results(case.small_subject(NAIVE))
    subjects: dict[Competitor, Subject | ConvolutionsAlone] = {FLOOR: case.floor()}
    seconds_per_round = 0.0
    for competitor in COMPETITORS:
        row = rows[competitor]
        try:
            subject = case.subject(competitor)
            row.failure = check(results(case.small_subject(competitor)), small_truth, SHARP)
            row.first_seconds = timed(subject)
            row.failure = row.failure or check(coarse(subject), truth, COARSE)
            if row.failure is None:
                seconds_per_round += weigh(subject, row)
                subjects[competitor] = subject
        except torch.OutOfMemoryError:
            row.failure = "out of memory"
    for competitor, seconds in interleaved(subjects, rounds(seconds_per_round)).items():
        rows[competitor].seconds = seconds
    return rows


def results(subject: Subject) -> dict[str, Tensor]:
    """Output and all gradients of one step, by name."""
    subject.clear()
    found = {"output": subject.step().detach(), "input.grad": subject.x.grad}
    for name, parameter in subject.model.named_parameters():
        found[f"{name}.grad"] = parameter.grad
    subject.clear()
    return found


def coarse(subject: Subject) -> dict[str, Tensor]:
    """As :func:`results`, with the gradients of all parameters in one vector."""
    found = results(subject)
    output, of_input, *of_parameters = found.values()
    together = torch.cat([gradient.flatten() for gradient in of_parameters])
    return {"output": output, "input.grad": of_input, "parameters.grad": together}


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
    """Fill in the memory of one step; returns about how many seconds it takes."""
    report = measure(subject.model, subject.x)
    row.kept, row.peak, row.operator = report.kept, report.peak.step, report.peak.operator
    row.convolution_share = convolution_share(subject)
    return report.seconds or 0.0


def convolution_share(subject: Subject) -> float:
    """The part of a step's time that operators spend in convolutions, from ``torch.profiler``."""
    activities = [ProfilerActivity.CPU]
    if DEVICE.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        timed(subject)
    events = profiler.key_averages()
    spent = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    convolutions = sum(getattr(e, spent) for e in events if "convolution" in e.key)
    return convolutions / max(sum(getattr(e, spent) for e in events), 1)


def rounds(seconds_per_round: float) -> int:
    """How many interleaved rounds a case gets."""
    fewest, most = ROUNDS
    return min(max(int(SECONDS_PER_CASE / max(seconds_per_round, 1e-9)), fewest), most)


def interleaved(
    subjects: dict[Competitor, Subject | ConvolutionsAlone], count: int
) -> dict[Competitor, list[float]]:
    """Seconds per step, in rounds that each run everybody once, in an order of their own.

    Nobody starts cold: the check and the memory measurement have run every step before.
    """
    order = list(subjects)
    shuffle = random.Random(0).shuffle
    times: dict[Competitor, list[float]] = {competitor: [] for competitor in order}
    for _ in range(count):
        shuffle(order)
        for competitor in order:
            times[competitor].append(timed(subjects[competitor]))
    return times


def timed(subject: Subject | ConvolutionsAlone) -> float:
    """Seconds of one step, gradients set to ``None`` before, garbage collected outside."""
    subject.clear()
    gc.collect()
    gc.disable()
    try:
        return _seconds_cuda(subject) if DEVICE.type == "cuda" else _seconds(subject)
    finally:
        gc.enable()
        subject.clear()


def _seconds(subject: Subject | ConvolutionsAlone) -> float:
    start = time.perf_counter()
    subject.step()
    return time.perf_counter() - start


def _seconds_cuda(subject: Subject | ConvolutionsAlone) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    subject.step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000
