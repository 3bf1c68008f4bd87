"""What fits a budget: the largest batch of a network, or the deepest network for a batch.

Nothing is computed: every step is estimated from shapes (:func:`efficient_densenet.estimate`),
optimizer state included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from efficient_densenet.functional.modes import Recompute
from efficient_densenet.memory.meter import Scratch, onednn_scratch
from efficient_densenet.memory.step import GRANULARITY, StepReport, estimate
from efficient_densenet.modules.naive import BottleneckLayer, DenseBlock
from efficient_densenet.training.config import (
    AUTOCAST,
    PRECISIONS,
    RECIPES,
    SMALLEST_BATCH,
    ConfigError,
    TrainConfig,
    build_network,
    check_at_least,
    check_choice,
    check_network,
    format_size,
    make_optimizer,
    parse_size,
)

MODES: dict[str, Recompute] = {
    "naive": "none",
    "checkpointed": "none",
    "norm": "norm",
    "bottleneck": "bottleneck",
}
"""What can be planned for, and how each recomputes."""

MOST = {"batch": 2**20, "depth": 6 * 500 + 4}
"""Where a search ends, whatever would still fit."""

TRAIN_IMAGES = 60_000  # of Fashion-MNIST

SECANT_STEPS = 8
"""Estimates after which a search goes on by halves."""


class Machine(NamedTuple):
    """How a kind of device counts memory."""

    granularity: int
    scratch: Scratch | None
    reserve: int
    reason: str


MACHINES = {
    "cpu": Machine(1, onednn_scratch, 0, "what oneDNN allocates is part of the peak"),
    "cuda": Machine(
        GRANULARITY,
        None,
        256 << 20,
        "assumed: 64 MiB for cuBLAS, the rest for cuDNN's workspaces and fragmentation",
    ),
}


@dataclass(frozen=True)
class Work:
    """What is trained, but for its size.

    Attributes:
        model: a name of ``config.RECIPES``.
        image_size: pixels, height and width.
        batch_size: images of a step.
        depth: layers, of ``cifar-bc`` alone.
        growth_rate: channels ``k``, of ``cifar-bc`` alone.
        channels: of an image.
        classes: number of logits.
        drop_rate: dropout.
        precision: as in training.
    """

    model: str
    image_size: int
    batch_size: int = SMALLEST_BATCH
    depth: int | None = None
    growth_rate: int | None = None
    channels: int = 3
    classes: int = 10
    drop_rate: float = 0.0
    precision: str = "32-true"

    def build(self, mode: str) -> nn.Module:
        """The network, with the parameters on torch's default device.

        Raises:
            ConfigError: if no such network has this depth.
        """
        network = build_network(
            self.model,
            self.depth,
            self.growth_rate,
            in_channels=self.channels,
            num_classes=self.classes,
            drop_rate=self.drop_rate,
            recompute=MODES[mode],
        )
        return checkpointed_(network) if mode == "checkpointed" else network

    def estimate(self, mode: str, device: str) -> StepReport:
        """Memory of a training step on a kind of device, with training's optimizer.

        Raises:
            ConfigError: if the network does not exist, or has more bytes than torch can count.
        """
        with _countable(self.model):
            return self._estimate(mode, MACHINES[device])

    def _estimate(self, mode: str, machine: Machine) -> StepReport:
        with torch.device("meta"):
            network = self.build(mode)
        if self.precision == "64-true":
            network.double()
        return estimate(
            network,
            (self.batch_size, self.channels, self.image_size, self.image_size),
            target=(self.batch_size,),
            optimizer=partial(make_optimizer, lr=0.1),
            autocast=AUTOCAST.get(self.precision),
            granularity=machine.granularity,
            scratch=machine.scratch,
        )


@contextmanager
def _countable(model: str) -> Iterator[None]:
    """Turns torch's complaint about a size beyond 2**63 into a :class:`ConfigError`."""
    try:
        yield
    except (OverflowError, RuntimeError, TypeError) as error:
        told = str(error).splitlines()[0]
        if "overflow" not in told.lower():
            raise
        raise ConfigError(f"--model {model}: no memory can hold it: {told}") from error


@dataclass(frozen=True)
class Fit:
    """What fits in one mode.

    Attributes:
        mode: a key of :data:`MODES`.
        largest: batch or depth; 0 if not even the smallest fits.
        peak: bytes at the largest moment of its step, estimated; 0 with ``largest``.
        next: one size up, which does not fit; ``None`` if the search ended before.
        next_peak: bytes of that, estimated.
        peaks: every size that was estimated, and its bytes.
    """

    mode: str
    largest: int
    peak: int
    next: int | None
    next_peak: int | None
    peaks: dict[int, int]


@dataclass(frozen=True)
class Plan:
    """What fits ``budget`` bytes on a kind of device, by mode.

    ``varies`` is ``"batch"`` or ``"depth"``, the other is fixed in ``work``. ``reserve`` bytes of
    the budget are left to what the estimate does not see, and ``reserve_reason`` says for what.
    """

    budget: int
    device: str
    reserve: int
    reserve_reason: str
    varies: Literal["batch", "depth"]
    work: Work
    fits: tuple[Fit, ...]

    def __getitem__(self, mode: str) -> Fit:
        return {fit.mode: fit for fit in self.fits}[mode]


def plan(
    budget: int | str | None = None,
    *,
    model: str = "cifar-bc",
    image_size: int | None = None,
    batch_size: int | None = None,
    depth: int | None = None,
    growth_rate: int | None = None,
    channels: int = 3,
    classes: int = 10,
    drop_rate: float = 0.0,
    precision: str = "32-true",
    device: str | None = None,
    modes: Iterable[str] = tuple(MODES),
) -> Plan:
    """The largest batch of a network, or for ``batch_size`` the deepest ``cifar-bc``, by mode.

    A step is forward, cross-entropy, backward and SGD with momentum. It fits if its estimated peak
    and the reserve are within the budget; parameters, their gradients, optimizer state and the
    batch are part of the peak.

    Args:
        budget: bytes, or a size such as ``"8GiB"``; unless given, what the present GPU has free.
        model: a name of the ``train`` command.
        image_size: pixels, height and width; the model's training size unless given.
        batch_size: fixes the batch, so that the depth is planned; for ``cifar-bc`` alone.
        depth: layers of ``cifar-bc``, 6n+4; 100 unless given.
        growth_rate: channels ``k`` of ``cifar-bc``; 12 unless given.
        channels: of an image.
        classes: number of logits.
        drop_rate: dropout.
        precision: as in training.
        device: ``"cpu"`` or ``"cuda"``: whose way of counting; unless given, that of this machine.
        modes: ``naive``; ``checkpointed``, as by torchvision's ``memory_efficient=True``; ``norm``;
            ``bottleneck``.

    Raises:
        ConfigError: if an argument is out of its range; the message quotes it, spelled as on the
            command line.
    """
    device = device or present_device()
    check_choice("device", device, MACHINES)
    check_choice("precision", precision, PRECISIONS)
    check_choice("model", model, RECIPES)
    for mode in (modes := tuple(modes)):
        check_choice("modes", mode, MODES)
    if batch_size is not None and (model != "cifar-bc" or depth is not None):
        raise ConfigError(
            f"--batch-size {batch_size} asks for the deepest cifar-bc, and --depth or another "
            "--model for the largest batch: leave out one of them"
        )
    if model == "cifar-bc":
        growth_rate = 12 if growth_rate is None else growth_rate
        depth = 100 if depth is None else depth
    size = RECIPES[model].resize if image_size is None else image_size
    check_network(model, depth, growth_rate, size, "image_size")
    for name, value, least in (
        ("batch_size", batch_size, SMALLEST_BATCH),
        ("channels", channels, 1),
        ("classes", classes, 2),
    ):
        check_at_least(name, value, least)
    work = Work(
        model,
        size,
        batch_size or SMALLEST_BATCH,
        depth,
        growth_rate,
        channels,
        classes,
        drop_rate,
        precision,
    )
    return plan_work(
        work, "batch" if batch_size is None else "depth", _bytes(budget), device, modes
    )


def plan_work(
    work: Work,
    varies: Literal["batch", "depth"],
    budget: int,
    device: str,
    modes: Iterable[str] = tuple(MODES),
) -> Plan:
    """As :func:`plan`, of a ``work`` that was checked."""
    machine = MACHINES[device]
    with torch.device("meta"), _countable(work.model):
        work.build("naive")  # a depth that no network has is refused before any search
    fits = tuple(_fit(work, varies, mode, budget - machine.reserve, device) for mode in modes)
    return Plan(budget, device, machine.reserve, machine.reason, varies, work, fits)


def within(budget: str, options: dict[str, Any]) -> TrainConfig:
    """The training run of ``options`` whose step fits ``budget`` on this machine.

    Chooses ``recompute``, the first of none, norm and bottleneck that fits (each computes more
    again than the one before); if that is given, the largest batch up to the training set's size;
    if the batch is given too, nothing.

    Args:
        budget: a size such as ``"8GiB"``.
        options: as for :meth:`TrainConfig.of`, ``None`` where not given.

    Raises:
        ConfigError: if nothing fits, or as :meth:`TrainConfig.of`.
    """
    size = parse_size(budget, "budget")
    config = TrainConfig.of(**{**options, "budget": size})
    if options.get("recompute") and options.get("batch_size"):
        return config
    try:
        if options.get("recompute"):
            return replace(config, batch_size=_largest_batch(config, size))
        return replace(config, recompute=_cheapest(config, size))
    except _NothingFits as error:
        raise ConfigError(f"--budget {budget} is too small: {error}") from error


class _NothingFits(Exception):
    pass


def _cheapest(config: TrainConfig, budget: int) -> Recompute:
    device = present_device()
    peak = 0
    for mode in ("naive", "norm", "bottleneck"):
        peak = work_of(config).estimate(mode, device).peak.total + MACHINES[device].reserve
        if peak <= budget:
            return MODES[mode]
    raise _NothingFits(
        f"a batch of {config.batch_size} needs {format_size(peak)} even with --recompute bottleneck"
    )


def _largest_batch(config: TrainConfig, budget: int) -> int:
    mode = next(mode for mode, recompute in MODES.items() if recompute == config.recompute)
    (fit,) = plan_work(work_of(config), "batch", budget, present_device(), [mode]).fits
    if not fit.largest:
        raise _NothingFits(
            f"--recompute {config.recompute} needs {format_size(fit.next_peak or 0)} "
            f"for a batch of {fit.next}"
        )
    return min(fit.largest, config.train_size or TRAIN_IMAGES)


def work_of(config: TrainConfig) -> Work:
    """The step of a training run."""
    return Work(
        config.model,
        config.resize,
        config.batch_size,
        config.depth,
        config.growth_rate,
        channels=1,
        drop_rate=config.drop_rate,
        precision=config.precision,
    )


def present_device() -> str:
    """Which of :data:`MACHINES` this one is."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_bytes() -> int:
    """What the present GPU has free.

    Raises:
        ConfigError: if there is none.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "--budget is needed, such as 8GiB: there is no GPU whose free memory could be asked"
        )
    return torch.cuda.mem_get_info()[0]


def _bytes(budget: int | str | None) -> int:
    return free_bytes() if budget is None else parse_size(str(budget), "budget")


def _fit(work: Work, varies: str, mode: str, budget: int, device: str) -> Fit:
    peak, size_of = _by_index(work, varies, mode, device)
    smallest, most = (
        (SMALLEST_BATCH, MOST["batch"]) if varies == "batch" else (1, MOST["depth"] // 6)
    )
    peaks = largest_within(peak, budget, smallest, most)
    best = max((n for n, size in peaks.items() if size <= budget), default=None)
    above = smallest if best is None else best + 1
    return Fit(
        mode,
        largest=0 if best is None else size_of(best),
        peak=0 if best is None else peaks[best],
        next=size_of(above) if above in peaks else None,
        next_peak=peaks.get(above),
        peaks={size_of(n): peaks[n] for n in sorted(peaks)},
    )


def _by_index(
    work: Work, varies: str, mode: str, device: str
) -> tuple[Callable[[int], int], Callable[[int], int]]:
    """Peak bytes of the ``n``-th size, and what size that is."""

    def size_of(n: int) -> int:
        return n if varies == "batch" else 6 * n + 4

    def peak(n: int) -> int:
        size = size_of(n)
        sized = replace(work, batch_size=size) if varies == "batch" else replace(work, depth=size)
        return sized.estimate(mode, device).peak.total

    return peak, size_of


def largest_within(
    peak: Callable[[int], int], budget: int, smallest: int, most: int
) -> dict[int, int]:
    """Values of a rising ``peak``, the last within ``budget`` and the next one among them.

    Guesses along the straight line through the two values nearest to the budget, which is right at
    once where the peak is affine, as it is between two kinks in the batch.
    """
    known: dict[int, int] = {}
    low, high, guess = smallest - 1, most + 1, smallest
    while high - low > 1:
        known[guess] = peak(guess)
        if known[guess] <= budget:
            low = guess
        else:
            high = guess
        guess = _guess(known, budget)
        if len(known) > SECANT_STEPS and high in known:
            guess = (low + high) // 2
        guess = max(low + 1, min(guess, 4 * max(low, 1), high - 1))
    return known


def _guess(known: dict[int, int], budget: int) -> int:
    nearest = sorted(known, key=lambda n: abs(known[n] - budget))[:2]
    first, second = min(nearest), max(nearest)
    rise = known[second] - known[first]
    if rise <= 0:
        return 4 * second
    return math.floor(first + (budget - known[first]) * (second - first) / rise)


class CheckpointedBlock(nn.Module):
    """A naive dense block that runs each layer's first convolution, and what is before, twice.

    That is torchvision's ``memory_efficient=True``, for basic layers too.
    """

    def __init__(self, block: DenseBlock) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block.values())

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(_checkpointed_layer(layer, features))
        return torch.cat(features, 1)


def checkpointed_(network: nn.Module) -> nn.Module:
    """Replace the dense blocks of a naive network by checkpointed ones, in place."""
    features: Any = network.features
    for name, block in list(features.named_children()):
        if isinstance(block, DenseBlock):
            setattr(features, name, CheckpointedBlock(block))
    return network


def _checkpointed_layer(layer: Any, features: Sequence[Tensor]) -> Tensor:
    def first(*maps: Tensor) -> Tensor:
        return layer.conv1(layer.relu1(layer.norm1(torch.cat(maps, 1))))

    y = checkpoint(first, *features, use_reentrant=False)
    if isinstance(layer, BottleneckLayer):
        y = layer.conv2(layer.relu2(layer.norm2(y)))
    return nn.functional.dropout(y, layer.drop_rate, layer.training)
