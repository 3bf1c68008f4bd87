"""Commands: in this process, and in others that find the package and ``support``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from efficient_densenet.cli import main

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT / "tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)}


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that must fail with status 2."""
    try:
        status: object = main(argv)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err
