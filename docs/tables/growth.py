"""docs/results/growth.md and its picture: cost as a block grows, and the fitted exponents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.cases import FLOOR
from benchmarks.growth import AXES, Sample
from benchmarks.palette import colour_of, line_of
from docs.tables.markdown import MIB, Found, conditions, origin, results, table

NAMES = {"layers": "layers L", "batch": "batch", "growth": "growth rate k", "size": "image side"}
POSITIONS = "size"
"""The axis of which the square, the positions of an image, is what a cost may be linear in."""
MEASURES = {"kept": "kept, MiB", "peak": "peak, MiB", "seconds": "time, ms"}


def samples_of(found: Found) -> list[Sample]:
    return [Sample(**sample) for sample in found["samples"]]


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


def page() -> str:
    """The exponents, then every point."""
    return page_of(results("growth"))


def page_of(found: Found) -> str:
    samples = samples_of(found)
    base = ", ".join(f"{name} {value}" for name, value in found["base"].items())
    parts = [
        "# Cost as a block grows",
        f"A dense block of bottleneck layers ({base}), one of its dimensions varied. "
        "An exponent p says that the cost grows as the dimension to the power of p.",
        "## Exponents",
        _exponent_table(samples),
        "## Every point",
        *(f"### {NAMES[axis]}\n\n{_point_table(samples, axis)}" for axis in AXES),
        origin("growth", found),
    ]
    return "\n\n".join(parts)


def _exponent_table(found: Sequence[Sample]) -> str:
    header = ["competitor", *(f"{NAMES[a]}: {m}" for a in AXES for m in ("kept", "peak", "time"))]
    rows = []
    for competitor in competitors(found):
        cells = []
        for axis in AXES:
            known = exponents(found, axis, competitor) if series(found, axis, competitor) else {}
            cells += [f"{known[m]:.2f}" if m in known else "" for m in MEASURES]
        rows.append([competitor, *cells])
    return table(header, rows)


def _point_table(found: Sequence[Sample], axis: str) -> str:
    header = ["competitor", *(f"{m} at {v}" for m in MEASURES.values() for v in AXES[axis])]
    rows = []
    for competitor in competitors(found):
        at = {s.value: s for s in series(found, axis, competitor)}
        rows.append([competitor, *(_cell(at.get(v), m) for m in MEASURES for v in AXES[axis])])
    return table(header, rows)


def _cell(sample: Sample | None, measure: str) -> str:
    if sample is None or (measure != "seconds" and sample.competitor == str(FLOOR)):
        return ""
    return f"{_shown(sample, measure):.1f}"


def _shown(sample: Sample, measure: str) -> float:
    return sample.seconds * 1e3 if measure == "seconds" else getattr(sample, measure) / MIB


def _place(axis: str, value: int) -> int:
    return value**2 if axis == POSITIONS else value


def picture(path: Path) -> None:
    """Peak and time against every dimension, as PNG."""
    made_of = results("growth")
    found = samples_of(made_of)
    figure = Figure(figsize=(14, 7), layout="constrained")
    axes = figure.subplots(2, len(AXES), sharey="row")
    for column, axis in enumerate(AXES):
        for row, measure in enumerate(("peak", "seconds")):
            panel = axes[row][column]
            for competitor in competitors(found):
                if measure == "peak" and competitor == str(FLOOR):
                    continue
                along = series(found, axis, competitor)
                panel.plot(
                    [_place(axis, s.value) for s in along],
                    [_shown(s, measure) for s in along],
                    line_of(competitor),
                    color=colour_of(competitor),
                    marker="o",
                    markersize=3,
                    label=competitor,
                )
            names = [f"{v}²" if axis == POSITIONS else str(v) for v in AXES[axis]]
            panel.set_xticks([_place(axis, v) for v in AXES[axis]], names)
            panel.set(xlim=(0, None), ylim=(0, None))
            panel.set_xlabel("positions of an image" if axis == POSITIONS else NAMES[axis])
            panel.set_ylabel(MEASURES[measure] if column == 0 else "")
            panel.grid(alpha=0.3)
    figure.legend(*axes[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    base = made_of["base"]
    figure.suptitle(
        f"Dense block, {base['layers']} layers, c0={base['channels']}, k={base['growth']}, "
        f"batch {base['batch']}, {base['size']}², float32, one dimension varied, "
        f"measured on\n{conditions(made_of)}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=110)
