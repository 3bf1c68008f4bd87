"""Pictures of memory: plans, and the live bytes over one step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from efficient_densenet.memory.report import StepReport
from efficient_densenet.memory.sizes import format_size
from efficient_densenet.training.plan import Plan
from efficient_densenet.training.work import COMPETITORS

GRID_COLOUR = "#e5e7eb"
MIB, GIB = 2**20, 2**30


def plan_chart(plan: Plan, path: Path) -> None:
    """Draw the estimated peak against batch or depth up to the budget, as PNG."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    room = plan.budget - plan.reserve
    for mode, fit in plan.fits.items():
        sizes = [size for size, peak in fit.peaks.items() if peak <= room]
        peaks = [fit.peaks[size] / GIB for size in sizes]
        axes.plot(
            sizes, peaks, marker="o", markersize=4, color=COMPETITORS[mode].colour, label=mode
        )
        if sizes:
            axes.annotate(
                str(fit.largest),
                (sizes[-1], room / GIB),
                xytext=(0, 6),
                textcoords="offset points",
                color=COMPETITORS[mode].colour,
                ha="center",
            )
    axes.axhline(room / GIB, color="black", linewidth=1, linestyle="--")
    axes.annotate(
        f"dashed: budget less reserve, {format_size(room)}",
        (0.99, 0.02),
        xycoords="axes fraction",
        ha="right",
    )
    axes.set(
        title=f"{plan.title},\nestimated for {plan.device}",
        xlabel=plan.varies,
        ylabel="peak, GiB, at the sizes that were tried",
    )
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.12 * room / GIB)
    _finish(axes)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def fits_chart(plans: Sequence[Plan], path: Path) -> None:
    """Draw what fits each of several budgets, one bar for each mode, as PNG."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    modes = list(plans[0].fits)
    width = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        places = [j + (i - (len(modes) - 1) / 2) * width for j in range(len(plans))]
        bars = axes.bar(
            places,
            [p[mode].largest for p in plans],
            width * 0.92,
            color=COMPETITORS[mode].colour,
            label=mode,
        )
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=2)
    axes.set_xticks(range(len(plans)), [f"{p.budget / 1e9:.0f} GB" for p in plans])
    axes.set(
        title=f"{plans[0].subject}: largest {plans[0].varies}, estimated for {plans[0].device}",
        ylabel=f"largest {plans[0].varies}",
        xlabel=f"budget ({format_size(plans[0].reserve)} of it in reserve)",
    )
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _finish(axes)
    axes.legend(frameon=False, ncols=len(modes), loc="upper left")
    figure.savefig(path, dpi=120)


def timeline(reports: dict[str, StepReport], title: str, path: Path) -> None:
    """Draw the live bytes of one step after every allocation and release, its phases marked.

    Args:
        reports: by mode; each gets its own axes, all on one scale.
        title: of the picture.
        path: the PNG to write.
    """
    figure = Figure(figsize=(4 * len(reports), 4.2), layout="constrained")
    figure.suptitle(f"{title}\ndotted: kept for the backward pass", fontsize="medium")
    columns = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    for axes, (mode, report) in zip(columns, reports.items(), strict=True):
        report.plot(axes, colour=COMPETITORS[mode].colour)
        axes.set_title(f"{mode}: {axes.get_title(loc='left')}", loc="left", fontsize="medium")
        axes.label_outer()
        _finish(axes)
    highest = max(report.peak.step for report in reports.values())
    columns[0].set_ylim(0, 1.15 * highest / MIB)  # room for the names of the phases
    figure.savefig(path, dpi=120)


def _finish(axes: Axes) -> None:
    axes.grid(axis="y", color=GRID_COLOUR)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
