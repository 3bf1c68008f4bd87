"""The regression gate: a figure that grew fails, one that did not passes, and it says which."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from benchmarks import gate, instruments
from benchmarks.cases import FLOOR, Case, Competitor, block

MACHINE = {"device": "some CPU", "threads": "2"}


def row(competitor: str, kept: int, peak: int, seconds: float) -> dict:
    return {
        "case": "wide",
        "competitor": competitor,
        "failure": None,
        "kept_bytes": kept,
        "peak_bytes": peak,
        "seconds": [seconds * noise for noise in (1.0, 0.9, 5.0)],
    }


@pytest.fixture
def steps() -> dict:
    rows = [row(str(FLOOR), 0, 0, 0.5), row("norm", 500, 600, 1.0)]
    return {"conditions": dict(MACHINE), "rows": rows}


def grown(steps: dict, which: int, figure: str, by: float) -> dict:
    found = copy.deepcopy(steps)
    value = found["rows"][which][figure]
    found["rows"][which][figure] = (
        [v * by for v in value] if isinstance(value, list) else value * by
    )
    return found


def test_equal_figures_pass(steps: dict) -> None:
    assert gate.regressions(steps, steps) == []


@pytest.mark.parametrize(
    ("figure", "within", "beyond", "said"),
    [
        ("kept_bytes", 1.02, 1.022, "kept bytes 511, 1.022 times the baseline's 500"),
        ("peak_bytes", 1.02, 1.025, "peak bytes 615, 1.025 times the baseline's 600"),
        ("seconds", 1.25, 1.3, "time / convolutions 2.6, 1.300 times the baseline's 2"),
    ],
)
def test_figure_that_grew_too_much_fails(
    steps: dict, figure: str, within: float, beyond: float, said: str
) -> None:
    assert gate.regressions(grown(steps, 1, figure, within), steps) == []
    (line,) = gate.regressions(grown(steps, 1, figure, beyond), steps)
    assert line.startswith("wide, norm: ") and said in line
    assert gate.regressions(steps, grown(steps, 1, figure, beyond)) == []  # it shrank


def test_time_is_beside_convolutions_of_same_run(steps: dict) -> None:
    slower_machine = grown(grown(steps, 0, "seconds", 3), 1, "seconds", 3)
    assert gate.regressions(slower_machine, steps) == []
    assert gate.regressions(grown(steps, 0, "seconds", 0.7), steps) != []


def test_only_ours_are_judged(steps: dict) -> None:
    assert gate.regressions(grown(steps, 0, "peak_bytes", 2), steps) == []


def test_times_of_another_machine_are_not_compared_but_bytes_are(steps: dict) -> None:
    found = grown(grown(steps, 1, "seconds", 9), 1, "kept_bytes", 2)
    found["conditions"]["device"] = "another CPU"
    (line,) = gate.regressions(found, steps)
    assert "kept bytes" in line


def test_what_ran_must_run(steps: dict) -> None:
    found = copy.deepcopy(steps)
    found["rows"][1]["failure"] = "out of memory"
    assert gate.regressions(found, steps) == ["wide, norm: out of memory"]


def test_nothing_to_compare_is_no_success(steps: dict) -> None:
    found = copy.deepcopy(steps)
    found["rows"][1]["case"] = "another"
    with pytest.raises(ValueError, match="in both"):
        gate.regressions(found, steps)


def test_without_convolutions_there_is_no_verdict(steps: dict) -> None:
    found = copy.deepcopy(steps)
    found["rows"][0].update(failure="out of memory", seconds=[])
    with pytest.raises(ValueError, match="wide: there are no convolutions"):
        gate.regressions(found, steps)


def test_exit_status_is_verdict(steps: dict, tmp_path: Path, capsys) -> None:
    def status(found: dict) -> int:
        (tmp_path / "found.json").write_text(json.dumps(found))
        (tmp_path / "baseline.json").write_text(json.dumps(steps))
        files = ["--steps", str(tmp_path / "found.json")]
        return gate.main([*files, "--baseline", str(tmp_path / "baseline.json")])

    assert status(steps) == 0
    assert status(grown(steps, 1, "kept_bytes", 1.1)) == 1
    assert "kept bytes" in capsys.readouterr().out
    assert status({**steps, "rows": []}) == 2
    assert gate.main(["--baseline", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_run_is_judged_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small: Case = block("small", 3, 8, 4, 4, 8)
    monkeypatch.setattr(gate, "CASES", (small,))
    monkeypatch.setattr(gate, "COMPETITORS", (Competitor("norm"),))
    monkeypatch.setattr(instruments, "ROUNDS", (2, 2))
    found = gate.run("small")
    (tmp_path / "baseline.json").write_text(json.dumps(grown(found, 0, "seconds", 99)))
    arguments = ["--only", "small", "--baseline", str(tmp_path / "baseline.json")]
    assert gate.main(arguments) == 0
    (tmp_path / "baseline.json").write_text(json.dumps(grown(found, 0, "peak_bytes", 0.9)))
    assert gate.main(arguments) == 1
