"""What fits a budget: planned from shapes while other parts run, then tried by real steps."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Literal

import torch

from benchmarks.cases import DEVICE
from benchmarks.edge_of_budget import step_within
from benchmarks.gpu.runner import Job, PartFailed
from benchmarks.provenance import Json
from efficient_densenet.training.plan import plan_work
from efficient_densenet.training.work import COMPETITORS, Work

BEYOND_THE_PLAN = 0.03
MOST_TRIES = 5

Varies = Literal["batch", "depth"]


@dataclass(frozen=True)
class Question:
    """What is the largest batch, or the deepest network, within ``budget`` bytes?"""

    name: str
    work: Work
    varies: Varies
    budget: int

    def sized(self, size: int) -> Work:
        changed = {"batch": "batch_size", "depth": "depth"}[self.varies]
        return replace(self.work, **{changed: size})

    @property
    def unit(self) -> int:
        """How far one size is from the next."""
        return 1 if self.varies == "batch" else 6

    @property
    def smallest(self) -> int:
        return 1 if self.varies == "batch" else 10


def plans(job: Job, questions: Sequence[Question], processes: int) -> Json:
    """The planner's answer to every question and mode, from shapes, on as many processor cores."""
    found: Json = {question.name: {} for question in questions}
    result = {"kind": "plans", "questions": found}
    with ProcessPoolExecutor(
        min(processes, os.cpu_count() or 1), multiprocessing.get_context("spawn")
    ) as pool:
        asked = {
            pool.submit(_plan, q, mode): (q.name, mode) for q in questions for mode in COMPETITORS
        }
        for answer in as_completed(asked):
            name, mode = asked[answer]
            found[name][mode] = answer.result()
            job.tell(result)
    return result


def _plan(question: Question, mode: str) -> Json:
    torch.set_num_threads(1)
    made = plan_work(question.work, question.varies, question.budget, DEVICE.type, [mode])
    fit = made[mode]
    return {"largest": fit.largest, "peak": fit.peak, "reserve": made.reserve}


def limit(job: Job, question: Question, plan: str) -> Json:
    """Training steps of what was planned, held to the budget, and of what is near to it.

    Raises:
        PartFailed: if nothing was planned, or if that runs out of memory.
    """
    planned = job.earlier[plan] and job.earlier[plan]["questions"][question.name]
    if not planned:
        raise PartFailed("nothing was planned")
    rows: list[Json] = []
    result = {
        "kind": "limit",
        "question": question.name,
        "varies": question.varies,
        "budget": question.budget,
        "precision": question.work.precision,
        "rows": rows,
    }
    for mode in [mode for mode in COMPETITORS if mode in planned]:
        row: Json = {"mode": mode, "planned": planned[mode], "tries": []}
        rows.append(row)
        job.tell(result)
        for size, peak in _tries(question, mode, planned[mode]["largest"]):
            row["tries"].append({"size": size, "peak": peak})
            job.tell(result)
    if short := [row["mode"] for row in rows if row["tries"] and row["tries"][0]["peak"] is None]:
        raise PartFailed(f"planned, and out of memory: {', '.join(short)}")
    return result


def _tries(question: Question, mode: str, planned: int) -> Iterator[tuple[int, int | None]]:
    """Sizes and their peaks: what was planned, and on from there, up or down, to the edge."""
    rise = max(round(planned * BEYOND_THE_PLAN / question.unit), 1) * question.unit
    size, fits = planned, None
    for _ in range(MOST_TRIES):
        if size < question.smallest:
            return
        peak = step_within(question.sized(size), mode, question.budget, DEVICE)
        yield size, peak
        if fits not in (None, peak is not None):
            return
        fits = peak is not None
        size += rise if fits else -rise
