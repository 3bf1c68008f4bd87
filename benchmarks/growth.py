"""Time and memory of a step as a dense block grows: deeper, wider, on more or larger images.

    python -m benchmarks.growth              # into benchmarks/out/
    python -m benchmarks.growth --publish    # into docs/results/ too

Writes ``growth.md`` (every point, and the fitted exponents), ``growth.json`` and ``growth.png``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.cases import COMPETITORS, FLOOR, NAIVE_COMPILED, Case, Competitor, block
from benchmarks.instruments import Row, SharpJudge, compete
from benchmarks.provenance import Json, provenance
from benchmarks.report import MIB, aligned

RESULTS = Path(__file__).parent.parent / "docs" / "results"
OUT = Path(__file__).parent / "out"


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
NAMES = {"layers": "layers L", "batch": "batch", "growth": "growth rate k", "size": "image side"}
MEASURES = {"kept": "kept, MiB", "peak": "peak, MiB", "seconds": "time, ms"}
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
    rows: dict[Point, dict[Competitor, Row]] = {}
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


def measured(point: Point, with_compiled: bool) -> dict[Competitor, Row]:
    competitors = [c for c in COMPETITORS if with_compiled or c != NAIVE_COMPILED]
    case = point.case()
    return compete(case, competitors, SharpJudge(case))


def _belongs(row: Row, axis: str) -> bool:
    return axis == "layers" or row.competitor != NAIVE_COMPILED


def exponent(values: Sequence[float], taken: Sequence[float]) -> float:
    """The ``p`` of ``taken ~ values ** p``: slope of the least-squares line of their logarithms."""
    xs, ys = [math.log(v) for v in values], [math.log(t) for t in taken]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )


def series(found: Iterable[Sample], axis: str, competitor: str) -> list[Sample]:
    return [s for s in found if s.axis == axis and s.competitor == competitor]


def competitors(found: Iterable[Sample]) -> list[str]:
    """Their names, each once, in order."""
    return list(dict.fromkeys(s.competitor for s in found))


def exponents(found: Sequence[Sample], axis: str, competitor: str) -> dict[str, float]:
    """Of each measure along an axis; the convolutions alone have only time."""
    along = series(found, axis, competitor)
    measures = ["seconds"] if competitor == str(FLOOR) else list(MEASURES)
    values = [s.value for s in along]
    return {m: exponent(values, [getattr(s, m) for s in along]) for m in measures}


def markdown(found: Sequence[Sample], conditions: dict[str, str]) -> str:
    """The exponents, then every point."""
    base = ", ".join(f"{name} {value}" for name, value in Point()._asdict().items())
    lines = [f"- {key}: {value}" for key, value in conditions.items()]
    parts = [
        "# Cost as a block grows",
        f"A dense block of bottleneck layers ({base}), one of its dimensions varied. "
        "An exponent p says that the cost grows as the dimension to the power of p.",
        "## Exponents",
        _exponent_table(found),
        "## Every point",
        *(f"### {NAMES[axis]}\n\n{_point_table(found, axis)}" for axis in AXES),
        "Conditions:\n\n" + "\n".join(lines),
    ]
    return "\n\n".join(parts) + "\n"


def _exponent_table(found: Sequence[Sample]) -> str:
    header = ["competitor", *(f"{NAMES[a]}: {m}" for a in AXES for m in ("kept", "peak", "time"))]
    rows = [header]
    for competitor in competitors(found):
        cells = []
        for axis in AXES:
            known = exponents(found, axis, competitor) if series(found, axis, competitor) else {}
            cells += [f"{known[m]:.2f}" if m in known else "" for m in MEASURES]
        rows.append([competitor, *cells])
    return aligned(rows)


def _point_table(found: Sequence[Sample], axis: str) -> str:
    header = ["competitor", *(f"{m} at {v}" for m in MEASURES.values() for v in AXES[axis])]
    rows = [header]
    for competitor in competitors(found):
        at = {s.value: s for s in series(found, axis, competitor)}
        rows.append([competitor, *(_cell(at.get(v), m) for m in MEASURES for v in AXES[axis])])
    return aligned(rows)


def _cell(sample: Sample | None, measure: str) -> str:
    if sample is None or (measure != "seconds" and sample.competitor == str(FLOOR)):
        return ""
    return f"{_shown(sample, measure):.1f}"


def _shown(sample: Sample, measure: str) -> float:
    return sample.seconds * 1e3 if measure == "seconds" else getattr(sample, measure) / MIB


def chart(found: Sequence[Sample], path: Path) -> None:
    """Peak and time against every dimension, logarithmic, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    axes = figure.subplots(2, len(AXES), sharey="row")
    for column, axis in enumerate(AXES):
        for row, measure in enumerate(("peak", "seconds")):
            panel = axes[row][column]
            for i, competitor in enumerate(competitors(found)):
                if measure == "peak" and competitor == str(FLOOR):
                    continue
                along = series(found, axis, competitor)
                style = "--" if "channels_last" in competitor else "-"
                panel.plot(
                    [s.value for s in along],
                    [_shown(s, measure) for s in along],
                    style,
                    color=f"C{i}",
                    marker="o",
                    markersize=3,
                    label=competitor,
                )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(AXES[axis], [str(v) for v in AXES[axis]])
            panel.set_xlabel(NAMES[axis])
            panel.set_ylabel(MEASURES[measure] if column == 0 else "")
            panel.grid(alpha=0.3)
    figure.legend(*axes[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    base = Point()
    figure.suptitle(
        f"Dense block, {base.layers} layers, c0={base.channels}, k={base.growth}, "
        f"batch {base.batch}, {base.size}², float32, one dimension varied"
    )
    figure.savefig(path, dpi=110)


def write(found: Sequence[Sample], conditions: Json, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "growth.md").write_text(markdown(found, conditions), encoding="utf-8")
    rows = {"conditions": conditions, "samples": [asdict(s) for s in found]}
    (folder / "growth.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    chart(found, folder / "growth.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="write to docs/results/ too")
    folders = [OUT, *([RESULTS] if parser.parse_args().publish else [])]
    conditions = provenance()
    found = samples()
    for folder in folders:
        write(found, conditions, folder)
    print(markdown(found, conditions))


if __name__ == "__main__":
    main()
