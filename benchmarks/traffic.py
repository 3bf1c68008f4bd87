"""How many bytes move: counted operator by operator, and by a model of one dense layer.

    python -m benchmarks.traffic    # into docs/results/traffic.json

An operator reads its arguments and writes its results once. What a slab of samples is made of stays
in the cache if the slab fits; the rest, whole maps, comes from memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import BN_SIZE, make_block
from benchmarks.provenance import publish
from efficient_densenet.kernels import workspace
from efficient_densenet.memory.shapes import tensors_of

PASSES = ("forward", "backward")
KINDS = ("naive", "norm", "bottleneck")


class Widths(NamedTuple):
    """How often a layer reads or writes each kind of map, or how many channels each kind has.

    ``wide`` is all that the layer reads, ``bottleneck`` the map between its convolutions, ``new``
    the maps that it adds.
    """

    wide: float
    bottleneck: float
    new: float

    def channels(self, each: Widths) -> float:
        return sum(often * width for often, width in zip(self, each, strict=True))

    def plus(self, other: Widths) -> Widths:
        return Widths(*(a + b for a, b in zip(self, other, strict=True)))


class Cost(NamedTuple):
    """Reads and writes by all operators, and those of them that are of whole maps."""

    all: Widths
    whole: Widths


NAIVE_FORWARD = Widths(
    wide=7,  # concatenation r w, norm r w, rectifier r w, convolution r
    bottleneck=6,  # convolution w, norm r w, rectifier r w, convolution r
    new=1,  # convolution w
)
NAIVE_BACKWARD = Widths(
    wide=11,  # convolution r w, mask r r w, norm r r w, sum over readers r r w
    bottleneck=9,  # convolution r w, mask r r w, norm r r w, convolution r
    new=1,  # convolution r
)
FORWARD = Cost(
    Widths(
        wide=5,  # scale and shift r w, rectifier r w, convolution r
        bottleneck=9,  # convolution w, copy r w, statistics r, as wide 5
        new=6,  # convolution w, copy r w, copy to its place r w, statistics r
    ),
    Widths(wide=1, bottleneck=3, new=4),
)
BACKWARD = Cost(
    Widths(
        wide=16,  # scale and shift r w, rectifier r w, convolution r w, mask r r w,
        # centring r w, sums r r, G r r w
        bottleneck=19,  # as wide 11, G r w, correction r w r r w, convolution r
        new=6,  # correction r w r r w, convolution r
    ),
    Widths(wide=4, bottleneck=9, new=6),
)
RECOMPUTING = Cost(Widths(wide=5, bottleneck=3, new=0), Widths(wide=1, bottleneck=1, new=0))
"""The wide map as in the forward pass, 1x1 convolution w, copy r w."""
MODEL = {
    ("naive", "forward"): Cost(NAIVE_FORWARD, NAIVE_FORWARD),
    ("naive", "backward"): Cost(NAIVE_BACKWARD, NAIVE_BACKWARD),
    ("norm", "forward"): FORWARD,
    ("norm", "backward"): BACKWARD,
    ("bottleneck", "forward"): FORWARD,
    ("bottleneck", "backward"): Cost(
        BACKWARD.all.plus(RECOMPUTING.all), BACKWARD.whole.plus(RECOMPUTING.whole)
    ),
}


class Block(NamedTuple):
    """A block of bottleneck layers on ``(batch, channels, size, size)``."""

    layers: int
    channels: int
    growth: int
    batch: int
    size: int

    @property
    def out(self) -> int:
        return self.channels + self.layers * self.growth

    def bytes(self, channels: float) -> float:
        """Of float32 maps of ``channels`` channels."""
        return 4 * channels * self.batch * self.size**2


BLOCK = Block(layers=12, channels=24, growth=12, batch=15, size=31)
"""The block that is published."""


def modelled(kind: str, which: str, block: Block) -> tuple[float, float]:
    """Bytes that a block moves in one pass by :data:`MODEL`: all, and of whole maps."""
    width = BN_SIZE * block.growth
    layers = [
        Widths(block.channels + i * block.growth, width, block.growth) for i in range(block.layers)
    ]
    around = _around(kind, which, block)
    every, whole = (
        block.bytes(around + sum(widths.channels(layer) for layer in layers))
        for widths in MODEL[kind, which]
    )
    return every, whole


def _around(kind: str, which: str, block: Block) -> float:
    """Channels that move once a block: its entry and exit."""
    if kind == "naive":
        return 2 * block.out if which == "forward" else 0  # the last concatenation
    if which == "forward":
        return 3 * block.channels  # copied to their place, and their statistics
    return 2 * block.out + 5 * block.channels  # the arriving gradient copied, the input's corrected


def counted(kind: str, block: Block) -> dict[str, tuple[float, float]]:
    """Bytes that the operators of a step moved in each pass: all, and of whole maps.

    In channels_last, with slabs of one sample.

    Raises:
        ValueError: if a slab could be taken for a whole map.
    """
    if block.batch * block.growth <= max(block.out, BN_SIZE * block.growth):
        raise ValueError(f"a sample of {block} is as large as a map of the whole batch")
    model: nn.Module = make_block(kind, block.layers, block.channels, block.growth)  # type: ignore[arg-type]
    model = model.to(memory_format=torch.channels_last)
    shape = (block.batch, block.channels, block.size, block.size)
    x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
    with patch.object(workspace, "WORKSPACE_BYTES", 1):
        with Traffic(block) as forward:
            output = model(x)
        gradient = torch.randn_like(output)
        with Traffic(block) as backward:
            output.backward(gradient)
    return {"forward": (forward.all, forward.whole), "backward": (backward.all, backward.whole)}


class Traffic(TorchDispatchMode):
    """Context manager that adds up what operators read and write of the maps of ``block``."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.all = self.whole = 0.0
        self._positions, self._smallest = block.size**2, block.bytes(block.growth)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if not moves_nothing(func):
            for tensor in tensors_of((*what_is_read(func, args, kwargs or {}), result)):
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        if tensor.dim() < 2 or tensor.numel() % self._positions:
            return  # a vector or a weight
        size = tensor.numel() * tensor.itemsize
        self.all += size
        if tensor.untyped_storage().nbytes() >= self._smallest:
            self.whole += size


def moves_nothing(func: OpOverload) -> bool:
    """Whether an operator makes a view, or a tensor out of nothing."""
    returned = [r.alias_info for r in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returned)
    return is_view or func.name().startswith(("aten::empty", "aten::new_", "aten::_unsafe_view"))


def what_is_read(
    func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]
) -> list[object]:
    """The arguments that an operator reads: those it only writes into are not."""
    arguments = func._schema.arguments
    given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    written = {a.name for a in arguments if a.alias_info and a.alias_info.is_write}
    if not func.name().startswith(("aten::copy_", "aten::fill_", "aten::zero_")):
        written.discard("self")  # in place: read, then written
    return [value for name, value in given.items() if name not in written]


def main() -> None:
    rows = []
    for kind in KINDS:
        moved = counted(kind, BLOCK)
        rows += [
            {
                "kind": kind,
                "pass": which,
                "maps": MODEL[kind, which]._asdict(),
                "modelled": modelled(kind, which, BLOCK),
                "counted": moved[which],
            }
            for which in PASSES
        ]
    publish("traffic", {"block": BLOCK._asdict(), "rows": rows})


if __name__ == "__main__":
    main()
