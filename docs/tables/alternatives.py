"""Peak against time of every way to train: tables of docs/benchmarks.md, and their picture."""

from __future__ import annotations

from pathlib import Path
from statistics import median, quantiles

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.palette import colour_of
from docs.tables.fit import finish, frontier
from docs.tables.markdown import MIB, Found, conditions, origin, results, table

MARKERS = {
    "channels_last": "s",
    "0.8": "^",
    "0.5": "v",
    "0.2": "<",
    "per layer": "D",
}
"""By what a name has in it, beside its colour."""


def tables() -> str:
    """The picture, and a table for each network."""
    found = tables_of(results("alternatives"))
    return f"![peak against time of every way to train](results/alternatives.png)\n\n{found}"


def tables_of(found: Found) -> str:
    header = ("", "peak MiB", "/ naive", "ms (quartiles)", "/ naive", "")
    parts = []
    for network in found["networks"]:
        naive = next(row for row in network["rows"] if row["name"] == "naive")
        lines = [_line(row, naive) for row in network["rows"]]
        parts.append(f"{network['name']}:\n\n{table(header, lines)}")
    return "\n\n".join([*parts, origin("alternatives", found)])


def _line(row: Found, naive: Found) -> tuple[str, ...]:
    notes = "; ".join([row["failure"]] if row["failure"] else row["notes"])
    if not row["seconds"]:
        return row["name"], "", "", "", "", notes
    low, _, high = quantiles(row["seconds"], n=4, method="inclusive")
    ms = 1e3 * median(row["seconds"])
    return (
        *(row["name"], f"{row['peak'] / MIB:,.0f}", f"{row['peak'] / naive['peak']:.2f}"),
        f"{ms:,.0f} ({1e3 * low:,.0f}–{1e3 * high:,.0f})",
        *(f"{ms / (1e3 * median(naive['seconds'])):.2f}", notes),
    )


def picture(path: Path) -> None:
    """Peak against time; the line joins those that none beats in both."""
    draw(results("alternatives"), path)


def draw(found: Found, path: Path) -> None:
    networks = found["networks"]
    figure = Figure(figsize=(5 * len(networks), 5.6), layout="constrained")
    columns = figure.subplots(1, len(networks), squeeze=False)[0]
    entries = {}
    for axes, network in zip(columns, networks, strict=True):
        _draw(axes, network)
        entries |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        "One training step in every way (float32, SGD with momentum; hollow: wrong with dropout, "
        f"or another computation), measured on\n{conditions(found)}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, network: Found) -> None:
    rows = [row for row in network["rows"] if row["seconds"]]
    points = {row["name"]: (row["peak"] / MIB, 1e3 * median(row["seconds"])) for row in rows}
    sound = {row["name"] for row in rows if _is_sound(row)}
    best = frontier([points[name] for name in points if name in sound])
    axes.plot(*zip(*best, strict=True), color="#111827", linewidth=0.8, zorder=1)
    for name, (peak, ms) in points.items():
        colour = colour_of(name)
        marker = next((m for part, m in MARKERS.items() if part in name), "o")
        face = colour if name in sound else "none"
        label = "fit_, its mixes" if name.startswith("fit_") else name
        axes.scatter(peak, ms, marker=marker, s=45, facecolor=face, edgecolor=colour, label=label)
    finish(axes, network["name"], list(points.values()))


def _is_sound(row: Found) -> bool:
    """Whether it computes what the naive network does, dropout included."""
    return row["exact"] and not any("WRONG" in note for note in row["notes"])
