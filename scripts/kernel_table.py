"""The table of docs/kernels.md: each Triton kernel, what it moves, and what its builds need.

    python -m scripts.kernel_table            # print it
    python -m scripts.kernel_table --write    # put it into docs/kernels.md

Nothing is run: a GPU is not needed. Bytes are those of the tensors that a launch is given.
"""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton

from efficient_densenet.kernels.triton.launch import Matrix
from efficient_densenet.memory.shapes import tensors_of
from scripts import marked
from scripts.kernel_builds import LAYER, TARGETS, Build, Launch, build, launches

DOCUMENT = Path(__file__).parent.parent / "docs" / "kernels.md"
MIB, KIB = 2**20, 2**10
WRITES = {
    "append": ("into", "pair"),
    "fold_moments": ("statistics",),
    "product": ("y", "pair"),
    "rectify": ("out",),
    "rectify_backward": ("target", "pair"),
    "weight_gradient": ("parts",),
    "input_gradient": ("target", "pair"),
    "collect": ("beta_gradient", "gamma_gradient", "totals"),
    "correct": ("out",),
}


def moved(launch: Launch) -> tuple[int, int]:
    """Bytes of what a launch is given to read, and to write."""
    read: dict[int, int] = {}
    written: dict[int, int] = {}
    for name, value in launch.arguments.items():
        adds = name == "totals" and launch.arguments["ACCUMULATE"]
        adds |= name == "target" and launch.arguments["ACCUMULATE"]
        if name in WRITES[launch.name]:
            written |= _bytes(launch, name, value)
        if name not in WRITES[launch.name] or adds:
            read |= _bytes(launch, name, value)
    return sum(read.values()), sum(written.values())


def _bytes(launch: Launch, name: str, value: Any) -> dict[int, int]:
    """Each tensor once: where one is not wanted, another stands in its place."""
    if isinstance(value, Matrix):
        return {id(value): value.rows * value.channels * value.data.itemsize}
    if name == "pair":  # as much of it as there are tiles
        sizes = launch.arguments
        width = sizes["K"] if launch.name == "input_gradient" else sizes["N"]
        tiles = sizes["tiles"] if "tiles" in sizes else -(-sizes["M"] // sizes["BLOCK_M"])
        return {id(value): 8 * tiles * width}
    return {id(tensor): tensor.nbytes for tensor in tensors_of([value])}


def markdown() -> str:
    samples, side, reads, width, growth = LAYER
    lines = [
        f"The last layer of DenseNet-121's first block: batch {samples}, {side}×{side}, "
        f"{reads} channels to {width} to {growth}, bfloat16, channels last.",
        "",
        "| kernel | computes | tile | MiB read | MiB written | "
        + " | ".join(f"sm_{capability}" for capability in TARGETS)
        + " |",
        "|---|---|---|---:|---:|" + "---:|" * len(TARGETS),
        *(_row(launch) for launch in launches(torch.bfloat16)),
        "",
        "Under each target: registers per thread, KiB of shared memory. Made by "
        f"`python -m scripts.kernel_table --write` with torch {torch.__version__.split('+')[0]}, "
        f"Triton {triton.__version__}, {date.today().isoformat()}, without a GPU. "
        "Times: not measured.",
    ]
    return "\n".join(lines)


def _row(launch: Launch) -> str:
    equation = re.split(r"\n\s*\n", launch.kernel.fn.__doc__)[0].replace("``", "`")
    sizes = [f"{size / MIB:.2f}" for size in moved(launch)]
    builds = [_build(build(launch, capability)) for capability in TARGETS]
    equation = " ".join(equation.split()).rstrip(".")
    return f"| {' | '.join([f'`{launch.name}`', equation, launch.tile, *sizes, *builds])} |"


def _build(built: Build) -> str:
    return f"{built.registers}, {built.shared / KIB:.0f}" + (" (spills)" if built.spilled else "")


if __name__ == "__main__":
    marked.command(__doc__, DOCUMENT, "kernels", markdown)
