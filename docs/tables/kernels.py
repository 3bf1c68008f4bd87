"""Tables of docs/kernels.md: each Triton kernel, what it moves, its builds; the host's time."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from docs.tables.markdown import MIB, Found, origin, results, table

KIB = 2**10


def kernels() -> str:
    found = results("kernels")
    samples, side, reads, width, growth = found["layer"]
    targets = list(found["kernels"][0]["builds"])
    header = ("kernel", "computes", "tile", "MiB read", "MiB written", *targets)
    return "\n\n".join(
        [
            f"The last layer of DenseNet-121's first block: batch {samples}, {side}×{side}, "
            f"{reads} channels to {width} to {growth}, bfloat16, channels last.",
            table(header, map(_row, found["kernels"]), left=3),
            "Under each target: registers per thread, KiB of shared memory. Built with Triton "
            f"{found['triton']}, without a GPU; times: not measured. {origin('kernels', found)}",
            "How many bytes an instruction moves between a thread and memory, and how many such "
            "instructions there are in the code for sm_90 (vectors and weights included), by what "
            "the block's features are:",
            table(("kernel", *found["widths"]), _widths(found["widths"]), left=1),
            "264 channels, of which 252 are read, are those of a growth rate of 12: multiples of "
            "4, not of 16.",
        ]
    )


def _widths(layouts: Found) -> Iterator[tuple[str, ...]]:
    first, *_ = layouts.values()
    for kernel in first:
        counts = (layout[kernel].items() for layout in layouts.values())
        cells = (sorted((int(width), n) for width, n in one) for one in counts)
        yield f"`{kernel}`", *(", ".join(f"{width}: {n}" for width, n in cell) for cell in cells)


def _row(kernel: Found) -> tuple[str, ...]:
    sizes = (f"{kernel[name] / MIB:.2f}" for name in ("read", "written"))
    return (
        *(f"`{kernel['name']}`", kernel["equation"], kernel["tile"], *sizes),
        *map(_build, kernel["builds"].values()),
    )


def _build(built: Found) -> str:
    spills = " (spills)" if built["spilled"] else ""
    return f"{built['registers']}, {built['shared'] / KIB:.0f}{spills}"


def host_time() -> str:
    """CPU time of steps whose maps are tiny, before and after."""
    found = results("host_time")
    header = (
        "",
        "launches",
        "calls into PyTorch",
        "ms",
        "ms at " + found["other"],
        "ratio (range)",
    )
    rows = (_times(row) for row in found["rows"])
    rest = [
        f"Were Triton's part of a launch free, the {row['what']} would take "
        f"{median(one['without_triton'] for one in row['this']) * 1e3:.1f} ms."
        for row in found["rows"]
        if "without_triton" in row["this"][0]
    ]
    return "\n\n".join([table(header, rows), *rest, origin("host_time", found)])


def _times(row: Found) -> tuple[str, ...]:
    this, other = row["this"], row["the other"]
    now, before = (median(one["seconds"] for one in runs) * 1e3 for runs in (this, other))
    pairs = zip(this, other, strict=True)
    ratios = [mine["seconds"] / theirs["seconds"] for mine, theirs in pairs]
    counts = (
        f"{this[0][name]}, before {other[0][name]}" if name in this[0] else ""
        for name in ("launches", "calls")
    )
    spread = f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
    return row["what"], *counts, f"{now:.1f}", f"{before:.1f}", spread
