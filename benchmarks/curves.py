"""The curves that the suite measures with ``--full``, besides its cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks import depth, growth
from benchmarks.provenance import Json


class Curve(NamedTuple):
    """What is measured, the JSON file that it goes to, and about how many seconds it takes."""

    name: str
    file: str
    found: Callable[[], Json]
    seconds: float

    def __str__(self) -> str:
        return self.name


CURVES = (
    Curve("memory against depth", "depth", depth.found, 120.0),
    Curve("time and memory along each dimension of a block", "growth", growth.found, 600.0),
)
