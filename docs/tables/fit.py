"""The fastest mixes of modes: tables of docs/memory.md, and the picture of peak against time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.palette import colour_of
from docs.tables.markdown import MIB, Found, conditions, origin, results, table


def tables() -> str:
    """The picture, and a table for each network."""
    found = tables_of(results("fit"))
    return f"![peak against time of mixes of modes](results/fit.png)\n\n{found}"


def tables_of(found: Found) -> str:
    header = ("", "budget", "peak", "ms", "quartiles", "/ best uniform that fits", "modes")
    parts = []
    for network in found["networks"]:
        rows = [_row(each, network["candidates"]) for each in network["candidates"]]
        parts.append(f"{network['name']}, peaks and budgets in MiB:\n\n{table(header, rows)}")
    return "\n\n".join([*parts, origin("fit", found)])


def _row(candidate: Found, every: Sequence[Found]) -> list[str]:
    budget, seconds = candidate["budget"], candidate["seconds"]
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    ratio = ""
    if budget is not None:
        fitting = [c for c in every if c["budget"] is None and c["peak"] <= budget]
        best = min(fitting, key=lambda c: median(c["seconds"]), default=None)
        if best is not None:
            ratio = f"{median(seconds) / median(best['seconds']):.2f} ({best['name']})"
    counts = Counter(candidate["modes"].values())
    return [
        candidate["name"],
        "" if budget is None else f"{budget / MIB:,.1f}",
        f"{candidate['peak'] / MIB:,.1f}",
        f"{1000 * median(seconds):,.0f}",
        f"{1000 * low:,.0f} to {1000 * high:,.0f}",
        ratio,
        "" if budget is None else ", ".join(f"{n} {mode}" for mode, n in counts.items()),
    ]


def picture(path: Path) -> None:
    """Peak against time of every candidate; the line joins the mixes that no mix beats in both."""
    draw(results("fit"), path)


def draw(found: Found, path: Path) -> None:
    networks = found["networks"]
    figure = Figure(figsize=(5 * len(networks), 4.8), layout="constrained")
    columns = figure.subplots(1, len(networks), squeeze=False)[0]
    entries = {}
    for axes, network in zip(columns, networks, strict=True):
        _draw(axes, network)
        entries |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(
        f"One training step (float32, SGD with momentum) in mixes of modes, measured on\n"
        f"{conditions(found)}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, network: Found) -> None:
    points = {
        c["name"]: (c["peak"] / MIB, 1000 * median(c["seconds"])) for c in network["candidates"]
    }
    for name, point in points.items():
        is_mix = name.startswith("mix")
        label = "mixes that fit_ chose" if is_mix else name
        axes.scatter(*point, marker="o" if is_mix else "s", color=colour_of(name), label=label)
    mixes = [point for name, point in points.items() if name.startswith("mix")]
    axes.plot(*zip(*frontier(mixes), strict=True), color=colour_of("mix"), linewidth=1)
    finish(axes, network["name"], list(points.values()))


def finish(axes: Axes, title: str, points: Sequence[tuple[float, float]]) -> None:
    """Linear axes from zero on, for peaks and times."""
    furthest, highest = (1.08 * max(values) for values in zip(*points, strict=True))
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set(xlabel="peak of a training step, MiB", ylabel="time, ms")
    axes.set(xlim=(0, furthest), ylim=(0, highest))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those points, by the first number, that no other is below in both."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept
