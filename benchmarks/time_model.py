"""A model of a step's time on cards that are not here: bytes, arithmetic and a floor per launch.

    python -m benchmarks.time_model    # into docs/results/time_model.json

Nothing is measured. A training step of DenseNet-121 runs on shapes alone, as it would on a GPU, and
every kernel that it would launch is noted. A kernel reads what it is given and writes its result
once, and takes the longest of three: its bytes at the card's bandwidth, its matrix products at the
rate of the tensor cores, and :data:`FLOOR`. One kernel follows the other without a gap, and the
host is never late, as where a graph is replayed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.kernel_builds import Launch
from benchmarks.kernels import moved
from benchmarks.provenance import Json, publish
from benchmarks.traffic import moves_nothing, what_is_read
from efficient_densenet import densenet121
from efficient_densenet.functional.modes import Recompute
from efficient_densenet.kernels import workspace
from efficient_densenet.kernels.layout import imagined_on
from efficient_densenet.kernels.triton import launch
from efficient_densenet.memory.hollow import copy_hollow
from efficient_densenet.memory.shapes import tensors_of

BATCH, SIZE, CLASSES = 64, 224, 1000
FLOOR = 3e-6
"""Seconds that a kernel takes at least, however little it does. Assumed."""


class Card(NamedTuple):
    """A card by its vendor's documents, and the implementation of our operations that runs there.

    Bytes a second from memory, and operations a second of tensor cores on 16-bit values that are
    summed in 32 bits.
    """

    name: str
    bandwidth: float
    arithmetic: float
    kernels: str
    source: str


CARDS = (
    Card("T4", 320e9, 65e12, "eager", "NVIDIA Turing GPU Architecture (whitepaper)"),
    Card("RTX 3090", 936e9, 71e12, "triton", "NVIDIA Ampere GA102 GPU Architecture (whitepaper)"),
    Card("RTX 4090", 1008e9, 165e12, "triton", "NVIDIA Ada GPU Architecture (whitepaper)"),
    Card("A100 80 GB SXM", 2039e9, 312e12, "triton", "NVIDIA A100 Tensor Core GPU (data sheet)"),
    Card("H100 SXM", 3350e9, 989e12, "triton", "NVIDIA H100 Tensor Core GPU (data sheet)"),
)
MODES = ("none", "norm", "bottleneck")
"""The naive network, and ours."""

aten = torch.ops.aten
TWO_KERNELS = {
    aten.native_batch_norm: (0,),
    aten.native_batch_norm_backward: (0, 1),
    aten.convolution_backward: (0,),
}
"""Operators of two kernels, and the arguments that both read: statistics or sums, then values; the
gradient of a convolution's input, then of its weight. Of one, where there is no first result."""


class Kernel(NamedTuple):
    """What a kernel reads and writes in bytes, and the operations of its matrix product."""

    name: str
    bytes: float
    operations: float

    def seconds(self, card: Card) -> float:
        return max(self.bytes / card.bandwidth, self.operations / card.arithmetic, FLOOR)


class Kernels(TorchDispatchMode):
    """Context manager that notes the kernels of a step on tensors without values, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Kernel] = []

    def __enter__(self) -> Kernels:
        self._patched = patch.object(launch, "run", self._note)
        self._patched.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patched.stop()

    def _note(self, *args: object, **options: object) -> None:
        one = Launch.of(*args, **options)
        sizes = [one.arguments.get(name, 0) for name in ("M", "N", "K")]
        self.found.append(Kernel(one.name, sum(moved(one)), 2 * sizes[0] * sizes[1] * sizes[2]))

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not moves_nothing(func):
            self.found += _kernels(func, args, kwargs or {}, result)
        return result


def _kernels(
    func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object], result: object
) -> Iterator[Kernel]:
    """Those of an operator of PyTorch."""
    moves = [*what_is_read(func, args, kwargs), result]
    formula = flop_registry.get(func.overloadpacket)
    operations = formula(*args, **kwargs, out_val=result) if formula else 0
    both = TWO_KERNELS.get(func.overloadpacket)
    count = 1
    if both and result[0] is not None:
        moves += [args[i] for i in both]
        count = 2
    size = sum(tensor.nbytes for tensor in tensors_of(moves))
    for _ in range(count):
        yield Kernel(func.overloadpacket.__name__, size / count, operations / count)


def kernels_of(model: nn.Module, shape: tuple[int, ...]) -> list[Kernel]:
    """The kernels of a step of a classifier in mixed precision, with channels-last maps."""
    model = model.to(memory_format=torch.channels_last)
    # Slabs that allocate the same are not left out, as they are in an estimate of memory.
    every_slab = patch.object(workspace, "is_hollow", lambda tensor: False)
    with FakeTensorMode(), imagined_on(torch.device("cuda")), every_slab, Kernels() as noted:
        hollow = copy_hollow(model, torch.device("cpu"))
        x = torch.empty(shape, memory_format=torch.channels_last)
        labels = torch.empty(shape[0], dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16):
            output: Tensor = hollow(x)
        F.cross_entropy(output.float(), labels).backward()
    return noted.found


def main() -> None:
    steps = {
        (mode, kernels): _step(mode, kernels) for mode in MODES for kernels in ("triton", "eager")
    }
    rows = [
        {
            "mode": mode,
            "kernels": kernels,
            "launches": len(step),
            "bytes": sum(kernel.bytes for kernel in step),
            "operations": sum(kernel.operations for kernel in step),
            "by_kernel": _by_kernel(step),
        }
        for (mode, kernels), step in steps.items()
    ]
    cards = [card._asdict() | {"seconds": _seconds(card, steps)} for card in CARDS]
    found = {"batch": BATCH, "size": SIZE, "floor": FLOOR, "steps": rows, "cards": cards}
    publish("time_model", found)


def _step(mode: Recompute, kernels: Literal["triton", "eager"]) -> list[Kernel]:
    with torch.device("meta"):
        model = densenet121(num_classes=CLASSES, recompute=mode, kernels=kernels)
    return kernels_of(model, (BATCH, 3, SIZE, SIZE))


def _by_kernel(step: list[Kernel]) -> dict[str, float]:
    """Bytes of all kernels of a name, the most first."""
    total: Counter[str] = Counter()
    for kernel in step:
        total[kernel.name] += kernel.bytes
    return dict(total.most_common())


def _seconds(card: Card, steps: dict[tuple[str, str], list[Kernel]]) -> Json:
    """Of a step in each mode, by the implementation that runs on the card."""
    return {
        mode: sum(kernel.seconds(card) for kernel in steps[mode, card.kernels]) for mode in MODES
    }


if __name__ == "__main__":
    main()
