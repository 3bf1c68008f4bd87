"""The matrix of docs/interop.md says what the marked tests found, failures included."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from scripts.interop_matrix import Notes, Outcome, cell, markdown, outcomes


def report(*cases: str) -> ET.Element:
    return ET.fromstring(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")


def case(clause: str, mode: str, path: str | None = None, inside: str = "") -> str:
    values = {"clause": clause, "mode": mode} | ({"path": path} if path else {})
    properties = "".join(f'<property name="{k}" value="{v}"/>' for k, v in values.items())
    return f"<testcase><properties>{properties}</properties>{inside}</testcase>"


def test_row_names_path_of_every_mode() -> None:
    found = outcomes(
        report(
            "<testcase/>",
            case("2 · later", "norm", "efficient"),
            case("1 · vmap", "none", "recompute none"),
            case("1 · vmap", "norm", "refused: vmap cannot"),
            case("1 · vmap", "bottleneck", "conv1 is a LoRA"),
        )
    )
    lines = markdown(found, "a day").splitlines()
    assert lines[2:4] == [
        "| vmap | reference | refused<sup>1</sup> | reference<sup>2</sup> |",
        "| later | – | efficient | – |",
    ]
    assert lines[5:7] == ["1. vmap cannot", "2. conv1 is a LoRA"]


@pytest.mark.parametrize(
    ("inside", "expected"),
    [("<failure/>", "**fails**"), ("<error/>", "**fails**"), ("<skipped/>", "efficient")],
)
def test_one_failure_fails_its_cell(inside: str, expected: str) -> None:
    found = outcomes(
        report(case("1 · a", "norm", "efficient"), case("1 · a", "norm", None, inside))
    )
    assert cell(found, Notes()) == expected


def test_what_only_skipped_was_not_run() -> None:
    assert cell(outcomes(report(case("1 · a", "norm", None, "<skipped/>"))), Notes()) == "not run"


def test_outcome_without_path_is_refused() -> None:
    with pytest.raises(ValueError, match="'1 · a' did not say"):
        cell([Outcome("1 · a", "norm", "passed", None)], Notes())
