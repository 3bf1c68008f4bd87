"""Builds Triton's kernels for GPUs that are not here, and reads what the builds say.

The launches of a layer are recorded on maps without values, and Triton compiles each as it would on
a device: the same types, strides, divisibility and constants.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from efficient_densenet.kernels import workspace
from efficient_densenet.kernels.interface import (
    RELU,
    Conv,
    Geometry,
    Pool,
    Statistics,
    Tail,
    Unit,
)
from efficient_densenet.kernels.triton import launch, operations, tiles
from efficient_densenet.kernels.triton.tiles import Tile

# Compute capabilities, and the shared memory that a block of threads may have there.
TARGETS = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
# The instruction of the tensor cores.
TENSOR_CORES = dict.fromkeys(TARGETS, "HMMA") | {90: "HGMMA", 100: "UTCHMMA"}
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Samples, positions per side, channels read, of the bottleneck, and added: the last layer of
# DenseNet-121's first block at 224x224.
LAYER = (64, 56, 224, 128, 32)
# The same in other sizes: of a growth rate that is no multiple of 16, and of small maps.
ODD_LAYER, SMALL_LAYER = (64, 56, 252, 48, 12), (64, 14, 224, 128, 32)
LAYOUTS = {
    "channels last, 256": (LAYER, True),
    "channels last, 264": (ODD_LAYER, True),
    "planes, 56²": (LAYER, False),
    "planes, 14²": (SMALL_LAYER, False),
}


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments by name, as it would be launched."""

    kernel: object
    arguments: dict[str, object]
    warps: int
    stages: int

    @classmethod
    def of(
        cls,
        kernel: object,
        grid: object,
        *args: object,
        warps: int = 4,
        stages: int = 1,
        **constants: object,
    ) -> Launch:
        """Of what ``launch.run`` is given."""
        names = [name for name in kernel.arg_names if name not in constants]
        return cls(kernel, dict(zip(names, args, strict=True)) | constants, warps, stages)

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def title(self) -> str:
        """The name, which of its two poolings it is, and what it does besides."""
        parts, given = [self.name], self.arguments
        if "MAXIMUM" in given:
            parts.append("maximum" if given["MAXIMUM"] else "average")
        if given.get("reader") is not None:
            parts.append("activated too")
        if given.get("terms") is not None:
            parts.append("the whole gradient")
        if given.get("TARGET") is False:
            parts.append("sums alone")
        return ", ".join(parts)

    @property
    def tile(self) -> str:
        sizes = [self.arguments.get(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
        return "×".join(str(size) for size in sizes if size)


@dataclass(frozen=True)
class Build:
    """What the machine code of a launch needs, per thread and per block of threads.

    ``widths`` counts the instructions that move so many bytes a thread from or to memory.
    """

    registers: int
    spilled: bool
    shared: int
    widths: dict[int, int]
    instructions: frozenset[str]
    ptx: str


def launches(dtype: torch.dtype, last: bool = True, every_tile: bool = False) -> list[Launch]:
    """Each kernel of a layer and of poolings, forward and back, once; or once with each tile."""
    found: dict[tuple[str, str], Launch] = {}

    def record(*args: object, **options: object) -> None:
        launch = Launch.of(*args, **options)
        found.setdefault((launch.title, launch.tile), launch)

    def first(
        some: Sequence[Tile], x: object, key: object, launch: Callable[[Tile], object]
    ) -> Tile:
        for tile in some if every_tile else ():
            launch(tile)
        return some[0]

    with (
        patch.object(launch, "run", record),
        patch.object(tiles, "fastest", first),
        patch.object(workspace, "WORKSPACE_BYTES", 2**40),  # the whole map is one slab
    ):
        _walk_layer(dtype, torch.channels_last if last else torch.contiguous_format)
    return list(found.values())


def _walk_layer(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """A layer forward and backward, on maps without values."""
    samples, side, reads, width, growth = LAYER

    def a_map(channels: int, dtype: torch.dtype = dtype) -> Tensor:
        shape = (samples, channels, side, side)
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)

    def vectors(channels: int) -> Sequence[Tensor]:
        return torch.empty(4, channels, device="meta")

    def tail(leaves: int, reads: int, size: int) -> Tail:
        weight = torch.empty(leaves, reads, size, size, dtype=dtype, device="meta")
        geometry = Geometry((1, 1), (size // 2,) * 2, (1, 1), 1)
        return Tail(None, Conv(weight, None, geometry), dtype)

    def unit(channels: int, leaves: int, size: int) -> Unit:
        mean, var, weight, bias = vectors(channels)
        norm = operations.make_norm(Statistics(mean, var), channels, weight, bias, 1e-5)
        return Unit(norm, RELU, operations.make_tail(tail(leaves, channels, size)), channels)

    summed = operations.summed_dtype(dtype, torch.float32)
    features, total = a_map(reads + growth), a_map(reads + growth, summed)
    new, z, dz = a_map(growth), a_map(width), a_map(width)
    first, second = unit(reads, width, 1), unit(width, growth, 3)
    mean, a, b, _ = vectors(width)
    scratch = workspace.Workspace(features, reads, dtype, memory_format)
    operations.append(new, features, reads, Statistics(*vectors(reads + growth)[:2]))
    operations.forward_unit(features, first, scratch, need_statistics=False, reader=second)
    for map, reader, target in ((features, first, total), (z, second, dz), (z, second, None)):
        is_first = map is features
        operations.forward_unit(map, reader, scratch, need_statistics=is_first)
        gradient = operations.backward_unit(
            a_map(width if is_first else growth),
            map,
            reader,
            scratch,
            need_weight=True,
            need_bias=False,
            need_sums=True,
            target=target,
            accumulate=is_first,
        )
        if gradient.waiting:
            gradient.waiting(slice(0, samples), a, b)
        totals = vectors(map.shape[1])[:2]
        operations.collect(gradient.sums, reader, 1.0, (totals[0], totals[1]), is_first)
    for pool in (Pool("average", (2, 2), (2, 2), (0, 0)), Pool("maximum", (3, 3), (2, 2), (1, 1))):
        reader = unit(reads, width, 1)
        reader = reader._replace(tail=Tail(pool, None, dtype))
        pooled, _ = operations.forward_unit(features, reader, scratch, need_statistics=False)
        for target in (total, None):
            gradient = operations.backward_unit(
                pooled,
                features,
                reader,
                scratch,
                need_weight=False,
                need_bias=False,
                need_sums=True,
                target=target,
                accumulate=True,
            )
            if gradient.waiting:
                gradient.waiting(slice(0, samples), *vectors(reads)[:2])
    operations.correct(dz, z, slice(0, width), mean, a, b, a_map(width))


class AbsentGPU:
    """What Triton asks of a driver before it builds: enough for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what has been built is remembered by this number

    def get_current_stream(self, device: int) -> int:
        return 0


def build(launch: Launch, capability: int) -> Build:
    """Compiles a launch for a GPU of that compute capability."""
    with patch.object(driver, "_active", AbsentGPU(capability)):
        compiled = launch.kernel.run(
            **launch.arguments,
            grid=(1,),
            warmup=True,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
    usage, code = (
        _disassembled(compiled.asm["cubin"], option)
        for option in ("--dump-resource-usage", "--dump-sass")
    )
    registers, stack, static, local = (
        int(re.findall(rf"{field}:(\d+)", usage)[-1])
        for field in ("REG", "STACK", "SHARED", "LOCAL")
    )
    instructions = frozenset(re.findall(r"^\s+/\*\w+\*/\s+(?:@\S+ )?([A-Z0-9]+)", code, re.M))
    ptx = compiled.asm["ptx"]
    spilled = stack + local > 0 or bool(instructions & {"STL", "LDL"})
    return Build(
        registers, spilled, static + compiled.metadata.shared, _widths(code), instructions, ptx
    )


def _widths(code: str) -> dict[int, int]:
    """How many instructions move so many bytes a thread between memory and anywhere else."""
    found: dict[int, int] = {}
    for options in re.findall(r"\b(?:LDG|STG|LDGSTS)\.E(\S*)", code):
        bits = re.search(r"\.(?:[US]?(8|16)|(64|128))\b", options)
        size = int(bits[1] or bits[2]) // 8 if bits else 4
        found[size] = found.get(size, 0) + 1
    return found


def _disassembled(binary: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(DISASSEMBLER), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
