"""The parts: what is tested, trained, weighed, timed and filled, each as one function of a job."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.nn.functional as F

from benchmarks.cases import DEVICE, Case, Competitor
from benchmarks.edge_of_budget import step_within
from benchmarks.gpu.runner import Job, PartFailed
from benchmarks.instruments import (
    NO_TIME,
    OUT_OF_MEMORY,
    Row,
    Rows,
    compete,
    kernels,
    one_line,
    synchronize,
)
from benchmarks.precision import PrecisionJudge
from benchmarks.provenance import Json
from efficient_densenet.training.config import make_optimizer
from efficient_densenet.training.work import COMPETITORS, Work

if TYPE_CHECKING:
    import pytest

    Report = pytest.TestReport | pytest.CollectReport

LEARNING_RATE = 0.01
LOSS_TOLERANCE = 0.05
"""Relative difference allowed between the first losses of two ways to train the same network."""
MOST_KERNELS = 12
STATISTICS = "num_batches_tracked"
ALL_MEMORY = 1 << 50
COUNTS = ("requested", "allocated", "reserved")


def tests(job: Job, arguments: Sequence[str]) -> Json:
    """The tests that pytest's ``arguments`` select; what failed, with its message.

    Raises:
        PartFailed: if one failed, or none ran.
    """
    import pytest

    tally = _Tally(job)
    without = [f"--deselect={test}" for test in job.without]
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    pytest.main([*options, *without, *arguments], [tally])
    job.tell(tally.result())
    failed, passed = len(tally.failures), tally.outcomes["passed"]
    if failed or not passed:
        raise PartFailed(f"{failed} tests failed, {passed} passed")
    return tally.result()


class _Tally:
    """A plugin of pytest's that counts outcomes and keeps the messages of failures."""

    def __init__(self, job: Job) -> None:
        self.job, self.outcomes = job, Counter[str]()
        self.failures = [{"test": test, "error": error} for test, error in job.without.items()]

    def result(self) -> Json:
        return {"kind": "tests", "outcomes": dict(self.outcomes), "failures": self.failures}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.job.tell(self.result(), running=nodeid)

    def pytest_runtest_logreport(self, report: Report) -> None:
        self._note(report)
        if report.failed or report.skipped or report.when == "call":
            self.outcomes[report.outcome] += 1

    def pytest_collectreport(self, report: Report) -> None:
        self._note(report)

    def _note(self, report: Report) -> None:
        if report.failed:
            error = str(report.longrepr)[-1500:]
            self.failures.append({"test": report.nodeid, "error": error})


T = TypeVar("T")


def fill_rows(
    job: Job,
    result: Json,
    wanted: Iterable[T],
    fill: Callable[[T, Json], None],
) -> None:
    """Add a row to ``result["rows"]`` for each thing wanted; an error is the row's failure."""
    for thing in wanted:
        name = str(thing)
        row: Json = {"name": name, "failure": job.without.get(name)}
        result["rows"].append(row)
        if row["failure"]:
            continue
        job.tell(result, running=name)
        try:
            fill(thing, row)
        except Exception as error:
            traceback.print_exc()
            row["failure"] = one_line(error)
            synchronize()  # raises if no one can use the device any more
    job.tell(result)


def training(
    job: Job, case: Case, competitors: Sequence[Competitor], classes: int, steps: int
) -> Json:
    """Some steps of SGD on one batch: the loss falls, and starts where the naive network's does.

    Raises:
        PartFailed: if it does not, or if a norm counted other batches than there were.
    """
    result = {"kind": "training", "case": case.name, "learning_rate": LEARNING_RATE, "rows": []}

    def fill(competitor: Competitor, row: Json) -> None:
        row |= _train(case, competitor, classes, steps)
        row["failure"] = _untrained(row, result["rows"][0], steps)

    fill_rows(job, result, competitors, fill)
    if wrong := [row["name"] for row in result["rows"] if row["failure"]]:
        raise PartFailed(f"not trained: {', '.join(wrong)}")
    return result


def _train(case: Case, competitor: Competitor, classes: int, steps: int) -> Json:
    subject = case.subject(competitor)
    optimizer = make_optimizer(subject.model.parameters(), lr=LEARNING_RATE)
    labels = torch.arange(case.shape[0], device=DEVICE) % classes
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(subject.forward().float(), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    buffers = subject.model.named_buffers()
    return {
        "losses": [loss.item() for loss in losses],
        "batches": sorted({int(b) for name, b in buffers if name.endswith(STATISTICS)}),
    }


def _untrained(row: Json, naive: Json, steps: int) -> str | None:
    first, last = row["losses"][0], row["losses"][-1]
    if not last < first:
        return f"the loss goes from {first:.4f} to {last:.4f}"
    expected = naive["losses"][0]
    if abs(first - expected) > LOSS_TOLERANCE * abs(expected):
        return f"the first loss is {first:.4f}, the naive network's {expected:.4f}"
    if row["batches"] != [steps]:
        return f"norms counted {row['batches']} batches in {steps} steps"
    return None


def memory(job: Job, works: Sequence[Work]) -> Json:
    """Peak bytes of whole training steps, as estimated and as the CUDA allocator counted them.

    All bytes count: parameters, gradients, the optimizer's state and the batch as well. What the
    allocator was asked for is ``requested``, what it handed out ``allocated``, and what it took
    from the device ``reserved``. On a CPU the meter's count stands for all three.
    """
    result: Json = {"kind": "memory", "rows": []}
    wanted = [Weighed(work, mode) for work in works for mode in COMPETITORS]

    def fill(weighed: Weighed, row: Json) -> None:
        row |= _peaks(weighed.work, weighed.mode)

    fill_rows(job, result, wanted, fill)
    return result


class Weighed(NamedTuple):
    """A training step in one of the planner's modes."""

    work: Work
    mode: str

    def __str__(self) -> str:
        work = self.work
        size = f"batch {work.batch_size}, {work.image_size}²"
        return f"{work.model}, {size}, {work.precision}, {self.mode}"


def _peaks(work: Work, mode: str) -> Json:
    estimated = work.estimate(mode, "cuda").peak.total
    metered = step_within(work, mode, ALL_MEMORY, DEVICE)
    if metered is None:
        return {"estimated": estimated, "failure": OUT_OF_MEMORY}
    counted = torch.cuda.memory_stats() if DEVICE.type == "cuda" else {}
    peaks = {kind: counted.get(f"{kind}_bytes.all.peak", metered) for kind in COUNTS}
    return {"estimated": estimated, **peaks}


def bench(
    job: Job, case: Case, competitors: Sequence[Competitor], judged_batch: int, seconds: float
) -> Json:
    """Time and memory of one step of every competitor that is right, all in one run, interleaved.

    Memory that runs out is a result.

    Raises:
        PartFailed: if a competitor is wrong, or broke.
    """
    if DEVICE.type == "cpu":  # whose convolutions round no factor, as the interpreter else would
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    judge = PrecisionJudge(case, judged_batch)
    broken = [c for c in competitors if str(c) in job.without]
    missing = {c: Row(case.name, c, job.without[str(c)]) for c in broken}

    def tell(rows: Rows, competitor: Competitor | None) -> None:
        running = None if competitor is None else str(competitor)
        job.tell(_as_json(case, judge, {**rows, **missing}), running)

    able = [c for c in competitors if c not in missing]
    rows = compete(case, able, judge, tell, job.left, seconds)
    result = _as_json(case, judge, {**rows, **missing})
    job.tell(result)
    fine = (None, OUT_OF_MEMORY, NO_TIME)
    if wrong := [row for row in result["rows"] if row["failure"] not in fine]:
        raise PartFailed("; ".join(f"{row['name']}: {row['failure']}" for row in wrong))
    return result


def _as_json(case: Case, judge: PrecisionJudge, rows: Rows) -> Json:
    return {
        "kind": "bench",
        "case": case.name,
        "batch": case.shape[0],
        "precision": str(case.precision).removeprefix("torch."),
        "errors_of_naive": judge.errors,
        "rows": [_row(row) for row in rows.values()],
    }


def _row(row: Row) -> Json:
    values = asdict(row)
    del values["competitor"], values["case"]
    return {"name": str(row.competitor), **values}


def launches(job: Job, case: Case, competitors: Sequence[Competitor], layers: int) -> Json:
    """How many kernels a layer launches, forward and backward, and which take the time.

    On a CPU operators stand for kernels.
    """
    result: Json = {"kind": "launches", "case": case.name, "layers": layers, "rows": []}

    def fill(competitor: Competitor, row: Json) -> None:
        row |= _launches(case, competitor, layers)

    fill_rows(job, result, competitors, fill)
    return result


def _launches(case: Case, competitor: Competitor, layers: int) -> Json:
    subject = case.subject(competitor)
    for _ in range(2):
        subject.step()
        subject.clear()
    forward, step = kernels(subject.forward), kernels(subject.step)
    by_time = sorted(step.items(), key=lambda item: -item[1][1])
    return {
        "forward_per_layer": _count(forward) / layers,
        "backward_per_layer": (_count(step) - _count(forward)) / layers,
        "kernels": [
            {"name": name[:100], "count": count, "microseconds": time * 1e6}
            for name, (count, time) in by_time[:MOST_KERNELS]
        ],
    }


def _count(kernels: dict[str, tuple[int, float]]) -> int:
    return sum(count for count, _ in kernels.values())
