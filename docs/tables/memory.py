"""Tables and pictures of docs/memory.md: what is planned, what was measured, and the edge."""

from __future__ import annotations

from pathlib import Path

from docs.tables.markdown import MIB, Found, conditions, origin, results, table
from efficient_densenet.memory.events import Event, Peak
from efficient_densenet.memory.plan import Fit
from efficient_densenet.memory.report import StepReport
from efficient_densenet.memory.sizes import format_size
from efficient_densenet.training import pictures
from efficient_densenet.training.plan import Plan
from efficient_densenet.training.work import COMPETITORS, Work


def deepest() -> str:
    """The deepest networks in 2 GiB, as the command plans them."""
    found = results("plans")
    made = plan_of(found["deepest"])
    rows = (
        (mode, fit.largest, format_size(fit.peak), fit.next, format_size(fit.next_peak or 0))
        for mode, fit in made.fits.items()
    )
    header = ("mode", f"largest {made.varies}", "peak", "one size up", "its peak")
    return f"{table(header, rows)}\n\n{origin('plans', found)}"


def batches() -> str:
    """The largest batches of DenseNet-121 on common GPUs."""
    found = results("plans")
    plans = [plan_of(plan) for plan in found["batches"]]
    rows = (
        (f"{made.budget / 1e9:.0f} GB", *(fit.largest or "none" for fit in made.fits.values()))
        for made in plans
    )
    return f"{table(('budget', *COMPETITORS), rows)}\n\n{origin('plans', found)}"


def planned() -> str:
    """Planned peaks beside measured ones."""
    return planned_table(results("planned_peaks"))


def planned_table(found: Found) -> str:
    every = [ratio for network in found["networks"] for _, ratio in network["peaks"].values()]
    rows = []
    for network in found["networks"]:
        work = Work(**network["work"])
        depth = "" if work.depth is None else f"-{work.depth}, k={work.growth_rate}"
        size = f"{work.image_size}²×{work.in_channels}"
        cells = (f"{peak / MIB:,.1f} ({ratio:.3f})" for peak, ratio in network["peaks"].values())
        rows.append((f"{work.model}{depth}", size, work.batch_size, *cells))
    return "\n\n".join(
        [
            table(("network", "images", "batch", *COMPETITORS), rows, left=2),
            f"Measured peak in MiB, and in brackets planned / measured: between {min(every):.3f} "
            f"and {max(every):.3f}.",
            origin("planned_peaks", found),
        ]
    )


def edge() -> str:
    """The deepest networks that are planned, and their real steps within the budget."""
    found = results("edge_of_budget")
    header = ("mode", "deepest", "planned", "in the step", "seconds")
    rows = [
        (
            *(of["mode"], of["deepest"], format_size(of["planned"]), _peak(of["peak"])),
            *(f"{of['seconds']:.0f}", of["next"], format_size(of["next_planned"])),
            _peak(of["next_peak"]),
        )
        for of in found["edges"]
    ]
    return "\n\n".join(
        [
            f"{format_size(found['budget'])}, batch {found['batch_size']}, 32x32, "
            f"k={found['growth_rate']}, float32, SGD with momentum:",
            table((*header, "one size up", "planned", "in the step"), rows),
            origin("edge_of_budget", found),
        ]
    )


def _peak(found: int | None) -> str:
    return "out of memory" if found is None else format_size(found)


def plan_picture(path: Path) -> None:
    pictures.plan_chart(plan_of(results("plans")["deepest"]), path)


def fits_picture(path: Path) -> None:
    pictures.fits_chart([plan_of(plan) for plan in results("plans")["batches"]], path)


def step_picture(path: Path) -> None:
    """The live bytes of one step after every birth and death, as measured."""
    found = results("plans")
    work = Work(**found["step"]["work"])
    reports = {mode: report_of(report) for mode, report in found["step"]["modes"].items()}
    pictures.timeline(
        reports,
        f"One step of DenseNet-BC-{work.depth} (k={work.growth_rate}), batch {work.batch_size}, "
        f"{work.image_size}x{work.image_size}, float32, SGD with momentum, measured on "
        f"{conditions(found)}",
        path,
    )


def plan_of(found: Found) -> Plan:
    """A plan as it was before it was written."""
    fits = {mode: Fit(**{**fit, **_keyed(fit)}) for mode, fit in found["fits"].items()}
    return Plan(**{**found, "work": Work(**found["work"]), "fits": fits})


def _keyed(fit: Found) -> dict[str, dict[int, int | None]]:
    """What a fit holds by size: JSON made texts of the sizes."""
    return {name: {int(k): v for k, v in fit[name].items()} for name in ("peaks", "tried")}


def report_of(found: Found) -> StepReport:
    """A report as it was before it was written, without operators and numbers of storages."""
    peak = {name: value for name, value in found["peak"].items() if name not in ("step", "total")}
    sizes = ((phase, size) for phase, inside in found["events"].items() for size in inside)
    events = [Event(phase, "", number, size) for number, (phase, size) in enumerate(sizes)]
    return StepReport(**{**found, "peak": Peak(**peak), "events": events})


def estimated() -> str:
    """Estimated peaks of steps of any model beside measured ones."""
    return estimated_table(results("estimates"))


def estimated_table(found: Found) -> str:
    ratios = [step["estimated"] / step["measured"] for step in found["steps"]]
    rows = [
        (*_step(step), f"{step['measured'] / MIB:,.1f}", f"{ratio:.4f}")
        for step, ratio in zip(found["steps"], ratios, strict=True)
    ]
    header = ("model", "mode", "images", "type", "optimizer", "peak", "estimated / measured")
    return "\n\n".join(
        [
            table(header, rows, left=5),
            f"Measured peak in MiB; the ratio is between {min(ratios):.4f} and {max(ratios):.4f}.",
            origin("estimates", found),
        ]
    )


def estimated_edge() -> str:
    """The largest batches within a budget, and their real steps held to it."""
    found = results("estimates")
    header = ("model", "mode", "images", "type", "optimizer", "budget", "largest batch")
    rows = [
        (
            *_step(of),
            *(format_size(of["budget"]), of["largest"], format_size(of["estimated"])),
            *(_peak(of["peak"]), of["next"], format_size(of["next_estimated"])),
            _peak(of["next_peak"]),
        )
        for of in found["edges"]
    ]
    columns = (*header, "estimated", "in the step", "one more", "estimated", "in the step")
    return f"{table(columns, rows, left=5)}\n\n{origin('estimates', found)}"


def _step(found: Found) -> tuple[str, str, str, str, str]:
    last = ", channels last" if found["last"] else ""
    return (
        found["name"],
        "as it is" if found["mode"] == "library" else found["mode"],
        f"{'×'.join(map(str, found['shape']))}{last}",
        "bfloat16" if found["autocast"] else "float32",
        found["optimizer"],
    )
