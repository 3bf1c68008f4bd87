"""Hooks: hardware in pytest-benchmark's own records, the suite's report beneath its table."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter

from benchmarks import report
from benchmarks.cases import Competitor
from benchmarks.instruments import Row
from benchmarks.provenance import RESULTS, Json, provenance, publish

OUT = Path(__file__).parent / "out"
MEASURED = pytest.StashKey[dict[str, dict[Competitor, Row]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--publish",
        action="store_true",
        help="write steps.json to docs/results/ instead of benchmarks/out/",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = {}


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Json) -> None:
    machine_info["efficient_densenet"] = provenance()


# After pytest-benchmark's own table.
@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    results = list(config.stash[MEASURED].values())
    if not results:
        return
    terminalreporter.section("memory and time of one training step")
    terminalreporter.write_line(report.markdown(results, provenance()))
    publish("steps", report.rows(results), RESULTS if config.getoption("publish") else OUT)
