"""Hooks: hardware in pytest-benchmark's own records, the suite's report beneath its table."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter

from benchmarks import report
from benchmarks.cases import Competitor
from benchmarks.instruments import Row
from benchmarks.provenance import Json, provenance

HERE = Path(__file__).parent
RESULTS = pytest.StashKey[dict[str, dict[Competitor, Row]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--publish",
        action="store_true",
        help="write the report to docs/results/ as well as to benchmarks/out/",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {}


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Json) -> None:
    machine_info["efficient_densenet"] = provenance()


# After pytest-benchmark's own table.
@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    results = list(config.stash[RESULTS].values())
    if not results:
        return
    conditions = provenance()
    terminalreporter.section("memory and time of one training step")
    terminalreporter.write_line(report.markdown(results, conditions))
    made = report.write(results, conditions, HERE / "out")
    if config.getoption("publish"):
        made = [shutil.copy(path, HERE.parent / "docs" / "results") for path in made]
    for path in made:
        terminalreporter.write_line(f"written: {path}")
