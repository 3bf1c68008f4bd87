"""The suite's report: a table that is Markdown and reads well in a terminal, JSON, and a chart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cases import (
    DEVICE,
    FLOOR,
    KINDS,
    NAIVE,
    NAIVE_CHANNELS_LAST,
    NAIVE_COMPILED,
    Competitor,
    Kind,
    make_block,
)
from benchmarks.goals import table as table_of_goals
from benchmarks.instruments import Row
from efficient_densenet.memory.report import StepReport
from efficient_densenet.memory.step import measure

MIB = 2**20
HEADER = (
    "competitor",
    "kept MiB",
    "peak MiB",
    "time ms (quartiles)",
    "kept / naive",
    "peak / naive",
    "time / naive",
    "time / naive c.l.",
    "time / compiled",
    "in convolutions",
    "note",
)
DEPTHS = range(12, 97, 12)
DEPTH_SHAPE = (8, 24, 32, 32)
GROWTH = 12

TIMED_AGAINST = {
    "time / naive": NAIVE,
    "time / naive c.l.": NAIVE_CHANNELS_LAST,
    "time / compiled": NAIVE_COMPILED,
}

Results = Sequence[dict[Competitor, Row]]


def markdown(results: Results, conditions: dict[str, str]) -> str:
    """One table per case and the conditions of the run."""
    tables = [f"### {name(rows)}\n\n{table(rows)}" for rows in results]
    goals = f"### Goals\n\n{aligned(table_of_goals(results))}"
    lines = [f"- {key}: {value}" for key, value in conditions.items()]
    return "\n\n".join([*tables, goals, "Conditions:\n\n" + "\n".join(lines)]) + "\n"


def name(rows: dict[Competitor, Row]) -> str:
    return next(iter(rows.values())).case


def table(rows: dict[Competitor, Row]) -> str:
    return aligned([HEADER, *(cells(row, rows) for row in rows.values())])


def cells(row: Row, rows: dict[Competitor, Row]) -> tuple[str, ...]:
    """The columns of :data:`HEADER`; a row without numbers says why in its note."""
    if row.failure:
        return (str(row.competitor), *[""] * (len(HEADER) - 2), row.failure)
    low, high = row.quartiles
    against = ratios(row, rows)
    measured = row.competitor != FLOOR
    return (
        str(row.competitor),
        f"{row.kept / MIB:.1f}" if measured else "",
        f"{row.peak / MIB:.1f}" if measured else "",
        f"{row.median * 1e3:.0f} ({low * 1e3:.0f}–{high * 1e3:.0f})",
        *(f"{against[key]:.2f}" if key in against else "" for key in HEADER[4:9]),
        "" if row.convolution_share is None else f"{row.convolution_share:.0%}",
        note(row, against),
    )


def ratios(row: Row, rows: dict[Competitor, Row]) -> dict[str, float]:
    """Of ``row`` to the naive rows, where those have numbers; times are medians."""
    found = {}
    naive = rows[NAIVE]
    if naive.seconds and row.competitor != FLOOR:
        found["kept / naive"] = row.kept / naive.kept
        found["peak / naive"] = row.peak / naive.peak
    for key, competitor in TIMED_AGAINST.items():
        if competitor in rows and rows[competitor].seconds:
            found[key] = row.median / rows[competitor].median
    return found


def note(row: Row, against: dict[str, float]) -> str:
    """How long a row took to compile, or where one of ours is beaten."""
    if row.competitor.compiled:
        return f"compiled in {row.compile_seconds:.0f} s"
    lost = [key for key, ratio in against.items() if ratio > 1.0]
    return "LOSES: " + ", ".join(lost) if row.competitor.ours and lost else ""


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded columns, names to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = [
        "-" * width if i in (0, last) else "-" * (width - 1) + ":" for i, width in enumerate(widths)
    ]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


def as_json(results: Results, conditions: dict[str, str]) -> str:
    """Everything that was measured; bytes and seconds, each round of its own."""
    rows = [
        {
            "case": row.case,
            "competitor": str(row.competitor),
            "failure": row.failure,
            "kept_bytes": row.kept,
            "peak_bytes": row.peak,
            "operator_at_peak": row.operator,
            "share_in_convolutions": row.convolution_share,
            "first_step_seconds": row.first_seconds,
            "seconds": row.seconds,
        }
        for by_competitor in results
        for row in by_competitor.values()
    ]
    return json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n"


def depth_chart(path: Path, conditions: dict[str, str]) -> None:
    """Measure a training step of ever deeper blocks, and draw its memory, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    kept_axes, peak_axes = figure.subplots(1, 2)
    for kind in KINDS:
        reports = [measured_block(kind, layers) for layers in DEPTHS]
        label = str(Competitor(kind))
        kept_axes.plot(DEPTHS, [r.kept / MIB for r in reports], marker="o", label=label)
        peak_axes.plot(DEPTHS, [r.peak.step / MIB for r in reports], marker="o", label=label)
    for axes, title in ((kept_axes, "kept after the forward pass"), (peak_axes, "peak of a step")):
        axes.set(title=title, xlabel="layers", ylabel="MiB, log scale", yscale="log", xticks=DEPTHS)
        axes.grid(alpha=0.3)
    figure.legend(*peak_axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    batch, channels, size, _ = DEPTH_SHAPE
    told = ", ".join([conditions["device"], f"torch {conditions['torch']}", conditions["date"]])
    figure.suptitle(
        f"Dense block, c0={channels}, k={GROWTH}, batch {batch}, {size}², float32, "
        f"measured on {told}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=120)


def measured_block(kind: Kind, layers: int) -> StepReport:
    with DEVICE:
        model, x = make_block(kind, layers, DEPTH_SHAPE[1], GROWTH), torch.randn(DEPTH_SHAPE)
    return measure(model, x)


def write(results: Results, conditions: dict[str, str], folder: Path) -> list[Path]:
    """Write table, numbers and chart of the steps into ``folder``; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [folder / name for name in ("steps.md", "steps.json", "memory-against-depth.png")]
    table, numbers, chart = made
    table.write_text(markdown(results, conditions), encoding="utf-8")
    numbers.write_text(as_json(results, conditions), encoding="utf-8")
    depth_chart(chart, conditions)
    return made
