"""The time of an operation on a GPU that is not there."""

from contextlib import nullcontext

import pytest
import torch

from benchmarks.gpu import operations

REPLAY = 40.0  # milliseconds that a replay takes


class Clock:
    now = 0.0


class Graph:
    def replay(self):
        Clock.now += REPLAY


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Clock.now

    def elapsed_time(self, end):
        return end.at - self.at


def test_copies_are_replayed_from_a_graph(monkeypatch):
    monkeypatch.setattr(operations, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(operations, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    ran = []
    found = operations.seconds(lambda: ran.append(1))
    assert len(ran) == 1 + operations.COPIES  # one to warm up; what is replayed runs no Python
    assert found == pytest.approx([REPLAY / 1000 / operations.COPIES] * operations.REPEATS)
