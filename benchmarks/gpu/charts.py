"""Pictures of a run on a GPU: steps, estimates against the allocator's count, limits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.palette import colour_of
from benchmarks.provenance import Json

if TYPE_CHECKING:  # the machine with the GPU may lack it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
HATCHES = {"eager": "//", "torch.compile": "xx"}


def draw_all(found: Json, source: Path) -> list[Path]:
    """Draw what there is to draw beside ``source``; pictures of nothing are removed."""
    paths = {name: source.with_name(f"{source.stem}-{name}.png") for name in CHARTS}
    for path in paths.values():
        path.unlink(missing_ok=True)
    if find_spec("matplotlib") is None:
        print(
            f"no matplotlib, no pictures: see benchmarks/gpu/report.py for {source}",
            file=sys.stderr,
        )
        return []
    for name, path in paths.items():
        figure = CHARTS[name](found)
        if figure is not None:
            _finish(figure, found, path)
    return [path for path in paths.values() if path.exists()]


def steps(found: Json) -> Figure:
    """Time and peak memory of every timed case."""
    results = [r for r in _results(found, "bench") if any(row["seconds"] for row in r["rows"])]
    if not results:
        return None
    heights = [1.1 + 0.24 * sum(bool(row["seconds"]) for row in r["rows"]) for r in results]
    figure = _figure(11, 0.5 + sum(heights))
    boxes = figure.subfigures(len(results), 1, squeeze=False, height_ratios=heights)[:, 0]
    for box, result in zip(boxes, results, strict=True):
        rows = [row for row in result["rows"] if row["seconds"]][::-1]
        names = [row["name"] for row in rows]
        weighed = [row["peak"] / MIB or None for row in rows]
        left, right = box.subplots(1, 2, sharey=True)
        _bars(left, names, [median(row["seconds"]) * 1e3 for row in rows], "{:.3g}")
        _bars(right, names, weighed, "{:,.4g}")
        left.set_xlabel("ms of a step", fontsize=8)
        right.set_xlabel("peak MiB", fontsize=8)
        box.suptitle(result["case"], x=0.01, ha="left", fontsize=9, weight="bold")
    return figure


def _bars(axes: Axes, names: list[str], values: Sequence[float | None], form: str) -> None:
    places = range(len(names))
    widths = [value or 0 for value in values]
    bars = axes.barh(places, widths, color=[colour_of(name) for name in names], height=0.75)
    for bar, name in zip(bars, names, strict=True):
        bar.set_hatch(next((h for key, h in HATCHES.items() if key in name), ""))
        bar.set_edgecolor("white")
    labels = ["" if value is None else form.format(value) for value in values]
    axes.bar_label(bars, labels, fontsize=8, padding=3)
    axes.set_yticks(places, names, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.margins(x=0.12)


def limits(found: Json) -> Figure:
    """What ran within the budget, and what was planned."""
    results = _results(found, "limit")
    if not any(row["tries"] for result in results for row in result["rows"]):
        return None
    figure = _figure(6.5 * len(results), 3.6)
    for axes, result in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results, strict=True
    ):
        rows = result["rows"]
        ran = [
            max([t["size"] for t in row["tries"] if t["peak"] is not None], default=0)
            for row in rows
        ]
        places = range(len(rows))
        bars = axes.bar(places, ran, color=[colour_of(row["mode"]) for row in rows], width=0.7)
        axes.bar_label(bars, fontsize=9, padding=2)
        planned = [row["planned"]["largest"] for row in rows]
        axes.scatter(places, planned, marker="_", s=900, color="black", label="planned")
        axes.set_xticks(places, [row["mode"] for row in rows])
        axes.set_title(result["question"], loc="left", fontsize=9)
        axes.set_ylabel(f"{result['varies']} that ran")
        axes.margins(y=0.15)
        axes.legend(frameon=False, loc="upper left", markerscale=0.4)
    return figure


def estimates(found: Json) -> Figure:
    """What the allocator counted over what was estimated."""
    rows = [r for result in _results(found, "memory") for r in result["rows"] if "allocated" in r]
    if not rows:
        return None
    figure = _figure(9, 1.4 + 0.42 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))[::-1]
    for name, marker in (("requested", "o"), ("allocated", "x")):
        ratios = [row[name] / row["estimated"] for row in rows]
        axes.scatter(ratios, places, marker=marker, color="#2563eb", label=name)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(places, [row["name"] for row in rows], fontsize=8)
    axes.set_xlabel("peak / estimated peak")
    axes.legend(frameon=False)
    return figure


CHARTS = {"steps": steps, "estimate": estimates, "limit": limits}


def _results(found: Json, kind: str) -> list[Json]:
    """Those of the parts that found anything of this kind."""
    return [p["result"] for p in found["parts"] if p["result"] and p["result"]["kind"] == kind]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _finish(figure: Figure, found: Json, path: Path) -> None:
    conditions = found["conditions"]
    where = [conditions["device"], f"torch {conditions['torch']}", conditions["date"]]
    first = ["REHEARSAL, NO GPU"] if found["rehearsal"] else []
    figure.suptitle(", ".join([*first, *where, conditions["commit"]]), fontsize=9)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
