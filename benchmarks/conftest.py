"""Hooks: what a run takes in, its progress while it runs, and its report at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter

from benchmarks import report
from benchmarks.cases import BRIEF, CASES, COMPETITORS, Case, Competitor
from benchmarks.curves import CURVES, Curve
from benchmarks.instruments import Rows
from benchmarks.progress import Progress, duration, expected, published
from benchmarks.provenance import (
    RESULTS,
    Json,
    limits,
    provenance,
    publish,
    with_instruction_set,
)

HERE = Path(__file__).parent
OUT = HERE / "out"
COMPETING = pytest.StashKey[tuple[Competitor, ...]]()
MEASURED = pytest.StashKey[list[Rows]]()
PROGRESS = pytest.StashKey[Progress]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="the naive model compiled and ours in channels_last too, and curves",
    )
    parser.addoption(
        "--publish",
        action="store_true",
        help="with --full, or with AVX2 alone: write to docs/results/ instead of benchmarks/out/",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    full = config.getoption("full")
    if config.getoption("publish") and not full and not limits():
        raise pytest.UsageError("--publish needs --full: what is published has every row")
    config.stash[COMPETING] = COMPETITORS if full else BRIEF
    config.stash[MEASURED] = []
    # The report is what there is to read.
    config.option.no_header = config.option.benchmark_quiet = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("full"):
        curves = [item for item in items if item.path == HERE / "test_curves.py"]
        config.hook.pytest_deselected(items=curves)
        items[:] = [item for item in items if item not in curves]


def pytest_collection_finish(session: pytest.Session) -> None:
    rows, competing = published(), session.config.stash[COMPETING]
    seconds = {}
    for item in filter(_is_part, session.items):
        part = _part(item)
        known = isinstance(part, Curve) and part.seconds
        seconds[str(part)] = known or expected(part, competing, rows)
    session.config.stash[PROGRESS] = Progress(seconds)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    if _is_part(item):
        reporter = item.config.pluginmanager.get_plugin("terminalreporter")
        reporter.showfspath = False  # no name of a file between the lines of progress
        reporter.ensure_newline()
        reporter.write_line(item.config.stash[PROGRESS].start(str(_part(item))))


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dots between the lines of progress."""
    return ("passed", "", "") if report.passed and report.when == "call" else None


def _is_part(item: pytest.Item) -> bool:
    return HERE in item.path.parents


def _part(item: pytest.Item) -> Case | Curve:
    (part,) = item.callspec.params.values()
    return part


def folder_of(config: pytest.Config) -> Path:
    """Where this run leaves what it measured."""
    return RESULTS if config.getoption("publish") else OUT


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Json) -> None:
    machine_info["efficient_densenet"] = provenance()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[MEASURED]
    if not results:
        return
    terminalreporter.section("memory and time of one training step")
    terminalreporter.write_line(report.markdown(results, provenance()))
    publish(with_instruction_set("steps"), report.rows(results), folder_of(config))
    if not config.getoption("full"):
        terminalreporter.write_line(f"--full adds {_more()}")


def _more() -> str:
    rows = published()
    seconds = sum(expected(case, COMPETITORS, rows) - expected(case, BRIEF, rows) for case in CASES)
    curves = " and ".join(curve.name for curve in CURVES)
    seconds += sum(curve.seconds for curve in CURVES)
    return (
        "the naive model compiled and ours in channels_last, case by case, and the curves of "
        f"{curves}: about {duration(seconds)} more"
    )
