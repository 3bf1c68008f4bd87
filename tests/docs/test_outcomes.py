"""The matrix of clauses and the table of libraries say what the marked tests found."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.outcomes import outcomes
from benchmarks.provenance import Json
from docs.tables.outcomes import (
    Notes,
    count_cell,
    libraries_of,
    matrix_of,
    path_cell,
    structures_of,
)

CONDITIONS = {"device": "a machine", "threads": "1", "torch": "3", "commit": "c", "date": "a day"}


def found_in(*cases: str) -> list[Json]:
    report = f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"
    return outcomes(ElementTree.fromstring(report))


def case(inside: str = "", **properties: str) -> str:
    texts = "".join(f'<property name="{k}" value="{v}"/>' for k, v in properties.items())
    return f"<testcase><properties>{texts}</properties>{inside}</testcase>"


def clause(text: str, mode: str, path: str | None = None, inside: str = "") -> str:
    return case(inside, clause=text, mode=mode, **({"path": path} if path else {}))


def test_row_names_path_of_every_mode() -> None:
    tests = found_in(
        "<testcase/>",
        clause("2 · later", "norm", "efficient"),
        clause("1 · vmap", "none", "recompute none"),
        clause("1 · vmap", "norm", "refused: vmap cannot"),
        clause("1 · vmap", "bottleneck", "conv1 is a LoRA"),
    )
    lines = matrix_of({"tests": tests, "conditions": CONDITIONS}).splitlines()
    assert lines[2:4] == [
        "| vmap | naive | refused<sup>1</sup> | naive<sup>2</sup> |",
        "| later | – | efficient | – |",
    ]
    assert lines[5:7] == ["1. vmap cannot", "2. conv1 is a LoRA"]
    assert lines[-1].startswith("4 tests. ") and "a day" in lines[-1]


@pytest.mark.parametrize(
    ("inside", "expected"),
    [("<failure/>", "**fails**"), ("<error/>", "**fails**"), ("<skipped/>", "efficient")],
)
def test_one_failure_fails_its_cell(inside: str, expected: str) -> None:
    tests = found_in(clause("1 · a", "norm", "efficient"), clause("1 · a", "norm", inside=inside))
    assert path_cell(tests, Notes()) == expected


def test_what_only_skipped_was_not_run() -> None:
    tests = found_in(clause("1 · a", "norm", inside="<skipped/>"))
    assert path_cell(tests, Notes()) == "not run"


def test_outcome_without_path_is_refused() -> None:
    with pytest.raises(ValueError, match="'1 · a' did not say"):
        path_cell(found_in(clause("1 · a", "norm")), Notes())


def test_library_has_count_of_tests_behind_each_capability() -> None:
    tests = found_in(
        case(library="timm", capability="trains"),
        case("<skipped/>", library="timm", capability="trains"),
        case("<failure/>", library="timm", capability="copies"),
        case("<skipped/>", library="MONAI", capability="trains"),
    )
    found = {"tests": tests, "versions": {"timm": "1.0", "monai": None}, "conditions": CONDITIONS}
    lines = libraries_of(found).splitlines()
    assert "|  | version | trains | copies |" in lines
    assert "| timm | 1.0 | yes (1) | **fails** |" in lines
    assert "| MONAI | – | not tested | not tested |" in lines


def test_structures_are_the_other_rows() -> None:
    tests = found_in(
        case(library="timm", capability="trains"),
        case(library="New maps first", capability="trains"),
    )
    found = {"tests": tests, "versions": {}, "conditions": CONDITIONS}
    lines = structures_of(found).splitlines()
    assert lines[0] == "|  | trains |"
    assert lines[2:4] == ["| New maps first | yes (1) |", ""]


def test_what_did_not_run_is_no_capability() -> None:
    assert count_cell([]) == "not tested"
