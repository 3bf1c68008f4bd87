"""The suite's report: tables that are Markdown and read well in a terminal, and rows for JSON."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cases import FLOOR, NAIVE, NAIVE_CHANNELS_LAST, NAIVE_COMPILED, Competitor
from benchmarks.goals import table as table_of_goals
from benchmarks.instruments import Row
from benchmarks.provenance import Json

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
TIMED_AGAINST = {
    "time / naive": NAIVE,
    "time / naive c.l.": NAIVE_CHANNELS_LAST,
    "time / compiled": NAIVE_COMPILED,
}

Results = Sequence[dict[Competitor, Row]]


def markdown(results: Results, conditions: dict[str, str]) -> str:
    """A section for each case, the goals, and the conditions of the run."""
    tables = [f"## {name(rows)}\n\n{table(rows)}" for rows in results]
    goals = f"## Goals\n\n{aligned(filled(table_of_goals(results)))}"
    lines = "\n".join(f"- {key}: {value}" for key, value in conditions.items())
    return "\n\n".join([*tables, goals, f"## Conditions\n\n{lines}"]) + "\n"


def name(rows: dict[Competitor, Row]) -> str:
    return next(iter(rows.values())).case


def table(rows: dict[Competitor, Row]) -> str:
    return aligned(filled([HEADER, *(cells(row, rows) for row in rows.values())]))


def filled(rows: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
    """Without the columns that hold nothing beneath their head."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    return list(zip(*columns, strict=True))


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


def rows(results: Results) -> Json:
    """Everything that was measured, for JSON; bytes and seconds, each round of its own."""
    return {
        "rows": [
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
    }
