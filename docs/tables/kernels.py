"""The table of docs/kernels.md: each Triton kernel, what it moves, and what its builds need."""

from __future__ import annotations

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
        ]
    )


def _row(kernel: Found) -> tuple[str, ...]:
    sizes = (f"{kernel[name] / MIB:.2f}" for name in ("read", "written"))
    return (
        *(f"`{kernel['name']}`", kernel["equation"], kernel["tile"], *sizes),
        *map(_build, kernel["builds"].values()),
    )


def _build(built: Found) -> str:
    spills = " (spills)" if built["spilled"] else ""
    return f"{built['registers']}, {built['shared'] / KIB:.0f}{spills}"
