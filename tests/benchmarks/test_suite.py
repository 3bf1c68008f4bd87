"""The suite as a user runs it, on blocks so small that they take no time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import ENVIRONMENT, ROOT

pytestmark = pytest.mark.slow

RUN = """
import sys
from pathlib import Path
import pytest
from benchmarks import cases, instruments
cases.CASES = tuple(cases.block(name, 2, 8, 4, 2, 4) for name in ("first", "second", "third"))
instruments.ROUNDS = (2, 2)
from benchmarks import conftest
conftest.OUT = Path(sys.argv[1])
sys.exit(pytest.main(["benchmarks", "--benchmark-only", *sys.argv[2:]]))
"""


def suite(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Standard output and error come as one text."""
    command = [sys.executable, "-c", RUN, str(folder), "-p", "no:cacheprovider", *options]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    return suite(tmp_path_factory.mktemp("out"), "-k", "first or third", "-s")


def test_only_what_is_selected_runs(ran: subprocess.CompletedProcess[str]) -> None:
    assert ran.returncode == 0, ran.stdout
    started = re.findall(r"^\[(\d/\d)\] (\w+): .* about .* left$", ran.stdout, re.MULTILINE)
    assert started == [("1/2", "first"), ("2/2", "third")]
    assert re.findall(r"^## (\w+)", ran.stdout, re.MULTILINE) == [
        "first",
        "third",
        "Goals",
        "Conditions",
    ]


def test_nothing_but_progress_and_report_is_printed(
    ran: subprocess.CompletedProcess[str],
) -> None:
    kinds = re.compile(r"$|=+|\[\d/\d\] |## |\| |- |written: |--full adds |collect")
    assert [line for line in ran.stdout.splitlines() if not kinds.match(line)] == []


def test_what_is_published_has_every_row(tmp_path: Path) -> None:
    refused = suite(tmp_path, "--publish")
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--publish needs --full" in refused.stdout
