"""The benchmark suite's own machinery, on blocks small enough for a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import goals, instruments, report
from benchmarks import provenance as provenance_of
from benchmarks.cases import (
    CASES,
    COMPETITORS,
    FLOOR,
    KINDS,
    NAIVE,
    NAIVE_COMPILED,
    Case,
    Competitor,
    block,
    make_block,
)
from benchmarks.provenance import provenance, publish
from docs.tables.steps import cases_of
from support.commands import ROOT

NORM = Competitor("norm")
FEW = (NAIVE, Competitor("naive", True), NORM)


@pytest.fixture(scope="module")
def small() -> Case:
    return block("small", 3, 8, 4, 4, 8)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruments, "ROUNDS", (2, 2))


class DoubledGradient(nn.Module):
    """A block that is right forward and wrong backward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.inner(x)
        return output + (output - output.detach())

    def state_dict(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return self.inner.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return self.inner.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return self.inner.named_parameters(*args, **kwargs)


def test_every_competitor_has_same_weights_and_input(small: Case) -> None:
    subjects = [small.subject(competitor.uncompiled()) for competitor in COMPETITORS]
    reference = subjects[0].model.state_dict()
    for subject in subjects[1:]:
        assert torch.equal(subject.x, subjects[0].x)
        state = subject.model.state_dict()
        assert state.keys() == reference.keys()
        assert all(torch.equal(state[name], reference[name]) for name in reference)


def test_subject_starts_backward_from_random_gradient_in_layout_of_its_output(
    small: Case,
) -> None:
    subject = small.subject(NAIVE)
    output = subject.step()
    assert subject.upstream is not None
    assert subject.upstream.std() > 0.5
    assert subject.upstream.stride() == output.stride()


@pytest.mark.parametrize("competitor", COMPETITORS, ids=str)
def test_check_passes_what_is_right(small: Case, competitor: Competitor) -> None:
    truth = instruments.results(small.small_subject(NAIVE))
    found = instruments.results(small.small_subject(competitor))
    assert instruments.check(found, truth, instruments.SHARP) is None
    truth = instruments.coarse(small.subject(NAIVE))
    found = instruments.coarse(small.subject(competitor))
    assert instruments.check(found, truth, instruments.COARSE) is None


def test_what_is_wrong_is_not_timed(small: Case, brief: None) -> None:
    def make(kind):  # type: ignore[no-untyped-def]
        right = small.make(kind)
        return DoubledGradient(right) if kind == "norm" else right

    rows = instruments.run(Case("one is wrong", small.shape, make), FEW)
    failure = rows[NORM].failure
    assert failure is not None and "input.grad" in failure and "float64" in failure
    assert rows[NORM].seconds == []
    assert len(rows[NAIVE].seconds) == instruments.ROUNDS[0]
    assert failure in report.markdown([rows], {})


def test_floor_is_timed_beside_competitors(small: Case, brief: None) -> None:
    rows = instruments.run(small, FEW)
    floor = rows[FLOOR]
    assert len(floor.seconds) == instruments.ROUNDS[0]
    cells = dict(zip(report.HEADER, report.cells(floor, rows), strict=True))
    assert cells["kept MiB"] == cells["kept / naive"] == cells["note"] == ""
    assert float(cells["time / naive"]) > 0
    assert 0 < rows[NORM].convolution_share < 1


def test_floor_convolves_what_model_convolves(small: Case) -> None:
    subject = small.subject(NAIVE)
    calls = small.floor()._calls
    convolutions = [m for m in subject.model.modules() if isinstance(m, nn.Conv2d)]
    assert [module.weight.shape for module, *_ in calls] == [c.weight.shape for c in convolutions]
    assert all(x.shape[1] == module.in_channels for module, x, _ in calls)


def test_compile_time_is_what_first_step_took_longer() -> None:
    row = instruments.Row("case", NAIVE_COMPILED, first_seconds=31.5, seconds=[0.5] * 3)
    assert report.note(row, {}) == "compiled in 31 s"


def test_nan_counts_as_infinite_error() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert instruments.relative_error(nan, torch.ones(2)) == float("inf")


def test_out_of_memory_is_recorded(small: Case, brief: None) -> None:
    def make(kind):  # type: ignore[no-untyped-def]
        if kind == "norm":
            raise torch.OutOfMemoryError("full")
        return small.make(kind)

    rows = instruments.run(Case("one is too large", small.shape, make), FEW)
    assert rows[NORM].failure == "out of memory"
    assert rows[NAIVE].peak > rows[NAIVE].kept > 0


def test_rounds_are_shuffled_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(instruments, "timed", lambda subject: order.append(subject) or 1.0)
    times = instruments.interleaved({NAIVE: "a", NORM: "b"}, 8)  # type: ignore[dict-item]
    assert [len(seconds) for seconds in times.values()] == [8, 8]
    pairs = {tuple(order[i : i + 2]) for i in range(0, 16, 2)}
    assert pairs == {("a", "b"), ("b", "a")}


def test_rounds_fill_time_of_case_within_bounds() -> None:
    fewest, most = instruments.ROUNDS
    assert instruments.rounds(0.0) == most
    assert instruments.rounds(1e6) == fewest
    assert fewest < instruments.rounds(instruments.SECONDS_PER_CASE / (fewest + 1)) < most


def rows_with(norm_seconds: float) -> dict[Competitor, instruments.Row]:
    channels_last = Competitor("naive", channels_last=True)
    seconds = {NAIVE: 2.0, channels_last: 1.0, NORM: norm_seconds}
    return {
        competitor: instruments.Row("case", competitor, kept=100, peak=200, seconds=[time] * 3)
        for competitor, time in seconds.items()
    }


def test_lost_comparisons_are_marked_and_only_those() -> None:
    assert report.cells(rows_with(0.5)[NORM], rows_with(0.5))[-1] == ""
    note = report.cells(rows_with(1.5)[NORM], rows_with(1.5))[-1]
    assert note == "LOSES: time / naive c.l."


def test_goals_that_are_missed_are_bold() -> None:
    for seconds, shown in ((1.0, "0.50"), (1.5, "**0.75**")):
        rows = rows_with(seconds)
        rows[FLOOR] = instruments.Row("case", FLOOR, seconds=[0.8] * 3)
        header, cells = goals.table([rows])
        row = dict(zip(header, cells, strict=True))
        assert row["norm / naive (goal 0.60)"] == shown
        assert row["norm / naive compiled (goal 0.85)"] == ""
        assert row["convolutions alone / naive"] == "0.40"
        assert row["norm beyond them, ms"] == f"{1e3 * (seconds - 0.8):.0f}"


def test_table_is_rectangular_markdown() -> None:
    lines = report.table(rows_with(1.5)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1
    assert "0.75" in lines[-1] and "1.50" in lines[-1]


def test_column_that_holds_nothing_is_left_out() -> None:
    header, *_ = report.table(rows_with(1.5)).splitlines()
    assert "time / naive c.l." in header and "note" in header
    assert "time / compiled" not in header  # no one compiled took part


def test_published_rows_carry_conditions(tmp_path: Path) -> None:
    rows = [rows_with(1.5)]
    publish("steps", report.rows(rows), tmp_path)
    written = json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))
    conditions = provenance()
    assert written["conditions"] == conditions
    needed = {"device", "instruction set", "threads", "torch", "commit", "dtype", "layout", "date"}
    assert needed <= set(conditions)
    assert [row["seconds"] for row in written["rows"]] == [[2.0] * 3, [1.0] * 3, [1.5] * 3]
    assert cases_of(written) == rows


def test_what_run_of_same_commit_has_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance_of, "RESULTS", tmp_path)
    assert provenance_of.resumed("fit") == {}
    publish("fit", {"networks": [{"name": "small", "rows": [1]}]}, tmp_path)
    assert provenance_of.resumed("fit") == {"small": {"name": "small", "rows": [1]}}
    monkeypatch.setattr(provenance_of, "commit", lambda: "another")
    assert provenance_of.resumed("fit") == {}


def test_cases_are_what_documentation_lists() -> None:
    listed = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert all(case.name.split(":")[0] in listed for case in CASES)


def test_kinds_of_block_have_one_set_of_keys() -> None:
    keys = [set(make_block(kind, 2, 6, 3).state_dict()) for kind in KINDS]
    assert all(found == keys[0] for found in keys)
