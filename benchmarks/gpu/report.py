"""Tables and pictures of a run on a GPU, from its JSON alone.

python -m benchmarks.gpu.report docs/results/gpu.json    # writes gpu.md and PNGs beside it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.cases import FLOOR, NAIVE, NAIVE_CHANNELS_LAST
from benchmarks.report import aligned

JSON = "gpu.json"
MIB, GIB = 2**20, 2**30
FLOOR_NAME, BASES = str(FLOOR), {"naive": str(NAIVE), "naive c.l.": str(NAIVE_CHANNELS_LAST)}
NOT_MEASURED = "not measured"
COLOURS = {
    "naive": "#8a94a6",
    "torchvision": "#b08900",
    "norm": "#2563eb",
    "bottleneck": "#c2410c",
    "checkpointed": "#b08900",
    "(": "#111827",
}
HATCHES = {"eager": "//", "torch.compile": "xx"}

Table = Sequence[Sequence[str]]


def markdown(found: dict[str, Any]) -> str:
    """Every part of a run in order, with what became of it, and the conditions."""
    title = "Rehearsal: the numbers mean nothing" if found["rehearsal"] else "Measured on a GPU"
    conditions = "\n".join(f"- {name}: {value}" for name, value in found["conditions"].items())
    overview = [("part", "s", "allowed s", "status")]
    for part in found["parts"]:
        times = (f"{part['seconds']:.0f}", f"{part['allowance']:.0f}")
        overview.append((part["name"], *times, part["status"]))
    sections = [f"# {title}", conditions, aligned(overview), *map(section, found["parts"])]
    return "\n\n".join(sections) + "\n"


def section(part: dict[str, Any]) -> str:
    """One part: its tables, and why they are not there or not whole."""
    lines = [f"## {part['name']}"]
    if part["status"] != "ok":
        lines.append(f"**{part['status']}**: {last_line(part['error'])}")
    result = part["result"]
    if result is None:
        lines.append(NOT_MEASURED)
    else:
        lines += [aligned(table) for table in tables(result) if len(table) > 1]
    return "\n\n".join(lines)


def last_line(error: str | None) -> str:
    """Of a traceback, the error itself."""
    return ((error or "").strip().splitlines() or [""])[-1]


def tables(result: dict[str, Any]) -> list[Table]:
    """Those of a part's result, by what it holds."""
    for key, make in TABLES.items():
        if key in result:
            return make(result)
    return [plan_table(question, fits) for question, fits in result.items()]


def tests_tables(result: dict[str, Any]) -> list[Table]:
    outcomes = [("outcome", "tests"), *((n, str(c)) for n, c in result["outcomes"].items())]
    failures = [("failed", "message")]
    for failure in result["failures"]:
        failures.append((failure["test"], last_line(failure["error"]).replace("|", "\\|")))
    return [outcomes, failures]


def training_tables(result: dict[str, Any]) -> list[Table]:
    rows = [("network", "first loss", "last loss", "note")]
    for row in result["rows"]:
        losses = row.get("losses")
        ends = (f"{losses[0]:.4f}", f"{losses[-1]:.4f}") if losses else ("", "")
        rows.append((row["name"], *ends, row["failure"] or ""))
    return [rows]


def memory_tables(result: dict[str, Any]) -> list[Table]:
    rows = [
        (
            "step",
            "estimated MiB",
            "requested MiB",
            "allocated MiB",
            "requested / estimated",
            "allocated / estimated",
            "note",
        )
    ]
    for row in result["rows"]:
        sizes = [row.get(name) for name in ("estimated", "requested", "allocated")]
        estimated = sizes[0]
        rows.append(
            (
                row["name"],
                *(mib(size) for size in sizes),
                *(f"{size / estimated:.3f}" if size else "" for size in sizes[1:]),
                row["failure"] or "",
            )
        )
    return [rows]


def step_tables(result: dict[str, Any]) -> list[Table]:
    """Medians, and their ratios to the rows that were timed in the same run."""
    timed = {row["name"]: row for row in result["rows"] if row["seconds"]}
    bases = {f"time / {short}": name for short, name in BASES.items() if name in timed}
    compiled = next((name for name in timed if "torch.compile" in name), None)
    if compiled:
        bases["time / compiled"] = compiled
    naive = timed.get(BASES["naive c.l."])
    header = (
        "competitor",
        "ms (quartiles)",
        "per second",
        "kept MiB",
        "peak MiB",
        "peak / naive c.l.",
        *bases,
        "in convolutions",
        "note",
    )
    rows: list[tuple[str, ...]] = [header]
    for row in result["rows"]:
        if row["name"] not in timed:
            blanks = [""] * (len(header) - 2)
            rows.append((row["name"], *blanks, row["failure"] or NOT_MEASURED))
            continue
        own, floor = median(row["seconds"]), row["name"] == FLOOR_NAME
        ratios = [own / median(timed[name]["seconds"]) for name in bases.values()]
        rows.append(
            (
                row["name"],
                milliseconds(row["seconds"]),
                f"{result['batch'] / own:.0f}",
                "" if floor else mib(row["kept"]),
                "" if floor else mib(row["peak"]),
                "" if floor or naive is None else f"{row['peak'] / naive['peak']:.2f}",
                *(f"{ratio:.2f}" for ratio in ratios),
                f"{row['convolution_share']:.0%}",
                step_note(row, dict(zip(bases, ratios, strict=True))),
            )
        )
    return [rows]


def step_note(row: dict[str, Any], ratios: dict[str, float]) -> str:
    """Where ours is beaten, or how long compiling took."""
    if "torch.compile" in row["name"]:
        return f"first step {row['first_seconds']:.0f} s"
    lost = [name for name, ratio in ratios.items() if ratio > 1.0]
    ours = row["name"].startswith(("norm", "bottleneck"))
    return "LOSES: " + ", ".join(lost) if ours and lost else ""


def launches_tables(result: dict[str, Any]) -> list[Table]:
    rows = [("competitor", "forward", "backward", "note")]
    found: list[Table] = [rows]
    for row in result["rows"]:
        counts = [row.get(f"{way}_per_layer") for way in ("forward", "backward")]
        told = ["" if count is None else f"{count:.1f}" for count in counts]
        rows.append((row["name"], *told, row["failure"] or ""))
        kernels = [
            (
                kernel["name"].replace("|", "\\|"),
                str(kernel["count"]),
                f"{kernel['microseconds']:.0f}",
            )
            for kernel in row.get("kernels", ())
        ]
        found.append([(f"kernels of a step: {row['name']}", "count", "µs"), *kernels])
    return found


def limit_tables(result: dict[str, Any]) -> list[Table]:
    rows = [
        (
            "mode",
            f"planned {result['varies']}",
            "estimated MiB",
            "largest that ran",
            "peak MiB",
            "smallest that did not",
        )
    ]
    for row in result["rows"]:
        ran = [t for t in row["tries"] if t["peak"] is not None]
        failed = [t for t in row["tries"] if t["peak"] is None]
        rows.append(
            (
                row["mode"],
                str(row["planned"]["largest"]),
                mib(row["planned"]["peak"]),
                str(ran[-1]["size"]) if ran else "",
                mib(ran[-1]["peak"]) if ran else "",
                str(failed[0]["size"]) if failed else "",
            )
        )
    return [rows]


def plan_table(question: str, fits: dict[str, Any]) -> Table:
    rows = [(question, "planned", "estimated MiB", "reserve MiB")]
    for mode, fit in fits.items():
        rows.append((mode, str(fit["largest"]), mib(fit["peak"]), mib(fit["reserve"])))
    return rows


TABLES: dict[str, Callable[[dict[str, Any]], list[Table]]] = {
    "outcomes": tests_tables,
    "learning_rate": training_tables,
    "errors_of_naive": step_tables,
    "layers": launches_tables,
    "question": limit_tables,
    "rows": memory_tables,
}
"""What makes the tables of a result, by a key that only such results have; in this order."""


def mib(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:,.1f}"


def milliseconds(seconds: Sequence[float]) -> str:
    """Median and middle half."""
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    digits = 2 if median(seconds) < 0.1 else 0
    own, low, high = (f"{s * 1e3:.{digits}f}" for s in (median(seconds), low, high))
    return f"{own} ({low}–{high})"


def steps_chart(found: dict[str, Any], path: Path) -> bool:
    """Draw time and peak memory of every timed case, each beside its naive row; false if none."""
    results = [
        p["result"]
        for p in found["parts"]
        if p["result"] and any(row.get("seconds") for row in p["result"].get("rows", ()))
    ]
    if not results:
        return False
    heights = [_height(result) for result in results]
    figure = _figure((11, 0.5 + sum(heights)))
    boxes = figure.subfigures(len(results), 1, squeeze=False, height_ratios=heights)[:, 0]
    for box, result in zip(boxes, results, strict=True):
        rows = [row for row in result["rows"] if row["seconds"]][::-1]
        names = [row["name"] for row in rows]
        weighed = [None if row["name"] == FLOOR_NAME else row["peak"] / MIB for row in rows]
        left, right = box.subplots(1, 2, sharey=True)
        _bars(left, names, [median(row["seconds"]) * 1e3 for row in rows], "{:.3g}")
        _bars(right, names, weighed, "{:,.4g}")
        left.set_xlabel("ms of a step", fontsize=8)
        right.set_xlabel("peak MiB", fontsize=8)
        box.suptitle(result["case"], x=0.01, ha="left", fontsize=9, weight="bold")
    _finish(figure, found, path)
    return True


def _height(result: dict[str, Any]) -> float:
    return 1.1 + 0.24 * sum(bool(row["seconds"]) for row in result["rows"])


def _bars(axes: Any, names: list[str], values: Sequence[float | None], form: str) -> None:
    places = range(len(names))
    widths = [value or 0 for value in values]
    bars = axes.barh(places, widths, color=[_colour(name) for name in names], height=0.75)
    for bar, name in zip(bars, names, strict=True):
        bar.set_hatch(next((h for key, h in HATCHES.items() if key in name), ""))
        bar.set_edgecolor("white")
    labels = ["" if value is None else form.format(value) for value in values]
    axes.bar_label(bars, labels, fontsize=8, padding=3)
    axes.set_yticks(places, names, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.margins(x=0.12)


def limit_chart(found: dict[str, Any], path: Path) -> bool:
    """Draw what ran within the budget, and what was planned; false if nothing was tried."""
    results = [p["result"] for p in found["parts"] if p["result"] and "question" in p["result"]]
    if not any(row["tries"] for result in results for row in result["rows"]):
        return False
    figure = _figure((6.5 * len(results), 3.6))
    for axes, result in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results, strict=True
    ):
        rows = result["rows"]
        ran = [
            max([t["size"] for t in row["tries"] if t["peak"] is not None], default=0)
            for row in rows
        ]
        places = range(len(rows))
        bars = axes.bar(places, ran, color=[_colour(row["mode"]) for row in rows], width=0.7)
        axes.bar_label(bars, fontsize=9, padding=2)
        planned = [row["planned"]["largest"] for row in rows]
        axes.scatter(places, planned, marker="_", s=900, color="black", label="planned")
        axes.set_xticks(places, [row["mode"] for row in rows])
        axes.set_title(result["question"], loc="left", fontsize=9)
        axes.set_ylabel(f"{result['varies']} that ran")
        axes.margins(y=0.15)
        axes.legend(frameon=False, loc="upper left", markerscale=0.4)
    _finish(figure, found, path)
    return True


def estimate_chart(found: dict[str, Any], path: Path) -> bool:
    """Draw what the allocator counted over what was estimated; false if it counted nothing."""
    rows = [
        row
        for part in found["parts"]
        for row in (part["result"] or {}).get("rows", ())
        if row.get("estimated") and row.get("requested")
    ]
    if not rows:
        return False
    figure = _figure((9, 1.4 + 0.42 * len(rows)))
    axes = figure.subplots()
    places = range(len(rows))[::-1]
    for name, marker in (("requested", "o"), ("allocated", "x")):
        ratios = [row[name] / row["estimated"] for row in rows]
        axes.scatter(ratios, places, marker=marker, color="#2563eb", label=name)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(places, [row["name"] for row in rows], fontsize=8)
    axes.set_xlabel("peak / estimated peak")
    axes.legend(frameon=False)
    _finish(figure, found, path)
    return True


CHARTS = {
    "gpu-steps.png": steps_chart,
    "gpu-estimate.png": estimate_chart,
    "gpu-limit.png": limit_chart,
}


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _colour(name: str) -> str:
    return next(colour for start, colour in COLOURS.items() if name.startswith(start))


def _finish(figure: Any, found: dict[str, Any], path: Path) -> None:
    conditions = found["conditions"]
    told = [conditions[name] for name in ("device", "date", "commit")]
    rehearsal = ["REHEARSAL"] if found["rehearsal"] else []
    figure.suptitle(", ".join([*rehearsal, f"torch {conditions['torch']}", *told]), fontsize=9)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def write(source: Path) -> None:
    """Write ``gpu.md`` and the pictures beside ``source``; pictures of nothing are removed."""
    found = json.loads(source.read_text(encoding="utf-8"))
    pictures = []
    for name, draw in CHARTS.items():
        path = source.with_name(name)
        if draw(found, path):
            pictures.append(f"![{path.stem}]({name})")
        else:
            path.unlink(missing_ok=True)
    text = "\n\n".join([markdown(found).strip(), *pictures]) + "\n"
    source.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
