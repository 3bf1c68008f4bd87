"""Tables of a run on a GPU, from its JSON alone, and the pictures of charts.py.

python -m benchmarks.gpu.report docs/results/gpu.json    # writes gpu.md and PNGs beside it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

from benchmarks.cases import NAIVE, NAIVE_CHANNELS_LAST
from benchmarks.gpu.charts import draw_all
from benchmarks.provenance import Json
from benchmarks.report import aligned

MIB = 2**20
NAIVE_NAME, CHANNELS_LAST_NAME, GRAPHED_NAME = map(
    str, (NAIVE, NAIVE_CHANNELS_LAST, replace(NAIVE_CHANNELS_LAST, graphs=True))
)
COMPILED = "torch.compile"
NOT_MEASURED = "not measured"
GOALS = {"time / naive c.l.": 0.60, "time / compiled": 0.85, "peak / naive c.l.": 1 / 6}
"""What DenseNet-121 in bf16 should take at most, of the naive network in channels_last."""

Table = Sequence[Sequence[str]]


def json_name(rehearsal: bool) -> str:
    """A rehearsal never writes what a GPU has written."""
    return "rehearsal.json" if rehearsal else "gpu.json"


def markdown(found: Json) -> str:
    """Conditions, goals, and every part of a run in order with what became of it."""
    device = found["conditions"]["device"]
    title = f"Measured on {device}"
    if found["rehearsal"]:
        title = f"Rehearsal on {device}: no GPU, and the numbers mean nothing"
    conditions = "\n".join(f"- {name}: {value}" for name, value in found["conditions"].items())
    overview = [("part", "s", "at most s", "status")]
    for part in found["parts"]:
        times = (f"{part['seconds']:.0f}", f"{part['allowance']:.0f}")
        overview.append((part["name"], *times, part["status"]))
    sections = [
        f"# {title}",
        conditions,
        "## Goals",
        aligned(goals(found)),
        "## Parts",
        aligned(overview),
        *map(section, found["parts"]),
    ]
    return "\n\n".join(sections) + "\n"


def goals(found: Json) -> Table:
    """Of each case the faster of ours, against the naive network; goals that are missed in bold."""
    named = [f"{name} (goal {goal:.2f})" for name, goal in GOALS.items()]
    rows = [("case", "faster of ours", "ms", *named)]
    for part in found["parts"]:
        if part["result"] and part["result"]["kind"] == "bench":
            rows.append(_goal_row(part["result"]))
    return rows if len(rows) > 1 else [*rows, ("", NOT_MEASURED, "", "", "", "")]


def _goal_row(result: Json) -> tuple[str, ...]:
    timed = {row["name"]: row for row in result["rows"] if row["seconds"]}
    ours = min(filter(is_ours, timed), key=lambda name: _time(timed[name]), default=None)
    if ours is None:
        return (result["case"], NOT_MEASURED, "", "", "", "")
    found = _ratios(timed[ours], timed)
    cells = []
    for name, goal in GOALS.items():
        ratio = f"{found[name]:.2f}" if name in found else ""
        cells.append(f"**{ratio}**" if name in found and found[name] > goal else ratio)
    return (result["case"], ours, milliseconds(timed[ours]["seconds"]), *cells)


def section(part: Json) -> str:
    """One part: its tables, and why they are not there or not whole."""
    lines = [f"## {part['name']}"]
    if part["status"] != "ok":
        lines.append(f"**{part['status']}**: {last_line(part['error'])}")
    result = part["result"]
    if result is None:
        lines.append(NOT_MEASURED)
    else:
        lines += [aligned(table) for table in TABLES[result["kind"]](result) if len(table) > 1]
    return "\n\n".join(lines)


def last_line(error: str | None) -> str:
    """Of a traceback, the error itself."""
    return ((error or "").strip().splitlines() or [""])[-1]


def tests_tables(result: Json) -> list[Table]:
    outcomes = [("outcome", "tests"), *((n, str(c)) for n, c in result["outcomes"].items())]
    failures = [("failed", "message")]
    for failure in result["failures"]:
        failures.append((failure["test"], _cell(last_line(failure["error"]))))
    return [outcomes, failures]


def training_tables(result: Json) -> list[Table]:
    rows = [("network", "first loss", "last loss", "note")]
    for row in result["rows"]:
        losses = row.get("losses")
        ends = (f"{losses[0]:.4f}", f"{losses[-1]:.4f}") if losses else ("", "")
        rows.append((row["name"], *ends, row["failure"] or ""))
    return [rows]


def memory_tables(result: Json) -> list[Table]:
    counted = ("requested", "allocated", "reserved")
    sizes = [f"{name} MiB" for name in ("estimated", *counted)]
    rows = [("step", *sizes, *(f"{name} / estimated" for name in counted[:2]), "note")]
    for row in result["rows"]:
        ratios = [f"{row[n] / row['estimated']:.3f}" if n in row else "" for n in counted[:2]]
        sizes = [mib(row.get(name)) for name in ("estimated", *counted)]
        rows.append((row["name"], *sizes, *ratios, row["failure"] or ""))
    return [rows]


def bench_tables(result: Json) -> list[Table]:
    """Medians, and their ratios to the rows that were timed in the same run."""
    timed = {row["name"]: row for row in result["rows"] if row["seconds"]}
    ratios = {name: _ratios(row, timed) for name, row in timed.items()}
    columns = list(dict.fromkeys(key for row in ratios.values() for key in row))
    header = (
        "competitor",
        "ms (quartiles)",
        "per second",
        "busy",
        "kept MiB",
        "peak MiB",
        *columns,
        "note",
    )
    rows: list[tuple[str, ...]] = [header]
    for row in result["rows"]:
        if row["name"] not in timed:
            blanks = [""] * (len(header) - 2)
            rows.append((row["name"], *blanks, _cell(row["failure"] or NOT_MEASURED)))
            continue
        own, busy = ratios[row["name"]], row["busy"]
        rows.append(
            (
                row["name"],
                milliseconds(row["seconds"]),
                f"{result['batch'] / _time(row):.0f}",
                "" if busy is None else f"{busy:.0%}",
                mib(row["kept"] or None),
                mib(row["peak"] or None),
                *(f"{own[name]:.2f}" if name in own else "" for name in columns),
                _note(row, own),
            )
        )
    return [rows]


def _ratios(row: Json, timed: dict[str, Json]) -> dict[str, float]:
    """Of a row's time and peak to those of the naive rows, as far as those were measured."""
    compiled = next((name for name in timed if COMPILED in name and not is_ours(name)), None)
    others = {"naive": NAIVE_NAME, "naive c.l.": CHANNELS_LAST_NAME, "graphed": GRAPHED_NAME}
    others["compiled"] = compiled
    found = {
        f"time / {short}": _time(row) / _time(timed[name])
        for short, name in others.items()
        if name in timed
    }
    if CHANNELS_LAST_NAME in timed and row["peak"]:
        found["peak / naive c.l."] = row["peak"] / timed[CHANNELS_LAST_NAME]["peak"]
    return found


def _note(row: Json, ratios: dict[str, float]) -> str:
    """Where ours is beaten, or how long compiling took."""
    if COMPILED in row["name"]:
        return f"first step {row['first_seconds']:.0f} s"
    lost = [name for name, ratio in ratios.items() if ratio > 1.0]
    return "LOSES: " + ", ".join(lost) if is_ours(row["name"]) and lost else ""


def is_ours(name: str) -> bool:
    return name.startswith(("norm", "bottleneck"))


def operations_tables(result: Json) -> list[Table]:
    """Of each implementation the median, and how near the fastest comes to the ceilings."""
    copied, multiplied = result["copied"], result["multiplied"]
    names = list(dict.fromkeys(n for row in result["rows"] for n in row.get("seconds", ())))
    header = ("operation", *(f"{name} µs" for name in names), "fastest", "GB/s", "TFLOP/s")
    ceiling = ("a large copy, a large bf16 product", *[""] * (len(names) + 1))
    rows: list[tuple[str, ...]] = [(*header, "largest difference", "note")]
    rows.append((*ceiling, f"{copied / 1e9:.0f}", f"{multiplied / 1e12:.1f}", "", ""))
    for row in result["rows"]:
        times = {name: median(seconds) for name, seconds in row.get("seconds", {}).items()}
        cells = [f"{times[name] * 1e6:.0f}" if name in times else "" for name in names]
        fastest = min(times, key=lambda name: times[name], default=None)
        rates = ("", "", "")
        if fastest is not None:
            moved, done = row["bytes"] / times[fastest], row["flops"] / times[fastest]
            rates = (fastest, f"{moved / 1e9:.0f}", f"{done / 1e12:.1f}" if done else "")
        difference = max(row.get("differences", {}).values(), default=None)
        largest = "" if difference is None else f"{difference:.1e}"
        rows.append((row["name"], *cells, *rates, largest, _cell(row["failure"] or "")))
    tiles = [("fastest tile for", "rows", "columns", "depth", "warps", "stages")]
    for key, tile in result.get("tiles", {}).items():
        tiles.append((key, *(str(tile[name]) for name in tiles[0][1:])))
    return [rows, tiles]


def launches_tables(result: Json) -> list[Table]:
    rows = [("launches of a layer", "forward", "backward", "note")]
    found: list[Table] = [rows]
    for row in result["rows"]:
        counts = [row.get(f"{way}_per_layer") for way in ("forward", "backward")]
        cells = ["" if count is None else f"{count:.1f}" for count in counts]
        rows.append((row["name"], *cells, row["failure"] or ""))
        kernels = [
            (_cell(kernel["name"]), str(kernel["count"]), f"{kernel['microseconds']:.0f}")
            for kernel in row.get("kernels", ())
        ]
        found.append([(f"kernels of a step: {row['name']}", "count", "µs"), *kernels])
    return found


def plans_tables(result: Json) -> list[Table]:
    found = []
    for question, fits in result["questions"].items():
        rows = [(question, "planned", "estimated MiB", "reserve MiB")]
        for mode, fit in fits.items():
            rows.append((mode, str(fit["largest"]), mib(fit["peak"]), mib(fit["reserve"])))
        found.append(rows)
    return found


def limit_tables(result: Json) -> list[Table]:
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
        ran = {t["size"]: t["peak"] for t in row["tries"] if t["peak"] is not None}
        failed = [t["size"] for t in row["tries"] if t["peak"] is None]
        largest = max(ran, default=None)
        rows.append(
            (
                row["mode"],
                str(row["planned"]["largest"]),
                mib(row["planned"]["peak"]),
                "" if largest is None else str(largest),
                mib(ran.get(largest)),
                str(min(failed, default="")),
            )
        )
    return [rows]


TABLES: dict[str, Callable[[Json], list[Table]]] = {
    "tests": tests_tables,
    "training": training_tables,
    "memory": memory_tables,
    "bench": bench_tables,
    "operations": operations_tables,
    "launches": launches_tables,
    "plans": plans_tables,
    "limit": limit_tables,
}
"""What makes the tables of a result, by its kind."""


def _time(row: Json) -> float:
    return median(row["seconds"])


def mib(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:,.1f}"


def milliseconds(seconds: Sequence[float]) -> str:
    """Median and middle half."""
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    digits = 2 if median(seconds) < 0.1 else 0
    own, low, high = (f"{s * 1e3:.{digits}f}" for s in (median(seconds), low, high))
    return f"{own} ({low}–{high})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write(source: Path) -> None:
    """Write the tables and the pictures beside ``source``, under its name."""
    found = json.loads(source.read_text(encoding="utf-8"))
    pictures = [f"![{path.stem}]({path.name})" for path in draw_all(found, source)]
    text = "\n\n".join([markdown(found).strip(), *pictures]) + "\n"
    source.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
