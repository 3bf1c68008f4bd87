"""Every choice of the CPU path can be made, the one that was made among them."""

import pytest

from benchmarks import choices


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Maps as small as they can be: nothing is timed."""
    monkeypatch.setattr(choices, "BATCH", 2)
    monkeypatch.setattr(choices, "SIZE", 4)


def test_every_way_of_every_choice_runs():
    found = list(choices.choices())
    assert len(found) > 5
    for choice in found:
        assert choice.chosen in choice.ways, choice.question
        for way in choice.ways.values():
            way()
