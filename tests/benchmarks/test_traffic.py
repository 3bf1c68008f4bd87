"""The model of what moves through memory, held against what operators read and write."""

from __future__ import annotations

import pytest

from benchmarks import traffic
from benchmarks.traffic import KINDS, MODEL, Block, Widths, counted, modelled

BLOCKS = {
    "narrow": Block(layers=12, channels=24, growth=12, batch=15, size=7),
    "few layers": Block(layers=3, channels=40, growth=8, batch=9, size=11),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", BLOCKS.values(), ids=list(BLOCKS))
def test_model_counts_what_moves(kind: str, block: Block) -> None:
    for which, (every, whole) in counted(kind, block).items():
        expected = modelled(kind, which, block)
        assert (every, whole) == pytest.approx(expected, rel=0.015), which


def test_pass_too_many_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    block, cost = BLOCKS["narrow"], MODEL["norm", "backward"]
    more = cost._replace(all=cost.all.plus(Widths(1, 0, 0)))
    monkeypatch.setitem(traffic.MODEL, ("norm", "backward"), more)
    every, _ = counted("norm", block)["backward"]
    assert every != pytest.approx(modelled("norm", "backward", block)[0], rel=0.015)


def test_ours_moves_fewer_whole_maps() -> None:
    block = BLOCKS["narrow"]
    naive, ours = counted("naive", block), counted("bottleneck", block)
    assert ours["forward"][1] < naive["forward"][1] / 3
    assert ours["backward"][1] < naive["backward"][1] * 3 / 4


def test_slab_that_looks_like_map_is_refused() -> None:
    with pytest.raises(ValueError, match="as large as a map"):
        counted("norm", Block(12, 24, 12, 2, 8))
