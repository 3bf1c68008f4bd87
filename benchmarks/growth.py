"""Time and memory of a step as a dense block grows: deeper, wider, on more or larger images.

python -m benchmarks.growth    # into docs/results/growth.json
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

from benchmarks.cases import COMPETITORS, NAIVE_COMPILED, Case, block
from benchmarks.instruments import Row, Rows, run
from benchmarks.provenance import Json, publish


class Point(NamedTuple):
    """A dense block of bottleneck layers and its input."""

    layers: int = 24
    channels: int = 24
    growth: int = 12
    batch: int = 8
    size: int = 16

    def case(self) -> Case:
        return block("growth", *self)


AXES: dict[str, tuple[int, ...]] = {
    "layers": (12, 24, 48, 96),
    "batch": (2, 8, 32),
    "growth": (6, 12, 24, 48),
    "size": (8, 16, 32),
}
COMPILED = (12, 24, 48)
"""Depths at which the compiled naive block takes part; elsewhere it would only be compiled."""


@dataclass(frozen=True)
class Sample:
    """What one competitor took at one point of an axis."""

    axis: str
    value: int
    competitor: str
    kept: int
    peak: int
    seconds: float

    @classmethod
    def of(cls, axis: str, value: int, row: Row) -> Sample:
        if row.failure:
            raise RuntimeError(f"{row.competitor} at {axis} {value}: {row.failure}")
        return cls(axis, value, str(row.competitor), row.kept, row.peak, row.median)


def samples() -> list[Sample]:
    """Every competitor at every point of every axis; axes share the point in which they cross."""
    rows: dict[Point, Rows] = {}
    found = []
    for axis, values in AXES.items():
        for value in values:
            point = Point()._replace(**{axis: value})
            if point not in rows:
                with_compiled = axis == "layers" and value in COMPILED
                rows[point] = measured(point, with_compiled)
            taken = rows[point].values()
            found += [Sample.of(axis, value, row) for row in taken if _belongs(row, axis)]
    return found


def measured(point: Point, with_compiled: bool) -> Rows:
    return run(point.case(), [c for c in COMPETITORS if with_compiled or c != NAIVE_COMPILED])


def _belongs(row: Row, axis: str) -> bool:
    return axis == "layers" or row.competitor != NAIVE_COMPILED


def found() -> Json:
    return {"base": Point()._asdict(), "samples": [asdict(s) for s in samples()]}


def main() -> None:
    publish("growth", found())


if __name__ == "__main__":
    main()
