"""Every way to train is checked before it is timed; what is wrong with it is found and shown."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import alternatives
from benchmarks.alternatives import Bench, Network, slope_error, slopes_of, ways_of
from benchmarks.palette import colour_of
from benchmarks.ways import NAIVE, WAYS, Way, compiled_within, converted, with_flag
from docs.tables import alternatives as shown

SMALL = Network(
    "small", partial(torchvision.models.DenseNet, 8, (2, 2), 16, num_classes=10), (4, 3, 32, 32)
)
EAGER = [way for way in WAYS if not way.compiled]
TWICE = "updates running statistics twice a step"
CONDITIONS = {"device": "a machine", "threads": "1", "torch": "3", "commit": "c", "date": "d"}


class Doubled(nn.Module):
    """Right forward, wrong backward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        output = self.inner(x)
        return output + (output - output.detach())


class Forgetful(nn.Module):
    """Draws other masks of dropout in the backward pass than in the forward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False, preserve_rng_state=False)


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    ways = [*EAGER, Way("doubled", Doubled)]
    return {row["name"]: row for row in Bench(SMALL, {"norm": "said"}).run(ways, 2)}


def test_every_way_is_right_and_timed(rows: dict[str, dict]) -> None:
    for way in EAGER:
        assert rows[way.name]["failure"] is None
        assert len(rows[way.name]["seconds"]) == 2 and rows[way.name]["peak"] > 0
    assert rows["norm"]["notes"] == ["said"]


def test_wrong_gradient_is_not_timed(rows: dict[str, dict]) -> None:
    assert "gradient differs by" in rows["doubled"]["failure"]
    assert rows["doubled"]["seconds"] == []


def test_checkpoints_update_running_statistics_twice(rows: dict[str, dict]) -> None:
    twice = {name for name, row in rows.items() if TWICE in row["notes"]}
    assert twice == {
        "torchvision memory_efficient",
        "checkpoint per block",
        "checkpoint per layer",
    }


def test_accumulation_is_marked_as_another_computation(rows: dict[str, dict]) -> None:
    row = rows["accumulation of 2 parts"]
    assert not row["exact"] and "batch statistics of 2 of 4 samples" in row["notes"][0]
    assert row["peak"] < rows["naive"]["peak"]


def test_way_that_a_library_lacks_is_left_out() -> None:
    assert with_flag(nn.Sequential(nn.Linear(2, 2))) is None


def test_other_masks_in_backward_pass_are_found() -> None:
    assert "WRONG with dropout" in (slope_error(Way("forgetful", Forgetful)) or "")
    for way in (NAIVE, Way("norm", partial(converted, mode="norm"))):
        assert slope_error(way) is None


def test_mixes_are_of_blocks_that_their_network_has() -> None:
    network = alternatives.NETWORKS[0]
    mixes = [way for way in ways_of(network, False) if way.name.startswith("fit_")]
    assert len(mixes) == 5 and slopes_of(mixes) == {}
    with torch.device("meta"):
        assert mixes[0].change(network.make()) is not None


@pytest.mark.slow
def test_compiler_within_budget_keeps_less_and_breaks_dropout() -> None:
    torch.compiler.reset()
    tight = Way("tight", partial(compiled_within, budget=0.2), compiled=True)
    assert "WRONG with dropout" in (slope_error(tight) or "")
    whole, part = Bench(SMALL, {}).run([WAYS[7], tight], 2)
    assert whole["name"] == "naive, torch.compile" and "first step" in whole["notes"][0]
    assert part["failure"] is None and part["peak"] < whole["peak"]


def test_every_way_has_its_colour() -> None:
    colours = {way.name: colour_of(way.name) for way in WAYS}
    assert len(set(colours.values())) >= 9  # layouts and budgets share theirs


def test_networks_have_layers_that_are_checkpointed() -> None:
    layers = {
        network.name: sum(type(m).__name__ == "_DenseLayer" for m in network.make().modules())
        for network in alternatives.NETWORKS[:2]
    }
    assert list(layers.values()) == [58, 123]


def test_rows_are_shown_as_table_and_picture(rows: dict[str, dict], tmp_path: Path) -> None:
    networks = [{"name": "small", "rows": list(rows.values())}]
    found = {"conditions": CONDITIONS, "networks": networks}
    text = shown.tables_of(found)
    assert text.count("| checkpoint per ") == 2 and TWICE in text
    assert "| doubled |  |  |  |  | wrong: gradient" in text
    shown.draw(found, tmp_path / "alternatives.png")
    assert (tmp_path / "alternatives.png").read_bytes().startswith(b"\x89PNG")
