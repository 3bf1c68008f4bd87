"""The programme for a GPU: its runner, its rehearsal on a CPU, its report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.cases import GRAPHS, NAIVE, block
from benchmarks.gpu import limits, report, runner
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.limits import Question
from benchmarks.gpu.operations import Site, calls
from benchmarks.gpu.programme import REAL, REHEARSAL, programme
from benchmarks.gpu.runner import CUT_OFF, FAILED, LEAST, OK, SKIPPED, Part, Record, run_parts
from benchmarks.instruments import NO_TIME, SharpJudge, compete
from benchmarks.provenance import Json
from efficient_densenet.kernels.implementations import load
from efficient_densenet.training.work import Work
from support import runner_parts
from support.commands import ENVIRONMENT, ROOT

MODULE = {"env": ENVIRONMENT, "cwd": ROOT}


def run(*parts: Part, seconds: float = 60.0) -> list[Record]:
    end = time.monotonic() + seconds
    return run_parts(parts, end, lambda records: None, lambda line: None)


def part(run: Callable[..., object], allowance: float = 30.0, **options: bool) -> Part:
    return Part(getattr(run, "__name__", "part"), run, allowance, **options)


FINE = part(runner_parts.fine)


@pytest.mark.parametrize(
    ("wrong", "status", "error", "result"),
    [
        (part(runner_parts.breaks), FAILED, "ValueError: no such thing", None),
        (part(runner_parts.finds_fault), FAILED, "the other half is wrong", "half of it"),
        pytest.param(
            *(part(runner_parts.hangs, 3.0), CUT_OFF, "the other half", "half of it"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(part(runner_parts.always_dies), FAILED, "exit code 3", "little"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Part) else "",
)
def test_what_goes_wrong_is_recorded_and_rest_goes_on(
    wrong: Part, status: str, error: str, result: str | None
) -> None:
    before, bad, after = run(FINE, wrong, FINE)
    assert (bad.status, bad.result) == (status, result)
    assert error in (bad.error or "")
    for record in (before, after):
        assert (record.status, record.result, record.error) == (OK, "found", None)


def test_part_is_cut_off_when_its_allowance_is_over() -> None:
    (record,) = run(part(runner_parts.hangs, 2.0))
    assert record.status == CUT_OFF
    assert record.seconds >= 2.0


def test_part_is_cut_off_when_time_of_all_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LEAST", 1.0)
    first, second = run(part(runner_parts.hangs, 300.0), FINE, seconds=2.5)
    assert first.status == CUT_OFF
    assert first.seconds < 300.0
    assert second.status == SKIPPED and "0 s are left" in (second.error or "")


@pytest.mark.slow
def test_part_knows_how_long_it_has() -> None:
    (own,) = run(part(runner_parts.tells_time_left, 20.0))
    assert 0.0 < own.result < 20.0
    (all_of_it,) = run(part(runner_parts.tells_time_left, 20.0 + LEAST), seconds=LEAST + 2)
    assert 0.0 < all_of_it.result < LEAST + 2


@pytest.mark.slow
def test_what_kills_process_is_left_out_of_another_try() -> None:
    (record,) = run(part(runner_parts.dies_of_one))
    assert record.status == OK
    assert record.result == ["first", "deadly: failed: the process died with exit code 3", "last"]


@pytest.mark.slow
def test_process_that_dies_between_parts_is_replaced() -> None:
    first, second = run(part(runner_parts.dies_after_its_end), part(runner_parts.fine))
    assert (first.status, second.status) == (OK, OK)


@pytest.mark.slow
def test_children_of_part_end_with_it(tmp_path: Path) -> None:
    note = tmp_path / "child"
    run(FINE, part(partial(runner_parts.hangs_with_a_child, note=note), 4.0))
    stat = Path("/proc") / note.read_text(encoding="utf-8") / "stat"
    deadline = time.monotonic() + 5
    while stat.exists() and ") Z" not in stat.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not stat.exists() or ") Z" in stat.read_text()


@pytest.mark.slow
def test_part_that_leaves_traces_is_its_process_last() -> None:
    numbers = part(runner_parts.numbers)
    leaving = part(runner_parts.numbers, leaves_traces=True)
    first, same, other = (record.result for record in run(numbers, leaving, numbers))
    assert first == same != other


@pytest.mark.slow
def test_part_beside_others_runs_from_start_and_is_read_in_its_turn(
    tmp_path: Path,
) -> None:
    note = tmp_path / "note"
    records = run(
        Part("maker", partial(runner_parts.makes_a_file, note=note), 30),
        Part("waiter", partial(runner_parts.waits_for_a_file, note=note), 30, beside=True),
        Part("reader", runner_parts.reads_earlier, 30),
    )
    assert [record.status for record in records] == [OK] * 3
    assert records[2].result["waiter"] == "it came"


@pytest.mark.slow
def test_everything_told_is_written_at_once() -> None:
    written: list[list[tuple[str, object]]] = []
    run_parts(
        [part(runner_parts.finds_fault), FINE],
        time.monotonic() + 60,
        lambda records: written.append([(r.status, r.result) for r in records]),
        lambda line: None,
    )
    assert [("not reached", "half of it"), ("not reached", None)] in written
    assert written[-1] == [(FAILED, "half of it"), (OK, "found")]


def test_competitor_that_leaves_no_time_for_timing_is_left_out() -> None:
    left = iter([60.0, 0.0, 0.0])
    case = block("small", 2, 8, 4, 2, 4)
    rows = compete(case, [NAIVE], SharpJudge(case), left=lambda: next(left, 0.0), seconds=0.0)
    naive, floor = rows.values()
    assert naive.failure is None and len(naive.seconds) >= 5
    assert floor.failure == NO_TIME and not floor.seconds


@pytest.mark.parametrize(
    ("edge", "tried"),
    [(104, [100, 103, 106]), (98, [100, 97]), (0, [100, 97, 94, 91, 88])],
    ids=["above the plan", "below", "nowhere"],
)
def test_limit_walks_from_plan_to_edge(
    edge: int, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(work: Work, *args: object) -> int | None:
        return work.batch_size if work.batch_size <= edge else None

    monkeypatch.setattr(limits, "step_within", step)
    question = Question("largest", Work("densenet121", 32), "batch", 1)
    tries = limits._tries(question, "norm", 100)
    assert list(tries) == [(size, size if size <= edge else None) for size in tried]


def test_parts_have_names_of_their_own_and_rehearsal_has_all_kinds() -> None:
    real, rehearsal = programme(REAL), programme(REHEARSAL)
    assert len({p.name for p in real}) == len(real)
    assert {p.run.func for p in rehearsal} == {p.run.func for p in real}


@pytest.mark.parametrize("site", REHEARSAL.sites, ids=str)
def test_every_operation_is_called_as_it_wants_to_be(site: Site) -> None:
    for call in calls(site):
        found = call.prepare(load("eager"))()
        assert all(tensor.isfinite().all() for tensor in found), str(call)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_gpu_only_rehearsal_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, **MODULE)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def found(rehearsed: Path) -> Json:
    return json.loads((rehearsed / "rehearsal.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_rehearsal_runs_every_part(found: Json) -> None:
    assert [p["name"] for p in found["parts"]] == [p.name for p in programme(REHEARSAL)]
    assert {p["status"] for p in found["parts"]} == {OK}
    for name in ("device", "torch", "torchvision", "python", "commit", "date"):
        assert found["conditions"][name]


@pytest.mark.slow
def test_rehearsal_times_and_weighs_every_competitor(found: Json) -> None:
    benches = [p["result"] for p in found["parts"] if p["result"]["kind"] == "bench"]
    rows = [row for bench in benches for row in bench["rows"]]
    assert {row["failure"] for row in rows} == {None}
    assert all(len(row["seconds"]) >= 5 for row in rows)
    assert all(row["peak"] > 0 for row in rows if not row["name"].startswith("("))
    assert all(row["busy"] > 0 for row in rows if not row["name"].startswith("("))
    assert any("torch.compile" in row["name"] for row in rows)
    for how in (f"triton, {GRAPHS}", f"torch.compile, {GRAPHS}", f"naive, {GRAPHS}"):
        assert any(how in row["name"] for row in rows), how


@pytest.mark.slow
def test_report_has_section_for_every_part_and_pictures(rehearsed: Path, found: Json) -> None:
    text = (rehearsed / "rehearsal.md").read_text(encoding="utf-8")
    for p in found["parts"]:
        assert f"\n## {p['name']}\n" in text
    for picture in ("steps", "estimate", "limit"):
        assert f"(rehearsal-{picture}.png)" in text
        assert (rehearsed / f"rehearsal-{picture}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_results_of_cpu_do_not_pass_for_gpus(rehearsed: Path) -> None:
    assert not list(rehearsed.glob("gpu*"))
    text = (rehearsed / "rehearsal.md").read_text(encoding="utf-8")
    assert text.startswith("# Rehearsal on ") and "no GPU" in text.splitlines()[0]
    assert "Measured on" not in text


def a_run(*parts: Json, rehearsal: bool = False) -> Json:
    names = ("device", "torch", "date", "commit")
    return {"rehearsal": rehearsal, "conditions": dict.fromkeys(names, "some"), "parts": [*parts]}


def a_part(**values: object) -> Json:
    return {**vars(Record("part", 10.0)), **values}


def a_row(name: str, seconds: float, peak: int) -> Json:
    return {
        "name": name,
        "failure": None if seconds else "out of memory",
        "seconds": [seconds] * 3 if seconds else [],
        "first_seconds": 40.0,
        "kept": peak // 2,
        "peak": peak,
        "busy": 0.75,
    }


def a_bench(norm: float, peak: int) -> Json:
    rows = [
        a_row("naive", 0.0, 0),
        a_row("naive, channels_last", 1.0, 600),
        a_row("norm, channels_last", norm, peak),
        a_row("bottleneck, channels_last", 9.0, peak),
        a_row("naive, torch.compile, channels_last", 0.8, 500),
        a_row("(its convolutions alone, channels_last)", 0.2, 0),
    ]
    result = {"kind": "bench", "case": "a case", "batch": 64, "rows": rows}
    return a_part(status=OK, result=result)


def test_part_without_result_reads_not_measured() -> None:
    text = report.markdown(a_run(a_part(status=FAILED, error="Traceback\nRuntimeError: no")))
    assert text.startswith("# Measured on some\n")
    assert "**failed**: RuntimeError: no\n\nnot measured" in text


def test_goals_that_are_missed_are_bold() -> None:
    for norm, peak, cells in (
        (0.5, 90, ["0.50", "0.62", "0.15"]),
        (0.75, 120, ["**0.75**", "**0.94**", "**0.20**"]),
    ):
        header, row = report.goals(a_run(a_bench(norm, peak)))
        assert len(header) == len(row)
        assert row[1] == "norm, channels_last"
        assert list(row[3:]) == cells


def test_rows_without_times_say_why_and_rows_that_lose_say_where() -> None:
    (table,) = report.bench_tables(a_bench(1.5, 90)["result"])
    rows = {row[0]: dict(zip(table[0], row, strict=True)) for row in table[1:]}
    assert rows["naive"]["note"] == "out of memory"
    assert rows["norm, channels_last"]["note"] == "LOSES: time / naive c.l., time / compiled"
    assert rows["naive, torch.compile, channels_last"]["note"] == "first step 40 s"
    assert rows["(its convolutions alone, channels_last)"]["peak MiB"] == ""
    assert {row["busy"] for row in rows.values()} == {"", "75%"}


def test_graphed_rows_are_told_beside_naive_graphs_and_without_memory() -> None:
    times = {"naive": 0.8, "norm": 0.6}
    rows = [a_row(f"{kind}, {GRAPHS}, channels_last", time, 0) for kind, time in times.items()]
    result = a_bench(0.7, 90)["result"]
    (table,) = report.bench_tables({**result, "rows": [*result["rows"], *rows]})
    told = dict(zip(table[0], table[-1], strict=True))
    assert (told["peak MiB"], told["time / graphed"]) == ("", "0.75")


def test_pictures_of_nothing_are_removed(tmp_path: Path) -> None:
    source = tmp_path / "gpu.json"
    source.write_text(json.dumps(a_run(a_bench(0.5, 90))), encoding="utf-8")
    report.write(source)
    assert (tmp_path / "gpu-steps.png").exists()
    source.write_text(json.dumps(a_run(a_part(status=FAILED))), encoding="utf-8")
    report.write(source)
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md"}


def test_operations_are_told_with_fastest_and_its_tiles() -> None:
    row = {
        "name": "1×1",
        "bytes": 2 * 10**9,
        "flops": 4 * 10**12,
        "seconds": {"eager": [0.02] * 3, "triton": [0.01] * 3},
        "differences": {"eager": 0.0, "triton": 1e-3},
        "failure": None,
    }
    broken = {"name": "correct", "failure": "RuntimeError: no"}
    tiles = {"product, 64": {"rows": 128, "columns": 64, "depth": 32, "warps": 8, "stages": 3}}
    result = {"copied": 3e12, "multiplied": 8e14, "rows": [row, broken], "tiles": tiles}
    table, tuned = report.operations_tables({"kind": "operations", **result})
    assert list(table[1])[-4:-2] == ["3000", "800.0"]
    assert list(table[2])[1:] == ["20000", "10000", "triton", "200", "400.0", "1.0e-03", ""]
    assert table[3][-1] == "RuntimeError: no"
    assert list(tuned[1]) == ["product, 64", "128", "64", "32", "8", "3"]
