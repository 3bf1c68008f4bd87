"""Mixes of modes are measured beside uniform ones, each within its budget, and shown."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from benchmarks import estimates, fit
from docs.tables import fit as shown
from docs.tables import memory
from efficient_densenet import densenet_cifar
from efficient_densenet.modules.checkpointed import checkpointed_

SMALL = fit.Network("small", partial(densenet_cifar, 16, 6), (4, 3, 16, 16), checkpointed_)
CONDITIONS = {"device": "a machine", "threads": "1", "torch": "3", "commit": "c", "date": "d"}


@pytest.fixture(scope="module")
def found() -> dict:
    return {"conditions": CONDITIONS, "networks": [fit.examine(SMALL, rounds=2, budgets=3)]}


@pytest.mark.slow
def test_mixes_are_measured_beside_uniform_modes(found) -> None:
    candidates = found["networks"][0]["candidates"]
    names = [candidate["name"] for candidate in candidates]
    assert names == ["naive", "norm", "bottleneck", "checkpointed", "mix 1", "mix 2", "mix 3"]
    assert all(len(candidate["seconds"]) == 2 for candidate in candidates)
    peaks = {candidate["name"]: candidate["peak"] for candidate in candidates}
    assert peaks["mix 1"] < peaks["naive"] and peaks["checkpointed"] < peaks["naive"]


@pytest.mark.slow
def test_mix_above_its_budget_is_noticed(found) -> None:
    network = found["networks"][0]
    mix = network["candidates"][-1]
    for above, right in ((0, True), (1, False)):
        candidate = {**mix, "peak": mix["budget"] + above}
        assert fit.right({**network, "candidates": [candidate]}) == right


@pytest.mark.slow
def test_mixes_are_shown_as_table_and_picture(found, tmp_path: Path) -> None:
    text = shown.tables_of(found)
    assert text.count("| mix ") == 3 and "small, peaks and budgets in MiB" in text
    assert "a machine, 1 thread" in text
    shown.draw(found, tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_frontier_is_of_points_that_none_beats() -> None:
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 6.0), (2.0, 3.0)]
    assert shown.frontier(points) == [(1.0, 5.0), (2.0, 3.0), (3.0, 1.0)]


def test_estimate_is_shown_beside_measurement() -> None:
    step = estimates.Step("small", estimates.own(densenet_cifar, 16, 8), "norm", (8, 3, 32, 32))
    row = estimates.compare(step)
    assert 0.99 * row["measured"] <= row["estimated"] <= 1.03 * row["measured"]
    text = memory.estimated_table({"conditions": CONDITIONS, "steps": [row]})
    assert "| small | norm | 8×3×32×32 | float32 | SGD |" in text


def test_edge_is_run() -> None:
    step = estimates.Step(
        "small", estimates.own(densenet_cifar, 10, 4), "bottleneck", (4, 3, 16, 16), "AdamW"
    )
    row = estimates.edge(step, "1MiB")
    assert row["next"] == row["largest"] + 1
    assert row["peak"] <= row["budget"] and row["next_peak"] is None


def test_there_are_twenty_four_steps_of_all_kinds() -> None:
    assert len(estimates.STEPS) == 24
    assert {len(step.shape) for step in estimates.STEPS} == {3, 4, 5}
    assert {step.optimizer for step in estimates.STEPS} == {*estimates.OPTIMIZERS}
