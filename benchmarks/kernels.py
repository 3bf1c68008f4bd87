"""What each Triton kernel moves, and what its builds need.

    python -m benchmarks.kernels    # into docs/results/kernels.json

Nothing is run: a GPU is not needed. Bytes are those of the tensors that a launch is given.
"""

from __future__ import annotations

import re
from typing import Any
from unittest.mock import patch

import torch
import triton

from benchmarks import kernel_builds
from benchmarks.kernel_builds import LAYER, LAYOUTS, TARGETS, Launch, build, launches
from benchmarks.provenance import Json, publish
from efficient_densenet.kernels.triton.launch import Matrix
from efficient_densenet.memory.shapes import tensors_of

WRITES = {
    "append": ("into", "pair"),
    "fold_moments": ("statistics",),
    "product": ("y", "pair", "activated"),
    "rectify": ("out",),
    "rectify_backward": ("target", "pair"),
    "pool": ("out", "choice"),
    "pool_backward": ("target", "pair"),
    "weight_gradient": ("parts",),
    "input_gradient": ("target", "pair"),
    "collect": ("beta_gradient", "gamma_gradient", "totals"),
    "correct": ("out",),
}
OPTIONAL = {
    "into": "COPY",
    "pair": "STATISTICS",
    "target": "TARGET",
    "totals": "TOTALS",
    "choice": "MAXIMUM",
}
"""Arguments in whose place another one stands, unless a constant of the build says so."""


def moved(launch: Launch) -> tuple[int, int]:
    """Bytes of what a launch is given to read, and to write."""
    read: dict[int, int] = {}
    written: dict[int, int] = {}
    for name, value in launch.arguments.items():
        if not launch.arguments.get(OPTIONAL.get(name, ""), True):
            continue
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
    if name == "pair" and value is not None:  # as much of it as there are tiles
        sizes = launch.arguments
        width = sizes["K"] if launch.name == "input_gradient" else sizes["N"]
        tiles = sizes["tiles"] if "tiles" in sizes else -(-sizes["M"] // sizes["BLOCK_M"])
        return {id(value): 8 * tiles * width}
    return {id(tensor): tensor.nbytes for tensor in tensors_of([value])}


def row(launch: Launch) -> Json:
    """A kernel, what it moves in bytes, and its builds by compute capability."""
    equation = re.split(r"\n\s*\n", launch.kernel.fn.__doc__)[0].replace("``", "`")
    read, written = moved(launch)
    builds = {}
    for capability in TARGETS:
        built = build(launch, capability)
        needs = {"registers": built.registers, "shared": built.shared, "spilled": built.spilled}
        builds[f"sm_{capability}"] = needs
    return {
        "name": launch.title,
        "equation": " ".join(equation.split()).rstrip("."),
        "tile": launch.tile,
        "read": read,
        "written": written,
        "builds": builds,
    }


def widths(layout: str) -> Json:
    """By kernel, how many instructions move so many bytes, on sm_90."""
    layer, last = LAYOUTS[layout]
    with patch.object(kernel_builds, "LAYER", layer):
        found = launches(torch.bfloat16, last)
    return {one.title: {str(w): n for w, n in build(one, 90).widths.items()} for one in found}


def main() -> None:
    rows = [row(launch) for launch in launches(torch.bfloat16)]
    found = {"triton": triton.__version__, "layer": LAYER, "kernels": rows}
    publish("kernels", found | {"widths": {layout: widths(layout) for layout in LAYOUTS}})


if __name__ == "__main__":
    main()
