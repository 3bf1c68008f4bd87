"""Fixtures of the modules' tests."""

import pytest

from efficient_densenet.modules.calls import BlockCall, StemCall


@pytest.fixture
def calls(monkeypatch):
    """Counts what runs through the recomputing functions."""
    found = {StemCall: 0, BlockCall: 0}
    for kind in found:
        run = kind.run

        def counted(self, run=run, kind=kind):
            found[kind] += 1
            return run(self)

        monkeypatch.setattr(kind, "run", counted)
    return found
