"""What a training step costs: the README's table, docs/results/steps.md, memory against depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.cases import COMPETITORS, FLOOR
from benchmarks.instruments import Row
from benchmarks.palette import colour_of
from benchmarks.provenance import RESULTS
from docs.tables.markdown import MIB, Found, conditions, results, table

CASES = {"deep": "48 layers, k=12, batch 8, 32²", "DenseNet-121": "DenseNet-121, batch 8, 224²"}
INSTRUCTION_SETS = ("AVX512", "AVX2")
RUNS = ("steps", "steps_avx2")
"""The suite's published runs: as the CPU is, and told to use no more than AVX2."""
PAGES = tuple(f"docs/results/{name}.md" for name in RUNS)
NAMED_DEPTH = 48
ROWS = {
    "naive": "naive",
    "naive, channels_last": "naive, channels_last",
    "naive, torch.compile": "naive, `torch.compile`",
    "torchvision memory_efficient": "torchvision, `memory_efficient=True`",
    "norm": '**ours, `recompute="norm"`**',
    "bottleneck": '**ours, `recompute="bottleneck"`**',
}


def readme() -> str:
    """Peak memory and time of one training step, for each of :data:`CASES`."""
    return readme_of([results(name) for name in RUNS if (RESULTS / f"{name}.json").exists()])


def readme_of(runs: Sequence[Found]) -> str:
    """The same of runs on several kinds of CPUs; the first one says the bytes."""
    rows = [rows_of(run) for run in runs]
    header = [""]
    for label in CASES.values():
        header += [f"{label}: peak MiB", *(f"ms, {_instructions(run)}" for run in runs)]
    kinds = [_instructions(run) for run in runs]
    claims = (_claim(CASES[name].split(",")[0], rows, name) for name in CASES)
    missing = [f"CPUs with {kind}" for kind in INSTRUCTION_SETS if kind not in kinds]
    links = [f"[{page}]({page})" for page in PAGES[: len(runs)]]
    return "\n\n".join(
        [
            "The peak of a training step, and its time beside the naive step's, on a CPU with "
            f"{' or '.join(kinds)}: {'; '.join(claims)}.",
            table(
                header,
                (
                    [label, *(cell for name in CASES for cell in _cells(rows, name, competitor))]
                    for competitor, label in ROWS.items()
                ),
            ),
            "One step, forward and backward, float32; medians of interleaved runs; bytes above "
            f"parameters and input, from the allocator. {'. '.join(map(conditions, runs))}. "
            f"**Not measured: {', '.join([*missing, 'GPUs'])}.** All rows, spreads and "
            f"conditions: {' and '.join(links)}.",
        ]
    )


def rows_of(found: Found) -> dict[tuple[str, str], Found]:
    """The rows of :data:`CASES` by case and competitor."""
    return {
        (name, row["competitor"]): row
        for name in CASES
        for row in found["rows"]
        if row["case"].startswith(name)
    }


def _instructions(found: Found) -> str:
    return found["conditions"]["instruction set"].split()[0]


def _claim(label: str, runs: Sequence[dict[tuple[str, str], Found]], name: str) -> str:
    peaks = [f"{_peak(runs[0][name, kind])}" for kind in ("naive", "norm", "bottleneck")]
    norm, least = (" or ".join(_ratios(runs, name, kind)) for kind in ("norm", "bottleneck"))
    return (
        f"**{label}: {peaks[0]} → {peaks[2]} MiB**, {least} of the time "
        f'(`"norm"`: {peaks[1]} MiB, {norm})'
    )


def _ratios(
    runs: Sequence[dict[tuple[str, str], Found]], name: str, competitor: str
) -> Iterator[str]:
    for rows in runs:
        ours, naive = (median(rows[name, c]["seconds"]) for c in (competitor, "naive"))
        yield f"{ours / naive:.2f}"


def _cells(
    runs: Sequence[dict[tuple[str, str], Found]], name: str, competitor: str
) -> Iterator[str]:
    found = [rows.get((name, competitor)) for rows in runs]
    yield _peak(found[0]) if found[0] and not found[0]["failure"] else ""
    for row in found:
        yield f"{median(row['seconds']) * 1e3:.0f}" if row and row["seconds"] else ""


def _peak(row: Found) -> str:
    return f"{row['peak_bytes'] / MIB:,.0f}"


def page() -> str:
    """Every row, as the suite reports it in a terminal."""
    return page_of(results("steps"))


def page_avx2() -> str:
    """The same with AVX2 alone."""
    return page_of(results("steps_avx2"))


def page_of(found: Found) -> str:
    """The page of one run."""
    cases = report.markdown(cases_of(found), found["conditions"])
    return f"# Time and memory of a training step, {_instructions(found)}\n\n{cases}"


def cases_of(found: Found) -> report.Results:
    """The rows as they were before they were written, case by case."""
    competitors = {str(competitor): competitor for competitor in (*COMPETITORS, FLOOR)}
    cases: dict[str, dict] = {}
    for row in found["rows"]:
        competitor = competitors[row["competitor"]]
        cases.setdefault(row["case"], {})[competitor] = Row(
            row["case"],
            competitor,
            failure=row["failure"],
            kept=row["kept_bytes"],
            peak=row["peak_bytes"],
            operator=row["operator_at_peak"],
            convolution_share=row["share_in_convolutions"],
            first_seconds=row["first_step_seconds"],
            seconds=row["seconds"],
        )
    return list(cases.values())


def depth_picture(path: Path) -> None:
    """Memory of a training step of ever deeper blocks, as PNG."""
    found = results("depth")
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = {"kept": "kept after the forward pass", "peak": "peak of a step"}
    columns = figure.subplots(1, len(panels), sharey=True)
    depths = found["depths"]
    for axes, (measure, title) in zip(columns, panels.items(), strict=True):
        for name, taken in found["bytes"].items():
            sizes = [size / MIB for size in taken[measure]]
            axes.plot(depths, sizes, marker="o", color=colour_of(name), label=name)
        axes.set(title=title, xlabel="layers", xticks=depths, xlim=(0, None))
        axes.grid(alpha=0.3)
    _name_peaks(columns[-1], found)
    columns[0].set_ylim(0, 1.05 * max(found["bytes"]["naive"]["peak"]) / MIB)
    columns[0].set_ylabel("MiB")
    columns[0].yaxis.set_major_formatter("{x:,.0f}")
    figure.legend(*columns[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    batch, channels, size, _ = found["shape"]
    figure.suptitle(
        f"Dense block, c0={channels}, k={found['growth']}, batch {batch}, {size}², float32, "
        f"measured on\n{conditions(found)}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=120)


def _name_peaks(axes: Axes, found: Found) -> None:
    """Say what the naive block and ours take at the depth of README's table."""
    place = found["depths"].index(NAMED_DEPTH)
    naive, ours = (found["bytes"][name]["peak"][place] / MIB for name in ("naive", "bottleneck"))
    axes.annotate(
        f"{NAMED_DEPTH} layers:\n{naive:,.0f} → {ours:,.0f} MiB",
        (NAMED_DEPTH, naive),
        xytext=(-12, 12),
        textcoords="offset points",
        ha="right",
    )
